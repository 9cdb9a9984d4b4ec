"""``sparsify_``: put the 2:4 form into a model's own modules, for eager use and for any compiler that comes later.

Each module that holds an FFN gets a new ``forward``, as an attribute of the instance: plain Python code made from the
rewritten graph of ``torch.fx``, which reads the module's own submodules and parameters. So ``state_dict`` keys and
parameter identities stay, ``torch.compile`` with any backend traces through it, and ``inspect.getsource(mlp.forward)``
shows what runs. Removing the attribute restores the model.

Symbolic tracing sees a module's code once (``trace.py`` says which modules it leaves alone). What may differ later is
checked at each call, and where a check fails the module's original forward runs instead, with a warning where something
changed: arguments other than tensors for exactly the required parameters, a submodule replaced or hooked since, dropout
active although tracing saw it off, a device without kernels. So it does, with a warning, in training on a GPU. What a
forward reads from attributes (buffers aside), globals and closures is read once, when ``sparsify_`` is called.
"""

import linecache
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ao_act24.config import Act24Config, checked
from ao_act24.fp8 import INFERENCE_ONLY, NOT_CONVERTED, is_fp8, to_fp8, why_not_by_rows
from ao_act24.kernels import cuda
from ao_act24.passes import Act24Warning, Report, Verdict, rewrite_graph
from ao_act24.passes.find import find_sites
from ao_act24.passes.judge import judge
from ao_act24.passes.vocabulary import Linear, ancestors, as_linear, cast_dtype, is_our_op, known_weight, weight_origin
from ao_act24.phases import ignored
from ao_act24.trace import attribute, forward_parameters, is_hooked, is_patched, may_hold_ffn, required_names, trace
from ao_act24.when import MIN_DIM, least_tokens, why_dense

_Forward = Callable[..., Any]
_COMPILED_ONLY = 'only torch.compile(model, backend="ao_act24") makes training in 2:4 faster (inference: torch.no_grad)'


