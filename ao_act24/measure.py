"""Does 2:4 cost this model accuracy? Measured on the model's own activations, layer by layer and at the loss."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.fx import GraphModule, Node

from ao_act24 import autograd, ops, ops_fp8
from ao_act24.capture import locator, run_captured
from ao_act24.config import Act24Config, checked
from ao_act24.fp8 import from_parts, is_fp8, to_fp8
from ao_act24.kernels import reference
from ao_act24.passes import Act24Warning, Verdict, graph_modules, rewrite_graph
from ao_act24.passes.find import Site, find_sites
from ao_act24.passes.report import as_text, describe
from ao_act24.passes.vocabulary import is_our_op
from ao_act24.phases import ignored


@dataclass
class Layer:
    """What 2:4 does to one FFN, over all its tokens. Shares are between 0 and 1.

    Attributes:
        path: the module, as in ``named_modules``; where the graph does not say, the beginning of a line of code.
        zeros: share of the activation ``relu(h)**2`` that is exactly zero.
        dropped: share of its non-zeros that 2:4 drops.
        dropped_energy: share of its sum of squares that 2:4 drops.
        error: ``||sparse - dense|| / ||dense||`` of the FFN's output, for the same input: what 2:4 adds. Where it runs
            in fp8, dense does, too.
        fp8_error: the same of dense fp8 against dense in 16 bits: what fp8 adds by itself. None where it does not run
            in fp8.
        fp8_error_in_24: the same of fp8 in 2:4 against dense in 16 bits: what both add.
        dropped_across_tokens: share that ``weight_grads="sparse"`` drops of the sum of squares that is left.
        dropped_gradient: share that it drops of the sum of squares of the gradient by ``h``, in the 2:4 model; None
            without a loss to differentiate.
        tokens: the number of tokens measured.
    """

    path: str
    zeros: float = 0.0
    dropped: float = 0.0
    dropped_energy: float = 0.0
    error: float = 0.0
    dropped_across_tokens: float = 0.0
    dropped_gradient: float | None = None
    tokens: int = 0
    fp8_error: float | None = None
    fp8_error_in_24: float | None = None
    _total: int = field(default=0, repr=False)
    _sums: Tensor = field(default_factory=lambda: torch.zeros(7, dtype=torch.float64), repr=False)
    _fp8_sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64), repr=False)
    _gradient_sums: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64), repr=False)

    def _add(self, square: Tensor, pruned: Tensor, sparse: Tensor, dense: Tensor) -> None:
        zeros = (square == 0).sum()
        lost = square.numel() - zeros - (pruned != 0).sum()
        energy = square.double().square().sum()
        left, across = across_tokens(pruned, pruned)
        difference, norm = (sparse.double() - dense.double()).square().sum(), dense.double().square().sum()
        self._sums += torch.stack([zeros, lost, energy, left, across, difference, norm]).cpu()
        self._total += square.numel()
        self.tokens += square.numel() // square.shape[-1]
        zero, gone, energy_sum, left_sum, across_sum, difference_sum, norm_sum = self._sums.tolist()
        self.zeros = zero / self._total if self._total else 0.0
        self.dropped = gone / (self._total - zero) if self._total > zero else 0.0
        self.dropped_energy = max(energy_sum - left_sum, 0.0) / energy_sum if energy_sum else 0.0
        self.dropped_across_tokens = across_sum / left_sum if left_sum else 0.0
        self.error = (difference_sum / norm_sum) ** 0.5 if norm_sum else 0.0

    def _add_fp8(self, sparse: Tensor, dense: Tensor, in_16_bits: Tensor) -> None:
        exact = in_16_bits.double()
        squares = ((dense.double() - exact), (sparse.double() - exact), exact)
        self._fp8_sums += torch.stack([values.square().sum() for values in squares]).cpu()
        fp8, both, norm = self._fp8_sums.sqrt().tolist()
        self.fp8_error, self.fp8_error_in_24 = (fp8 / norm, both / norm) if norm else (0.0, 0.0)

    def _add_gradient(self, gradient: Tensor, pruned: Tensor) -> None:
        self._gradient_sums += torch.stack(across_tokens(gradient, pruned)).cpu()
        energy, dropped = self._gradient_sums.tolist()
        self.dropped_gradient = dropped / energy if energy else 0.0


def across_tokens(values: Tensor, activation: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of squares of ``values``, and how much of it ``weight_grads="sparse"`` drops.

    That is the two smallest of every four tokens of a feature, but for the features in which ``activation`` fires most.
    Both tensors are ``[..., H]``, dense: the activation itself, or the gradient by ``h`` with it.
    """
    squares = values.double().reshape(-1, values.shape[-1]).square()
    counts = (activation.reshape(-1, values.shape[-1]) != 0).sum(0, dtype=torch.int32)
    groups = reference.in_groups(squares[: squares.shape[0] // 4 * 4], autograd.PERMUTED)
    dropped = groups.topk(2, 1, largest=False).values.sum((0, 1))
    dropped[ops.densest(counts, autograd.how_many_densest(len(counts)))[0]] = 0
    return squares.sum(), dropped.sum()


@dataclass(frozen=True)
class Measurement:
    """What ``measure`` found. Prints as a table; ``plot`` draws it.

    Attributes:
        layers: one entry for each FFN, in order of execution.
        dense_loss, sparse_loss: the model's loss with dense activations and in 2:4; None if the model gives none.
        output_error: ``||sparse - dense|| / ||dense||`` of the model's output.
        loss_in_16_bits, error_in_16_bits: of the model as it is, and of 2:4 over that, where ``measure`` was asked what
            fp8 would be; else None, and "dense" is the model as it is.
    """

    layers: tuple[Layer, ...]
    dense_loss: float | None
    sparse_loss: float | None
    output_error: float
    loss_in_16_bits: float | None = None
    error_in_16_bits: float | None = None

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title="what 2:4 does to each FFN", title_justify="left")
        table.add_column("FFN", overflow="fold")
        across = ["energy, across tokens", "gradient, across tokens"]
        in_fp8 = any(layer.fp8_error is not None for layer in self.layers)
        if in_fp8:
            across = ["fp8 alone, over 16 bits", "both, over 16 bits"]
        for column in ("tokens", "zeros", "non-zeros dropped", "energy dropped", "output error", *across):
            table.add_column(column, justify="right", min_width=7)  # of a share: none is cut off
        for layer in self.layers:
            in_training = (layer.dropped_across_tokens, layer.dropped_gradient)
            last = (layer.fp8_error, layer.fp8_error_in_24) if in_fp8 else in_training
            shares = (layer.zeros, layer.dropped, layer.dropped_energy, layer.error, *last)
            cells = ("–" if share is None else f"{share:.3%}" for share in shares)
            table.add_row(Text(layer.path), f"{layer.tokens:,}", *cells)
        loss = f"model output error {self.output_error:.3%}"
        if self.dense_loss is not None and self.sparse_loss is not None:
            change = self.sparse_loss - self.dense_loss
            loss += f"; loss dense {self.dense_loss:.5f}, 2:4 {self.sparse_loss:.5f} ({change:+.5f})"
        if self.error_in_16_bits is not None:
            loss += f"; over 16 bits, output error {self.error_in_16_bits:.3%}"
            loss += "" if self.loss_in_16_bits is None else f", loss {self.loss_in_16_bits:.5f}"
        return Group(table, loss)

    def __str__(self) -> str:
        return as_text(self)

    def plot(self, path: str | Path) -> None:
        """Draw shares of zeros, drops and errors over the layers into a picture file; the ending chooses the format."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot needs matplotlib: pip install 'ao_act24[plot]'") from error
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        zeros, drops = figure.subplots(1, 2)
        positions = range(len(self.layers))
        zeros.bar(positions, [100 * layer.zeros for layer in self.layers], color="tab:gray")
        zeros.set(title="zeros in relu(h)²", xlabel="FFN", ylabel="%", ylim=(0, 100))
        for name, label in (
            ("dropped", "non-zeros dropped"),
            ("dropped_energy", "energy dropped"),
            ("error", "output error"),
        ):
            drops.plot(positions, [100 * getattr(layer, name) for layer in self.layers], marker="o", label=label)
        drops.set(title="what 2:4 costs", xlabel="FFN", ylabel="%")
        drops.set_ylim(bottom=0)
        drops.legend()
        for axes in (zeros, drops):
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.savefig(path, dpi=150)


def measure(
    model: Callable[..., Any],
    /,
    *inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    config: Act24Config | None = None,
    **kwargs: Any,
) -> Measurement:
    """Run ``model(*inputs, **kwargs)`` dense and in 2:4, and compare every FFN and the result.

    Both runs are without gradients, in the current training mode. Where there is a loss, and gradients are not switched
    off around the call, a third run, in 2:4, differentiates it by what ``weight_grads="sparse"`` would prune. All leave
    the model, its buffers and gradients, and torch's random state as they were, compute the exact semantics on any
    device, and make no claim to speed.

    Args:
        model: a module or function; may be compiled or transformed already.
        inputs, kwargs: arguments that it can run on; large batches give steadier numbers.
        loss: computes a scalar from the model's output; never passed to the model. Without it the output's ``loss``
            attribute is used, or the output itself if it is a scalar.
        config: as for compiling; like ``loss``, never passed to the model. With ``dtype="fp8"`` FFNs of bfloat16
            weights are measured as they would be after conversion: the dense run is then in fp8, and "16 bits" are
            what the model has now. Of weights that are in fp8 already, "16 bits" are what they stand for.

    Raises:
        TypeError: if ``model`` or ``loss`` cannot be called, or ``loss`` returns no scalar.
        ValueError: if the model has no Linear→ReLU²→Linear block that can run in 2:4.
    """
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a function of the model's output, got {type(loss).__name__}")
    layers: dict[tuple[Any, ...], Layer] = {}
    converted: list[Site] = []
    with_gradients = torch.is_grad_enabled()
    rewrite = Act24Config(emulate=True, dtype=checked(config).dtype)

    def run(stand_in: StandIn | None) -> Any:
        return run_captured(model, inputs, kwargs, _Probe(model, rewrite, layers, converted, progress, stand_in))

    with _Progress() as progress, torch.no_grad(), ignored():
        dense, sparse = run(_compare), run(None)
        if not layers:
            how = "" if config is None else ", config=config"
            raise ValueError(
                f"model has no Linear→ReLU²→Linear block that can run in 2:4: explain(model, *inputs{how}) says why"
            )
        losses = (_loss(dense, loss), _loss(sparse, loss))
        dense_loss, sparse_loss = (None if value is None else float(value) for value in losses)
        if with_gradients and sparse_loss is not None:
            _add_gradients(lambda stand_in: _loss(run(stand_in), loss))
        plain = run_captured(model, inputs, kwargs, "eager") if converted else None
    measured = tuple(layers.values()), dense_loss, sparse_loss, _relative_error(*map(_first_tensor, (sparse, dense)))
    if plain is None:
        return Measurement(*measured)
    plain_loss = _loss(plain, loss)
    error = _relative_error(*map(_first_tensor, (sparse, plain)))
    return Measurement(*measured, None if plain_loss is None else float(plain_loss), error)


# of a sparse matmul: the layer, packed, metadata, weight, bias, and h
StandIn = Callable[[Layer, Tensor, Tensor, Tensor, Tensor | None, Tensor], Tensor]


def _compare(layer: Layer, packed: Tensor, metadata: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor) -> Tensor:
    """Measure the layer, and go on with the dense result."""
    sparse = ops.sparse_mm(packed, metadata, weight, bias)
    square = reference.relu2(h)
    dense = torch.nn.functional.linear(square.to(packed.dtype), weight, bias)
    layer._add(square, ops.unpack(packed, metadata), sparse, dense)
    return dense


def _compare_fp8(
    layer: Layer,
    packed: Tensor,
    metadata: Tensor,
    row_scale: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    h: Tensor,
    first: tuple[Tensor, Tensor, Tensor | None] | None,
    weight: Tensor | None,
) -> Tensor:
    """The same in fp8. ``first``, ``weight``: both projections' operands in 16 bits, where they are known."""
    sparse = ops_fp8.sparse_mm_fp8(packed, metadata, row_scale, qdata, scale, bias, dtype)
    in_fp8 = from_parts(qdata, scale, dtype)
    dense = torch.nn.functional.linear(reference.relu2(h), in_fp8, bias)
    in_16_bits = h
    if first is not None:
        x, up, up_bias = first
        in_16_bits = torch.nn.functional.linear(x, (up.dequantize() if is_fp8(up) else up).to(x.dtype), up_bias)
    weight = in_fp8.dequantize() if weight is None else weight
    layer._add(reference.relu2(h), ops.unpack(*ops.relu2_sparsify(h)), sparse, dense)
    layer._add_fp8(sparse, dense, torch.nn.functional.linear(reference.relu2(in_16_bits), weight, bias))
    return dense


def _in_16_bits(site: Site) -> tuple[tuple[Any, ...] | None, Any]:
    """The operands of the first projection, and the second one's weight, before they were converted in the graph."""
    assert site.down is not None
    first, weight, up = None, None, site.up
    if up is not None and isinstance(up.weight, Node) and not up.transposed:
        first = up.input, up.weight.args[0] if up.weight.target is to_fp8 else up.weight, up.bias
    if _is_converted(site):
        weight = site.down.weight.args[0]  # type: ignore[union-attr]
    return first, weight


def _is_converted(site: Site) -> bool:
    return site.down is not None and isinstance(site.down.weight, Node) and site.down.weight.target is to_fp8


def _add_gradients(loss: Callable[[StandIn], Tensor | float | None]) -> None:
    """Differentiate by each layer's ``h``, and by nothing else: every ``.grad`` stays as it is."""
    seen: list[tuple[Layer, Tensor, Tensor]] = []
    edges: list[GradientEdge] = []

    def note(layer: Layer, packed: Tensor, metadata: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor) -> Tensor:
        if h.requires_grad:
            seen.append((layer, packed.detach(), metadata))
            edges.append(get_gradient_edge(h))
        return ops.sparse_mm(packed, metadata, weight, bias)

    try:
        with torch.enable_grad():
            value = loss(note)
        if not (edges and isinstance(value, Tensor) and value.requires_grad):
            return
        gradients = torch.autograd.grad(value, edges, allow_unused=True)
    except RuntimeError as error:  # something has no gradient, or there is no memory for it
        warnings.warn(f"measure leaves out the gradients: {error}", Act24Warning, stacklevel=3)
        return
    for (layer, packed, metadata), gradient in zip(seen, gradients):
        if gradient is not None:
            layer._add_gradient(gradient, ops.unpack(packed, metadata))


@dataclass(eq=False)  # Dynamo compares backends
class _Probe:
    """A Dynamo backend that runs graphs eagerly in 2:4, with a stand-in, if there is one, for each sparse matmul."""

    model: Callable[..., Any]
    rewrite: Act24Config
    layers: dict[tuple[Any, ...], Layer]  # by the names of its weights, its path and its line of code
    converted: list[Site]  # to fp8, in the graphs
    progress: "_Progress"
    stand_in: StandIn | None
    args: tuple[Any, ...] | None = None  # of the graph that is running

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        sites = 0
        for module in graph_modules(gm):
            rewrite_graph(module.graph, self.rewrite)
            for site in find_sites(module.graph):
                by_name = site.relu2 is None  # an operator that the model calls itself
                if not site.rewritten or self.stand_in is None or by_name:
                    continue
                in_fp8 = is_our_op(site.node, "sparse_mm_fp8")
                self.converted += [site] * _is_converted(site)
                if not in_fp8 or self.stand_in is _compare:  # fp8 has no gradients
                    self._replace(site, self.stand_in, locator(gm, self.model, site, describe(site, "", self.rewrite)))
                    sites += 1
            module.recompile()

        def run(*args: Any) -> Any:
            self.args = args
            self.progress.expect(sites)
            out = gm.forward(*args)
            self.args = None
            return out

        return run

    def _replace(
        self, site: Site, stand_in: StandIn, locate: Callable[[tuple[Any, ...]], tuple[tuple[str, ...], Verdict]]
    ) -> None:
        assert site.relu2 is not None
        node = site.node
        plain, count = node.target, len(node.args)
        operands: tuple[Any, ...] = (site.relu2.h,)
        compare: Callable[..., Tensor] = stand_in
        if is_our_op(node, "sparse_mm_fp8"):
            compare, operands = _compare_fp8, (*operands, *_in_16_bits(site))

        def located(*args: Any) -> Tensor:
            if self.args is None:  # a backward recomputes what was checkpointed
                return plain(*args[:count])  # type: ignore[operator]
            weights, verdict = locate(self.args)
            key = (weights, verdict.path, verdict.source)
            out = compare(self.layers.setdefault(key, Layer(verdict.name)), *args)
            self.progress.advance()
            return out

        node.target, node.args = located, (*node.args, *operands)


class _Progress:
    """A bar over the layers on a terminal's stderr; nothing elsewhere."""

    def __enter__(self) -> "_Progress":
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._bar = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("measuring FFNs", total=None)
        self._expected = 0
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def expect(self, layers: int) -> None:
        self._expected += layers
        self._bar.update(self._task, total=self._expected)

    def advance(self) -> None:
        self._bar.advance(self._task)


def _loss(output: Any, loss: Callable[[Any], Tensor] | None) -> Tensor | float | None:
    if loss is not None:
        value = loss(output)
        if not isinstance(value, (int, float)) and not (isinstance(value, Tensor) and value.numel() == 1):
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise TypeError(f"loss must return a scalar, got {got}")
        return value
    value = getattr(output, "loss", output)
    return value if isinstance(value, Tensor) and value.numel() == 1 else None


def _first_tensor(output: Any) -> Tensor | None:
    """The output's logits if it has them, else its first floating-point tensor."""
    tensors = [getattr(output, "logits", None), *torch.utils._pytree.tree_leaves(output)]
    return next((t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()), None)


def _relative_error(sparse: Tensor | None, dense: Tensor | None) -> float:
    if sparse is None or dense is None:
        return float("nan")
    norm = dense.double().norm()
    return float((sparse.double() - dense.double()).norm() / norm) if norm else 0.0
