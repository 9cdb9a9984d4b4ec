"""``sparsify_``: put the 2:4 form into a model's own modules, for eager use and for any compiler that comes later.

Each module that holds an FFN gets a new ``forward``, as an attribute of the instance: plain Python code made from the
rewritten graph of ``torch.fx``, which reads the module's own submodules and parameters. So ``state_dict`` keys and
parameter identities stay, ``torch.compile`` with any backend traces through it, and ``inspect.getsource(mlp.forward)``
shows what runs. Removing the attribute restores the model.

Symbolic tracing sees a module's code once. What it could get wrong is checked at each call, and where a check fails
the module's original forward runs instead, with a warning where something changed: arguments other than tensors for
exactly the required parameters, a submodule replaced or hooked since, dropout active although tracing saw it off,
another device. Numbers that a module keeps in attributes are read when ``sparsify_`` is called.
"""

import copy
import inspect
import linecache
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node, Tracer

from ao_act24.config import Act24Config
from ao_act24.passes import Act24Warning, Report, Verdict, rewrite_graph
from ao_act24.passes.vocabulary import is_our_op

_Forward = Callable[..., Any]


def sparsify_(model: nn.Module, config: Act24Config | None = None) -> Report:
    """Make the Linear→ReLU²→Linear blocks of ``model`` run in 2:4, in place.

    Needs no example inputs: it traces each module that holds two or more matrices with ``torch.fx``. Blocks that
    cannot be traced alone stay as they are; ``torch.compile(model, backend="ao_act24")`` reaches more of them. Call
    it before ``torch.compile``. ``state_dict`` keys and parameter identities do not change; ``unsparsify_`` undoes
    it. A pickled module (as opposed to its ``state_dict``) loads in dense form.

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
    _visit(model, "", config or Act24Config(), verdicts)
    report = Report(tuple(verdicts))
    if not report.rewritten:
        reasons = "; ".join(sorted({v.reason for v in verdicts})) or "no Linear→ReLU²→Linear block could be traced"
        message = f"ao_act24.sparsify_ rewrote nothing: {reasons}. ao_act24.explain(model, *inputs) lists every site."
        warnings.warn(message, Act24Warning, stacklevel=2)
    return report


def unsparsify_(model: nn.Module) -> int:
    """Undo ``sparsify_`` on ``model`` and everything in it. Returns the number of modules that were restored."""
    restored = 0
    for module in model.modules():
        if _is_sparsified(module):
            del module.forward
            restored += 1
    return restored


def _is_sparsified(module: nn.Module) -> bool:
    return hasattr(module.__dict__.get("forward"), "_act24_original")


def _visit(module: nn.Module, path: str, config: Act24Config, verdicts: list[Verdict]) -> bool:
    """Rewrite the smallest modules that hold a whole block. Returns whether one was found in ``module``."""
    if _is_sparsified(module):
        return True
    children = module.named_children()
    found = [_visit(child, f"{path}.{name}".lstrip("."), config, verdicts) for name, child in children]
    if any(found):
        return True
    matrices = sum(parameter.ndim == 2 for parameter in module.parameters())
    if matrices < 2 or "forward" in module.__dict__:
        return False
    traced = [_trace(module, training) for training in (True, False)]
    if None in traced:
        return False
    forwards, seen = [], []
    for graph_module in traced:
        assert graph_module is not None
        seen.append(rewrite_graph(graph_module.graph, config))
        rewritten = any(verdict.rewritten for verdict in seen[-1])
        forwards.append(_generate(module, path, graph_module) if rewritten else None)
    here = seen[0 if module.training else 1]
    verdicts.extend(verdict.within(path) for verdict in here)
    if any(forwards):
        module.forward = types.MethodType(_dispatcher(module, *forwards), module)
    return bool(here)


class _Tracer(Tracer):
    """Leaves linear layers, dropout and whatever holds matrices, hooks or a forward of its own as module calls."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if super().is_leaf_module(module, qualified_name):
            return True
        matrices = sum(parameter.ndim == 2 for parameter in module.parameters())
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
        return matrices > 1 or hooked or "forward" in module.__dict__