def sparsify_(model: nn.Module, config: Act24Config | None = None) -> Report:
    """Make the Linear→ReLU²→Linear blocks of ``model`` run in 2:4, in place.

    Needs no example inputs: it traces each module that holds two or more matrices with ``torch.fx``. Blocks that
    cannot be traced alone stay as they are; ``torch.compile(model, backend="ao_act24")`` reaches more of them. Call
    it before ``torch.compile``. ``state_dict`` keys and parameter identities do not change; ``unsparsify_`` undoes
    it. A pickled module (as opposed to its ``state_dict``) loads in dense form. With ``dtype="fp8"``, first, weights
    of blocks that then run in 2:4, and that nothing else has, become torchao's tensors for good.

    Args:
        model: the model, or a part of it.
        config: as for compiling.

    Returns:
        A ``Report`` on the FFN-like sites that tracing saw. Warns if none of them was rewritten.

    Raises:
        TypeError: if ``model`` is not a module, or is compiled already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise TypeError("model must not be compiled yet: call sparsify_ first, then torch.compile")
    verdicts: list[Verdict] = []
    if checked(config).weight_grads == "sparse":
        raise ValueError('config.weight_grads must be "dense" for sparsify_; with the backend it may be "sparse"')
    with ignored():  # the phase is asked for at each call
        if checked(config).dtype == "fp8":
            _convert(model, checked(config))
        _visit(model, "", checked(config), verdicts, set())
    if not any(map(is_sparsified, model.modules())):
        reasons = "; ".join(sorted({v.reason for v in verdicts})) or "no Linear→ReLU²→Linear block could be traced"
        message = f"ao_act24.sparsify_ rewrote nothing: {reasons}. ao_act24.explain(model, *inputs) lists every site."
        warnings.warn(message, Act24Warning, stacklevel=2)
    return Report(tuple(verdicts))


def unsparsify_(model: nn.Module) -> int:
    """Undo ``sparsify_`` on ``model`` and everything in it. Returns the number of modules that were restored."""
    sparsified = [module for module in model.modules() if is_sparsified(module)]
    for module in sparsified:
        del module.forward, module._replicate_for_data_parallel
    return len(sparsified)


def is_sparsified(module: nn.Module) -> bool:
    return hasattr(module.__dict__.get("forward"), "_act24_verdicts")


def _visit(module: nn.Module, path: str, config: Act24Config, verdicts: list[Verdict], warned: set[str]) -> None:
    """Rewrite ``module`` and everything in it, innermost first; what holds several matrices is opaque to its parent.

    ``warned``: what has been said already, by all of them.
    """
    if is_sparsified(module):
        verdicts.extend(verdict.within(path) for verdict in module.forward._act24_verdicts)  # type: ignore[attr-defined]
    for name, child in module.named_children():
        _visit(child, f"{path}.{name}".lstrip("."), config, verdicts, warned)
    if not may_hold_ffn(module):
        return
    train, evaluate = (trace(module, training) for training in (True, False))
    if train is None or evaluate is None:
        return
    traced = [_calls(graph_module) for graph_module in (train, evaluate)]
    found = [rewrite_graph(graph_module.graph, config) for graph_module in (train, evaluate)]
    here = found[0 if module.training else 1]
    verdicts.extend(verdict.within(path) for verdict in here)
    forwards = [
        _generate(module, path, graph_module, calls, config) if any(verdict.rewritten for verdict in sites) else None
        for graph_module, sites, calls in zip((train, evaluate), found, traced)
    ]
    if any(forwards):
        forward = _dispatcher(module, warned, *forwards)
        forward._act24_verdicts = here  # type: ignore[attr-defined]
        module.forward = types.MethodType(forward, module)
        module._replicate_for_data_parallel = types.MethodType(_replicate_for_data_parallel, module)  # type: ignore[method-assign]


Slot = tuple[int, str]  # of a parameter: the module (its id), and the name there


def _convert(model: nn.Module, config: Act24Config) -> None:
    """To fp8, once: both weights of each block that then runs in 2:4, if nothing else has them."""
    unsparsify_(model)
    parameters: dict[Slot, nn.Parameter] = {
        (id(module), name): parameter
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    blocks: set[tuple[Slot, Slot]] = set()
    for module in filter(may_hold_ffn, model.modules()):
        traced = [trace(module, training) for training in (True, False)]
        if all(traced):
            blocks |= set.intersection(*(_convertible(module, each, config) for each in traced if each))
    while True:
        slots = {slot for block in blocks for slot in block}
        elsewhere = {id(parameter) for slot, parameter in parameters.items() if slot not in slots}
        left = {block for block in blocks if not any(id(parameters[slot]) in elsewhere for slot in block)}
        if left == blocks:
            break
        blocks = left
    converted: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name in [name for name in module._parameters if (id(module), name) in slots]:
            weight = parameters[id(module), name]
            if not is_fp8(weight):
                new = converted.setdefault(id(weight), nn.Parameter(to_fp8(weight.detach()), requires_grad=False))
                setattr(module, name, new)


def _convertible(module: nn.Module, graph_module: GraphModule, config: Act24Config) -> set[tuple[Slot, Slot]]:
    """The weights of each block of ``module`` that lacks nothing but fp8, if the graph has them nowhere else."""
    graph = graph_module.graph
    pairs: set[tuple[Slot, Slot]] = set()
    in_blocks: set[Node] = set()
    for site in find_sites(graph):
        slots = [_slot(module, linear) for linear in (site.up, site.down) if linear]
        if len(slots) == 2 and slots[0] and slots[1] and judge(site, config) == NOT_CONVERTED:
            assert site.up is not None and site.down is not None
            pairs.add((slots[0], slots[1]))
            in_blocks |= {site.up.node, site.down.node}
    used = {_slot(module, linear) for node in graph.nodes if (linear := as_linear(node)) and node not in in_blocks} | {
        (id(owner), name)
        for node in graph.find_nodes(op="get_attr")
        if any(user not in in_blocks for user in node.users)
        for owner, name in [_owner(module, str(node.target))]
    }
    return {pair for pair in pairs if not used.intersection(pair)}


def _owner(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return module.get_submodule(parent), name


def _slot(module: nn.Module, linear: Linear) -> Slot | None:
    """Of a traced linear layer's weight, if it is a parameter ``[outputs, inputs]``, in fp8 or in bfloat16."""
    known, transposed = known_weight(linear)
    node = weight_origin(linear.weight).node if linear.weight else None
    if transposed or not isinstance(known, nn.Parameter) or known.dtype != torch.bfloat16:
        return None
    if node is not None and node.op != "get_attr":
        return None
    owner, name = _owner(module, f"{linear.node.target}.weight" if node is None else str(node.target))
    return id(owner), name


def _replicate_for_data_parallel(self: nn.Module) -> nn.Module:
    """For ``nn.DataParallel``: the class's own copies all attributes, and so a forward bound to the original."""
    replica = type(self)._replicate_for_data_parallel(self)
    replica.forward = types.MethodType(self.forward.__func__, replica)  # type: ignore[attr-defined]
    return replica


