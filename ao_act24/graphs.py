"""The graphs of a model before and after the rewrite, as text: to read, to save, to pin in a test."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ao_act24.capture import run_captured
from ao_act24.config import Act24Config, checked
from ao_act24.passes import fuse, graph_modules, rewrite_graph
from ao_act24.passes.show import format_graph, input_name
from ao_act24.passes.vocabulary import value


@dataclass(frozen=True)
class CapturedGraphs:
    """Text of every graph of a model; each tuple has an entry a graph, in order of execution. Prints as a whole.

    Attributes:
        before: Dynamo's torch-level graphs.
        after: the same, rewritten.
        forward: what AOTAutograd makes of them, in ATen operations.
        backward: the backward graphs; empty where nothing needs a gradient.
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    forward: tuple[str, ...]
    backward: tuple[str, ...]

    def __str__(self) -> str:
        stages = (self.before, self.after, self.forward, self.backward)
        return "\n\n".join(text for stage in stages for text in stage)

    def save(self, directory: str | Path) -> list[Path]:
        """Write a file for each graph, ``before_0.txt`` and so on, into ``directory``, and return their paths."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        paths = []
        for stage in ("before", "after", "forward", "backward"):
            for number, text in enumerate(getattr(self, stage)):
                paths.append(directory / f"{stage}_{number}.txt")
                paths[-1].write_text(text + "\n")
        return paths


def _inner_names(node: Node) -> list[str]:
    """What AOTAutograd makes of an input: of a tensor subclass, such as torchao's, each tensor in it."""
    name, tensor = input_name(node), value(node)
    if not is_traceable_wrapper_subclass(tensor):
        return [name]
    return [f"{name}.{inner}" for inner in tensor.__tensor_flatten__()[0]]


def capture_graphs(
    model: Callable[..., Any],
    /,
    *inputs: Any,
    config: Act24Config | None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> CapturedGraphs:
    """Run ``model(*inputs, **kwargs)`` once and return its graphs, before and after the rewrite.

    Forward and backward are split as Inductor does it, so what is saved for backward is what a compiled model saves;
    the backward is traced, not run. The model stays as it was. For a snapshot test::

        self.assertExpectedInline(capture_graphs(mlp, x).after[0], \"\"\"…\"\"\")

    Args:
        model: a module or function.
        inputs, kwargs: arguments that it can run on; the current grad, autocast and training mode count.
        config: as for compiling; like ``dynamic``, never passed to the model.
        dynamic: as for ``torch.compile``.
    """
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    before: list[str] = []
    after: list[str] = []
    forward: list[str] = []
    backward: list[str] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        placeholders = gm.graph.find_nodes(op="placeholder")
        inputs = [name for node in placeholders for name in _inner_names(node)]
        names = {f"primals_{number}": name for number, name in enumerate(inputs, 1)}
        before.append(format_graph(gm, "before"))
        for module in graph_modules(gm):
            rewrite_graph(module.graph, checked(config))
            fuse(module.graph, checked(config))
            module.recompile()
        after.append(format_graph(gm, "after"))

        def partition(*args: Any, **kwargs: Any) -> tuple[GraphModule, GraphModule]:
            forward_graph, backward_graph = min_cut_rematerialization_partition(*args, **kwargs)
            forward.append(format_graph(forward_graph, "forward", names))
            backward.append(format_graph(backward_graph, "backward", names))
            return forward_graph, backward_graph

        def inference(graph: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            arguments = [node.name for node in graph.graph.find_nodes(op="placeholder")]
            forward.append(format_graph(graph, "forward", dict(zip(arguments, names.values()))))
            return make_boxed_func(graph.forward)

        def compiled(graph: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            return make_boxed_func(graph.forward)

        stages = {"fw_compiler": compiled, "bw_compiler": compiled, "inference_compiler": inference}
        return aot_autograd(**stages, partition_fn=partition)(gm, example_inputs)

    run_captured(model, inputs, kwargs, backend, dynamic=dynamic)
    return CapturedGraphs(tuple(before), tuple(after), tuple(forward), tuple(backward))
