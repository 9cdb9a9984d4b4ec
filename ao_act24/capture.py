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

    Grad mode and training mode are the caller's. Random state, buffers and what modules' attributes refer to are put
    back afterwards. Not so Dynamo's cache: at a graph break, inner frames run under their own code objects and keep an
    entry for each call.
    """
    model = getattr(model, "_orig_mod", model)
    # Dynamo's cache hangs on code objects: a copy has an empty one, so every graph is captured anew.
    run = types.FunctionType(_call.__code__.replace(), _call.__globals__)
    # Nor may earlier calls count: they would make sizes dynamic, or use up the number of recompilations allowed.
    alone = {"automatic_dynamic_shapes": False, "recompile_limit": 1 << 20, "accumulated_recompile_limit": 1 << 20}
    with _unchanged(model), _unmarked((args, kwargs)), torch._dynamo.config.patch(alone):
        return torch.compile(run, backend=backend, dynamic=dynamic)(model, args, kwargs)


def _call(model: Any, args: Any, kwargs: Any) -> Any:
    return model(*args, **kwargs)


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


def module_prefix(gm: GraphModule, model: Any) -> str:
    """Where in ``model`` the module lies that a Dynamo graph calls ``self``: ``model.layers.3`` or empty.

    After a graph break Dynamo traces inner frames on their own, and knows modules by their paths from there. The
    parameters that a graph takes are the model's own, so their full names tell.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        return ""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for node in gm.graph.find_nodes(op="placeholder"):
        argument = node.meta.get("grapharg")
        name = names.get(id(getattr(argument, "example", None)), "")
        local = input_name(node)
        if name != local and name.endswith(f".{local}"):
            return name[: -len(local) - 1]
    return ""