class _Weight(NamedTuple):
    transposed: bool  # [hidden_dim, model_dim]
    cast: torch.dtype | bool  # True: to another tensor's dtype, the input's
    in_fp8: torch.dtype | None  # torchao's Float8Tensor, and what it gives


@dataclass
class _Generated:
    """A generated forward, and what must still hold when it is called."""

    run: _Forward
    inlined: list[tuple[str, type[nn.Module]]]  # submodules whose code was traced, and so is not called any more
    biased: set[str]  # the linear layers among them that have a bias
    weights: dict[str, _Weight]  # what is multiplied by in 2:4
    least: dict[str, int]  # of these weights, the tokens from which on it pays: Dynamo would trace how it is found
    sources: list[str]  # submodules and tensors that its results come from
    config: Act24Config


def _calls(graph_module: GraphModule) -> set[str]:
    return {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}


def _generate(
    module: nn.Module, path: str, graph_module: GraphModule, traced: set[str], config: Act24Config
) -> _Generated:
    """The forward that ``graph_module`` describes. ``traced`` are the calls that it made before it was rewritten."""
    graph = graph_module.graph
    graph.lint()
    code = graph.python_code(root_module="self")
    filename = f"<ao_act24 {type(module).__name__} {path} {id(module):x} {graph_module.training}>"
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(True), filename)
    namespace: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, filename, "exec"), namespace)
    called = _calls(graph_module)
    inside_called = tuple(f"{name}." for name in called)
    inlined = [
        (name, type(child))
        for name, child in module.named_modules()
        if name and name not in called and not name.startswith(inside_called)
        if name in traced or not isinstance(child, nn.Dropout)  # else never called
    ]
    weights, sources = {}, set()
    for site in find_sites(graph):
        if site.rewritten:
            assert site.down is not None and site.down.weight is not None
            weight, transposed, cast = weight_origin(site.down.weight)
            in_fp8: Any = site.node.args[-1] if is_our_op(site.node, "sparse_mm_fp8") else None
            weights[str(weight.target)] = _Weight(transposed, cast is not None and (cast_dtype(cast) or True), in_fp8)
            sources |= ancestors(site.node)
    biased = {name for name, _ in inlined if getattr(module.get_submodule(name), "bias", None) is not None}
    shapes = {name: attribute(module, name).shape for name in weights}
    sizes = {name: shape[::-1] if weights[name].transposed else shape for name, shape in shapes.items()}
    least = {name: least_tokens(*size, packs=False) if min(size) >= MIN_DIM else 0 for name, size in sizes.items()}
    names = sorted({str(node.target) for node in sources if node.op in ("call_module", "get_attr")})
    return _Generated(namespace["forward"], inlined, biased, weights, least, names, config)


def _dispatcher(module: nn.Module, warned: set[str], train: _Generated | None, evaluate: _Generated | None) -> _Forward:
    """The new forward: the generated one for the module's mode if its conditions hold, else the original."""
    original = type(module).forward
    parameters = forward_parameters(original)
    assert parameters is not None
    positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    required = required_names(parameters)
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        generated = train if self.training else evaluate
        if generated is None:
            return original(self, *args, **kwargs)
        given = {**dict(zip(positional, args)), **kwargs}
        plain = len(given) == len(args) + len(kwargs)  # else an argument too many, which the original complains of
        for name, value in given.items():
            if name in defaults:
                plain = plain and value is defaults[name]
            else:
                plain = plain and name in required and isinstance(value, Tensor)
        if not plain or any(name not in given for name in required):
            return original(self, *args, **kwargs)
        if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
            return original(self, *args, **kwargs)  # torch.func's transforms do not know the operators
        inputs = [given[name] for name in required]
        changed = _changed(self, generated, inputs)
        reason = changed or _stays_dense(self, generated, inputs)
        if not reason:
            return generated.run(self, *inputs)
        if (changed or reason in (_COMPILED_ONLY, INFERENCE_ONLY)) and not torch.compiler.is_compiling():
            message = f"{reason}: {type(self).__name__} runs dense"
            if message not in warned:
                warned.add(message)
                warnings.warn(message, Act24Warning, stacklevel=2)
        return original(self, *args, **kwargs)

    forward.__wrapped__ = next(g.run for g in (train, evaluate) if g)  # type: ignore[attr-defined]  # for inspect.getsource
    return forward