def _trace(module: nn.Module, training: bool) -> GraphModule | None:
    """The graph of ``module``'s forward on a copy that shares its tensors; None if it cannot be traced."""
    names = _required(type(module).forward)
    if names is None:
        return None
    tensors = [*module.parameters(), *module.buffers()]
    try:
        root = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors}).train(training)
        constants = {
            name: parameter.default
            for name, parameter in inspect.signature(type(root).forward).parameters.items()
            if parameter.default is not parameter.empty
        }
        attributes = set(dir(root))
        graph = _Tracer().trace(root, concrete_args=constants or None)
        for node in [node for node in graph.nodes if node.op == "placeholder" and str(node.target) not in names]:
            if node.users:
                return None
            graph.erase_node(node)
        if set(dir(root)) - attributes:
            return None  # tracing had to store a constant that the module itself does not have
        graph_module = GraphModule(root, graph)
    except Exception:  # symbolic tracing runs the module's own code on proxies, and that may raise anything
        return None
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            node.meta["example_value"] = _attribute(root, str(node.target))
    return graph_module


def _attribute(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _required(forward: _Forward) -> list[str] | None:
    """The names of a forward's parameters that have no default; None if it takes ``*args`` or ``**kwargs``."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return None
    return [p.name for p in parameters if p.default is p.empty]


@dataclass
class _Generated:
    """A generated forward, and what must still hold when it is called."""

    run: _Forward
    inlined: list[tuple[str, type[nn.Module]]]  # submodules whose code was traced, and so is not called any more
    weights: list[str]  # what sparse_mm multiplies by
    device_type: str


def _generate(module: nn.Module, path: str, graph_module: GraphModule) -> _Generated:
    graph = graph_module.graph
    graph.lint()
    code = graph.python_code(root_module="self")
    filename = f"<ao_act24 {type(module).__name__} {path} {id(module):x} {graph_module.training}>"
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(True), filename)
    namespace: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, filename, "exec"), namespace)
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    inside_called = tuple(f"{name}." for name in called)
    inlined = [
        (name, type(child))
        for name, child in module.named_modules()
        if name and name not in called and not name.startswith(inside_called)
    ]
    multiplied = [node.args[2] for node in graph.nodes if is_our_op(node, "sparse_mm")]
    weights = [str(node.target) for node in multiplied if isinstance(node, Node) and node.op == "get_attr"]
    device = next(parameter.device for parameter in module.parameters() if parameter.ndim == 2)
    return _Generated(namespace["forward"], inlined, weights, device.type)


def _dispatcher(module: nn.Module, train: _Generated | None, evaluate: _Generated | None) -> _Forward:
    """The new forward: the generated one for the module's mode if its conditions hold, else the original."""
    original = type(module).forward
    names = _required(original)
    assert names is not None
    warned = set()

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        generated = train if self.training else evaluate
        if generated is not None:
            given = (*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs))
            plain = len(given) == len(names) == len(args) + len(kwargs)
            if plain and all(isinstance(arg, Tensor) for arg in given):
                changed = _changed(self, generated, given)
                if not changed:
                    return generated.run(self, *given)
                if not torch.compiler.is_compiling() and changed not in warned:
                    warned.add(changed)
                    warnings.warn(f"{changed}: {type(self).__name__} runs dense", Act24Warning, stacklevel=2)
        return original(self, *args, **kwargs)

    forward.__wrapped__ = next(g.run for g in (train, evaluate) if g)  # type: ignore[attr-defined]  # for inspect.getsource
    forward._act24_original = original  # type: ignore[attr-defined]
    return forward


def _changed(module: nn.Module, generated: _Generated, given: tuple[Tensor, ...]) -> str:
    """What no longer is as it was when ``sparsify_`` looked; empty if nothing."""
    for path, kind in generated.inlined:
        child = module.get_submodule(path)
        if type(child) is not kind:
            return f"{path} was replaced after sparsify_, by a {type(child).__name__}"
        if child._forward_hooks or child._forward_pre_hooks:
            return f"{path} has a forward hook"
        if child.training != module.training and not isinstance(child, nn.Linear):
            return f"{path} is not in the training mode of the module around it"
        if kind is nn.Dropout and child.training and child.p:
            return f"{path} drops with p={child.p}"
    for path in generated.weights:
        weight = _attribute(module, path)
        if type(weight) not in (nn.Parameter, Tensor):
            return f"{path} became a {type(weight).__name__}"
    if given[0].device.type != generated.device_type:
        return f"the input is on {given[0].device}, and sparsify_ decided for {generated.device_type}"
    return ""
