"""The ``torch.compile`` backend and the Inductor pass behind it.

The pass rewrites Dynamo's torch-level graph, before AOTAutograd: inference, training, frozen weights, autocast,
checkpointing and dynamic shapes then all show the same small pattern, and the operators' own gradients follow. A
rewrite of the joint or the post-grad graph meets a different pattern in each of those cases, and comes too late to
decide what is saved for backward.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from ao_act24 import notice
from ao_act24.config import Act24Config, checked
from ao_act24.fingerprint import source_digest
from ao_act24.passes import fuse, rewrite_graph
from ao_act24.phases import PHASE


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
        fuse(graph, self.config)
        gm = graph.owning_module
        if gm is not None and hasattr(gm, "compile_subgraph_reason"):  # Dynamo's own; bodies that it calls came before
            notice.watch(gm, self.config)

    def uuid(self) -> str:
        """Identifies the settings and every source file, gradients and fakes included, in torch's compile caches."""
        return f"ao_act24 {source_digest()} {self.config!r} {'dense' * PHASE.dense}"


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
        if ours := {setting.name for setting in fields(Act24Config)} & patches.keys():
            name = min(ours)
            raise ValueError(
                f"options[{name!r}] is no option of Inductor but a setting of Act24Config: "
                f"options={{'act24': Act24Config({name}={patches[name]!r})}}"
            )
        if patches.setdefault("use_pre_grad_passes", True) is False:
            if options and "use_pre_grad_passes" in options:
                raise ValueError("options['use_pre_grad_passes'] must be True, or unset: the rewrite is such a pass")
            patches["use_pre_grad_passes"] = True  # mode="lite" turns them off
        watched = notice.watch(gm, config)  # not in the pass, which does not run on a warm cache
        earlier = patches.get("pre_grad_custom_pass", inductor_config.pre_grad_custom_pass)
        rewrite = Act24Pass(config)
        if earlier:
            passes = tuple(earlier) if isinstance(earlier, (list, tuple)) else (earlier,)
            patches["pre_grad_custom_pass"] = _InTurn((*passes, rewrite))
        else:
            patches["pre_grad_custom_pass"] = rewrite
        return watched(compile_fx(gm, example_inputs, config_patches=patches))


ao_act24 = Act24Backend()