def _changed(module: nn.Module, generated: _Generated, inputs: list[Tensor]) -> str:
    """What no longer is as it was when ``sparsify_`` looked; empty if nothing."""
    for path, kind in generated.inlined:
        child = module.get_submodule(path)
        if type(child) is not kind:
            return f"{path} was replaced after sparsify_, by a {type(child).__name__}"
        if is_hooked(child):
            return f"{path} has a hook"
        if is_patched(child):
            return f"{path} was given another forward"
        if child.training != module.training and not isinstance(child, nn.Linear):
            return f"{path} is not in the training mode of the module around it"
        if kind is nn.Dropout and child.training and child.p:
            return f"{path} drops with p={child.p}"
        if isinstance(child, nn.Linear) and child.bias is not None and path not in generated.biased:
            return f"{path} has a bias, and had none when sparsify_ looked"
    for path, (transposed, _, in_fp8) in generated.weights.items():
        weight = attribute(module, path)
        if is_fp8(weight) != bool(in_fp8) or (not in_fp8 and is_traceable_wrapper_subclass(weight)):
            return f"{path} became a {type(weight).__name__}: call sparsify_ again"
        if in_fp8 and (changed := _changed_in_fp8(module, path, generated, in_fp8, inputs)):
            return changed
        if weight.shape[0 if transposed else -1] % 4:
            return f"{path} now has shape {tuple(weight.shape)}"
    if inputs and inputs[0].is_cuda and not generated.config.emulate:
        path, (_, cast, _) = next(iter(generated.weights.items()))
        return cuda.why_not(inputs[0].device, _dtype(inputs[0], attribute(module, path), cast))
    return ""


def _changed_in_fp8(
    module: nn.Module, path: str, generated: _Generated, dtype: torch.dtype, inputs: list[Tensor]
) -> str:
    """torchao's tensor gives the dtype of its input, autocast or not; ours the one that it had."""
    weight = attribute(module, path)
    if not torch.compiler.is_compiling() and (reason := why_not_by_rows(weight)):
        return f"{path} is in fp8, but {reason}"
    if inputs and inputs[0].is_floating_point() and inputs[0].dtype != dtype:
        return f"the input became {inputs[0].dtype}, in fp8 it must be {dtype}"
    for name in generated.biased:
        bias = module.get_submodule(name).bias
        if bias is not None and bias.dtype != dtype:
            return f"{name}.bias became {bias.dtype}, in fp8 it must be {dtype}"
    return ""


def _dtype(x: Tensor, weight: Tensor, cast: torch.dtype | bool) -> torch.dtype:
    """In which a matmul with ``weight`` runs."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return cast if isinstance(cast, torch.dtype) else x.dtype if cast else weight.dtype


def _stays_dense(module: nn.Module, generated: _Generated, inputs: list[Tensor]) -> str:
    """Why 2:4 does not pay for these inputs; empty if it does."""
    if not inputs or inputs[0].ndim == 0:
        return ""
    device, tokens = inputs[0].device, inputs[0].numel() // inputs[0].shape[-1]
    if any(weight.in_fp8 for weight in generated.weights.values()) and _trains(module, generated, inputs):
        return INFERENCE_ONLY
    training = device.type == "cuda" and not generated.config.emulate and _trains(module, generated, inputs)
    if training and torch.compiler.is_compiling():  # before Dynamo guards on the number of tokens
        return _COMPILED_ONLY
    for path, (transposed, cast, in_fp8) in generated.weights.items():
        weight = attribute(module, path).t() if transposed else attribute(module, path)
        dtype = _dtype(inputs[0], weight, cast)
        model_dim, hidden_dim = weight.shape
        in_rows = weight.qdata.is_contiguous() if in_fp8 else weight.is_contiguous() or weight.t().is_contiguous()
        size = (tokens, model_dim, hidden_dim, in_rows, False, False)
        if reason := why_dense(device, dtype, *size, generated.config, generated.least[path]):
            return reason
    return _COMPILED_ONLY if training else ""


def _trains(module: nn.Module, generated: _Generated, inputs: list[Tensor]) -> bool:
    """Whether autograd would record the 2:4 matmuls."""
    if not torch.is_grad_enabled():
        return False
    if any(x.requires_grad for x in inputs):
        return True
    for path in generated.sources:
        source = attribute(module, path)
        tensors = source.parameters() if isinstance(source, nn.Module) else [source]
        if any(tensor is not None and tensor.requires_grad for tensor in tensors):
            return True
    return False
