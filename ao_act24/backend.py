"""The ``torch.compile`` backend and the Inductor pass behind it.

The pass rewrites Dynamo's torch-level graph, before AOTAutograd: inference, training, frozen weights, autocast,
checkpointing and dynamic shapes then all show the same small pattern, and the operators' own gradients follow. A
rewrite of the joint or the post-grad graph meets a different pattern in each of those cases, and comes too late to
decide what is saved for backward.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from ao_act24.config import Act24Config, checked
from ao_act24.fingerprint import source_digest
from ao_act24.passes import Act24Warning, Verdict, examine, rewrite_graph
from ao_act24.passes.vocabulary import as_linear


@dataclass(frozen=True)
class Act24Pass(CustomGraphPass):
    """The rewrite as an Inductor pass, for those who set ``pre_grad_custom_pass`` themselves::

    torch._inductor.config.pre_grad_custom_pass = ao_act24.Act24Pass()
    torch.compile(model, options={"pre_grad_custom_pass": [my_pass, ao_act24.Act24Pass()]})   # a list: torch 2.13
    """

    config: Act24Config = field(default_factory=Act24Config)

    def __post_init__(self) -> None:
        checked(self.config)

    def __call__(self, graph: Graph) -> None:
        rewrite_graph(graph, self.config)

    def uuid(self) -> str:
        """Identifies the settings and every source file, gradients and fakes included, in torch's compile caches."""
        return f"ao_act24 {source_digest()} {self.config!r}"


@dataclass(frozen=True)
class _InTurn(CustomGraphPass):
    """Several passes in the one slot; torch 2.11 takes no list there."""

    passes: tuple[Any, ...]

    def __call__(self, graph: Graph) -> None:
        for graph_pass in self.passes:
            graph_pass(graph)

    def uuid(self) -> Any:
        uuids = tuple(p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.passes)
        return None if None in uuids else uuids


@dataclass(unsafe_hash=True)  # not frozen: registering a backend sets an attribute on it
class Act24Backend:
    """Inductor with the rewrite in front: ``torch.compile(model, backend="ao_act24")``.

    ``mode=``, ``fullgraph=``, ``dynamic=`` and Inductor's ``options=`` work as they do for Inductor, and a
    ``pre_grad_custom_pass`` already set runs first. A config goes in as ``options={"act24": config}``, or,
    beside a ``mode``, as ``backend=Act24Backend(config)``.
    """

    config: Act24Config = field(default_factory=Act24Config)

    def __post_init__(self) -> None:
        checked(self.config)

    def __call__(
        self,
        gm: GraphModule,
        example_inputs: list[Any],
        *,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> Any:
        from torch._inductor import config as inductor_config
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        patches = {**(list_mode_options(mode) if mode else {}), **(options or {})}
        config = patches.pop("act24", self.config)
        if not isinstance(config, Act24Config):
            raise TypeError(f"options['act24'] must be an Act24Config, got {config!r}")
        if patches.setdefault("use_pre_grad_passes", True) is False:
            if options and "use_pre_grad_passes" in options:
                raise ValueError("options['use_pre_grad_passes'] must be True, or unset: the rewrite is such a pass")
            patches["use_pre_grad_passes"] = True  # mode="lite" turns them off
        _say_if_nothing(gm, examine(gm, config))
        earlier = patches.get("pre_grad_custom_pass", inductor_config.pre_grad_custom_pass)
        ours = Act24Pass(config)
        if earlier:
            passes = tuple(earlier) if isinstance(earlier, (list, tuple)) else (earlier,)
            patches["pre_grad_custom_pass"] = _InTurn((*passes, ours))
        else:
            patches["pre_grad_custom_pass"] = ours
        return compile_fx(gm, example_inputs, config_patches=patches)


_said: set[str] = set()
_rewrote = False


def _say_if_nothing(gm: GraphModule, verdicts: list[Verdict]) -> None:
    """Warn, once for each cause, of a graph that should have been sped up and is not.

    This looks at the graph that Dynamo hands over rather than at what the pass did: on a warm cache the pass does not
    run.
    """
    global _rewrote
    if any(verdict.rewritten for verdict in verdicts):
        _rewrote = True
        return
    reasons = sorted({verdict.reason for verdict in verdicts})
    linears = sum(as_linear(node) is not None for node in gm.graph.nodes)
    cut = splits_for_ddp() and linears > 0
    if not reasons and not cut and (_rewrote or linears < 2):
        return  # a part of a model without an FFN, as graph breaks make them
    message = "ao_act24 rewrote nothing in a compiled graph: "
    message += (
        "; ".join(reasons) if reasons else f"none of its {linears} linear layers belong to a Linear→ReLU²→Linear block"
    )
    message += ". ao_act24.explain(model, *inputs) lists every site."
    if cut:
        message += f" {DDP_NOTE}"
    if message not in _said:
        _said.add(message)
        warnings.warn(message, Act24Warning, stacklevel=2)


DDP_NOTE = (
    "DistributedDataParallel splits graphs by gradient bucket, often between the two projections: set "
    "torch._dynamo.config.optimize_ddp = False."
)


def splits_for_ddp() -> bool:
    """Whether the model being traced is wrapped in DDP and Dynamo will cut its graph."""
    ddp = torch.nn.parallel.DistributedDataParallel
    return bool(torch._dynamo.config.optimize_ddp) and ddp._get_active_ddp_module() is not None


ao_act24 = Act24Backend()
