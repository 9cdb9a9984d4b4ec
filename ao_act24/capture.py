"""Run a model once through Dynamo with a backend of our own, and put the model back as it was."""

import threading
import types
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from ao_act24.passes import Verdict
from ao_act24.passes.find import Site
from ao_act24.passes.show import input_name
from ao_act24.passes.vocabulary import value

_lock = threading.RLock()  # what is lent and put back is shared by all threads


def run_captured(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], backend: Any, dynamic: bool | None = None
) -> Any:
    """``model(*args, **kwargs)`` with each graph that Dynamo makes of it given to ``backend``.

    Grad mode and training mode are the caller's. torch's random state, buffers, what modules' attributes refer to, and
    the lists, dicts and sets among these directly hold, and Dynamo's cache are put back afterwards.
    """
    if not callable(model):
        raise TypeError(f"model must be a module or function, got {model!r}")
    model = getattr(model, "_orig_mod", model)
    # Earlier calls may not count: they would make sizes dynamic, or use up the number of recompilations allowed.
    alone = {"automatic_dynamic_shapes": False, "recompile_limit": 1 << 20, "accumulated_recompile_limit": 1 << 20}
    with _lock, _unchanged(model), _unmarked((args, kwargs)), _own_cache(model), torch._dynamo.config.patch(alone):
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
    functions, seen = {_call}, set()
    for forward in forwards:
        function = forward
        while function is not None and id(function) not in seen:
            function = function.__func__ if isinstance(function, types.MethodType) else function
            seen.add(id(function))
            if isinstance(function, types.FunctionType) and not is_disabled(function):  # the code carries that mark
                functions.add(function)
            function = getattr(function, "__dict__", {}).get("__wrapped__")
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


def is_disabled(forward: Callable[..., Any]) -> bool:
    """Whether ``torch.compiler.disable`` or ``torch._dynamo.skip`` is on it."""
    return getattr(forward, "_torchdynamo_disable", False) is True


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
    attributes = [vars(module) for module in modules if not isinstance(module, torch.jit.ScriptModule)]
    containers = [*attributes, *(v for a in attributes for v in a.values() if isinstance(v, (dict, list, set)))]
    contents = [list(c.items()) if isinstance(c, dict) else list(c) for c in containers]
    tensors = list(model.buffers()) if isinstance(model, nn.Module) else []
    saved = [tensor.clone() for tensor in tensors]
    devices = {tensor.device.index for tensor in tensors if tensor.is_cuda}
    if isinstance(model, nn.Module):
        devices |= {p.device.index for p in model.parameters() if p.is_cuda}
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        for container, content in zip(containers, contents):
            if _identities(container) != _identities(dict(content) if isinstance(container, dict) else content):
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
        with torch.no_grad():
            for tensor, copy in zip(tensors, saved):
                if not torch.equal(tensor, copy):  # version counters do not tell: batch norm leaves them alone
                    tensor.copy_(copy)


def _identities(container: Collection[Any]) -> list[int]:
    return [*map(id, container), *map(id, container.values() if isinstance(container, dict) else ())]


def locator(
    gm: GraphModule, model: Any, site: Site, verdict: Verdict
) -> Callable[[tuple[Any, ...]], tuple[tuple[str, ...], Verdict]]:
    """A function that tells of a call of a Dynamo graph, by its arguments, where in ``model`` a site of it is.

    After a graph break Dynamo traces inner frames on their own, knows modules by their paths from there, and runs one
    graph for all modules of a kind. The weights that it passes in are the model's own, so their full names tell. The
    function returns the names of the site's weights, which identify it, and the verdict with the model's path, empty
    where that is not known. Call this while compiling.
    """
    model = getattr(model, "_orig_mod", model)
    is_module = isinstance(model, nn.Module)
    named = [*model.named_parameters(), *model.named_buffers()] if is_module else []
    names = {id(tensor): _plain(name) for name, tensor in named}
    paths = {_plain(name) for name, _ in model.named_modules(remove_duplicate=False)} if is_module else set()
    placeholders = enumerate(gm.graph.find_nodes(op="placeholder"))
    inputs = {id(value(node)): (index, input_name(node)) for index, node in placeholders}
    origins = [node for linear in (site.down, site.up) if linear for node in (linear.weight, linear.bias)]
    nodes = [node for node in origins if isinstance(node, Node)]
    for node in nodes:  # what they are made of
        nodes += [origin for origin in node.all_input_nodes if origin not in nodes]
    weights = [inputs[id(value(node))] for node in nodes if id(value(node)) in inputs]

    def locate(args: tuple[Any, ...]) -> tuple[tuple[str, ...], Verdict]:
        known = [(local, names[id(args[index])]) for index, local in weights if id(args[index]) in names]
        found = verdict
        if known:
            here, there = (name.split(".") for name in known[0])
            while here and there and here[-1] == there[-1]:
                here.pop()
                there.pop()
            found = verdict.within(".".join(there), ".".join(here))
        if is_module and found.path not in paths:
            found = replace(found, path="")
        return tuple(name for _, name in known), found

    return locate


def _plain(name: str) -> str:
    """Without the names of the wrappers that ``torch.compile`` puts around modules."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
