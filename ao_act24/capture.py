"""Run a model once through Dynamo with a backend of our own, and put the model back as it was."""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from ao_act24.passes.show import input_name


def run_captured(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], backend: Any, dynamic: bool | None = None
) -> Any:
    """``model(*args, **kwargs)`` with each graph that Dynamo makes of it given to ``backend``.

    Grad mode and training mode are the caller's. Random state, buffers, what modules' attributes refer to and Dynamo's
    cache are put back afterwards.
    """
    if not callable(model):
        raise TypeError(f"model must be a module or function, got {model!r}")
    model = getattr(model, "_orig_mod", model)
    # Earlier calls may not count: they would make sizes dynamic, or use up the number of recompilations allowed.
    alone = {"automatic_dynamic_shapes": False, "recompile_limit": 1 << 20, "accumulated_recompile_limit": 1 << 20}
    with _unchanged(model), _unmarked((args, kwargs)), _own_cache(model), torch._dynamo.config.patch(alone):
        return torch.compile(_call, backend=backend, dynamic=dynamic)(model, args, kwargs)


def _call(model: Any, args: Any, kwargs: Any) -> Any:
    return model(*args, **kwargs)


@contextmanager
def _own_cache(model: Any) -> Iterator[None]:
    """Dynamo's cache hangs on code objects. Copies of them have an empty one, which goes with them.

    Where the graph breaks, Dynamo compiles inner frames under their own code objects, so every forward gets a copy. A
    function that only a forward's code can name keeps its own; what Dynamo cached for it is forgotten in the end, and
    made anew when next needed.
    """
    forwards = [module.forward for module in model.modules()] if isinstance(model, nn.Module) else [model]
    functions = {_call}
    for forward in forwards:
        while forward is not None:
            function = getattr(forward, "__func__", forward)
            functions |= {function} if isinstance(function, types.FunctionType) else set()
            forward = getattr(function, "__wrapped__", None)
    codes = [(function, function.__code__) for function in functions]
    compiled: list[types.CodeType] = []
    hook = torch._dynamo.convert_frame.register_bytecode_hook(lambda code, _: compiled.append(code))
    for function, code in codes:
        function.__code__ = code.replace()
    try:
        yield
    finally:
        hook.remove()
        for function, code in codes:
            function.__code__ = code
        for code in compiled:
            torch._C._dynamo.eval_frame.reset_code(code)


@contextmanager
def _unmarked(inputs: Any) -> Iterator[None]:
    """Compiling with ``dynamic=True`` marks the tensors that it sees, which would make their sizes symbolic here."""
    mark = "_dynamo_propagated_dynamic_indices"
    marked = [leaf for leaf in tree_leaves(inputs) if mark in getattr(leaf, "__dict__", {})]
    saved = [leaf.__dict__.pop(mark) for leaf in marked]
    try:
        yield
    finally:
        for leaf, value in zip(marked, saved):
            setattr(leaf, mark, value)


@contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    attributes = [(dict(vars(module)), dict(module._buffers)) for module in modules]
    tensors = list(model.buffers()) if isinstance(model, nn.Module) else []
    saved = [tensor.clone() for tensor in tensors]
    devices = {tensor.device.index for tensor in tensors if tensor.is_cuda}
    if isinstance(model, nn.Module):
        devices |= {p.device.index for p in model.parameters() if p.is_cuda}
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        for module, saved_attributes in zip(modules, attributes):
            for current, before in zip((vars(module), module._buffers), saved_attributes):
                for name in [name for name in current if name not in before]:
                    del current[name]
                current.update({name: value for name, value in before.items() if current.get(name) is not value})
        with torch.no_grad():
            for tensor, copy in zip(tensors, saved):
                if not torch.equal(tensor, copy):  # version counters do not tell: batch norm leaves them alone
                    tensor.copy_(copy)


def locator(gm: GraphModule, model: Any) -> Callable[[tuple[Any, ...]], tuple[str, str]]:
    """A function that tells of a call of a Dynamo graph, by its arguments, where in ``model`` that is.

    After a graph break Dynamo traces inner frames on their own, knows modules by their paths from there, and runs one
    graph for all modules of a kind. The parameters that it passes in are the model's own, so their full names tell.
    The function returns the graph's own path for some module, and the model's path for it; call this while compiling.
    """
    model = getattr(model, "_orig_mod", model)
    parameters = model.named_parameters() if isinstance(model, nn.Module) else ()
    names = {id(parameter): name for name, parameter in parameters}
    inputs = [input_name(node) for node in gm.graph.find_nodes(op="placeholder")]

    def locate(args: tuple[Any, ...]) -> tuple[str, str]:
        for local, argument in zip(inputs, args):
            if id(argument) in names:
                here, there = local.split("."), names[id(argument)].split(".")
                while here and there and here[-1] == there[-1]:
                    here.pop()
                    there.pop()
                return ".".join(here), ".".join(there)
        return "", ""

    return locate
