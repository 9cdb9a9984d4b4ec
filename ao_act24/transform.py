"""``sparsify_``: put the 2:4 form into a model's own modules, for eager use and for any compiler that comes later.

Each module that holds an FFN gets a new ``forward``, as an attribute of the instance: plain Python code made from the
rewritten graph of ``torch.fx``, which reads the module's own submodules and parameters. So ``state_dict`` keys and
parameter identities stay, ``torch.compile`` with any backend traces through it, and ``inspect.getsource(mlp.forward)``
shows what runs. Removing the attribute restores the model.

Symbolic tracing sees a module's code once. What it could get wrong is checked at each call, and where a check fails
the module's original forward runs instead, with a warning where something changed: arguments other than tensors for
exactly the required parameters, a submodule replaced or hooked since, dropout active although tracing saw it off,
a device without kernels. Forwards that set or ask for grad mode or autocast are left alone. What a forward reads from
attributes, globals and closures is read once, when ``sparsify_`` is called.
"""

import copy
import inspect
import linecache
import operator
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node, Tracer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ao_act24.config import Act24Config, checked
from ao_act24.passes import Act24Warning, Report, Verdict, rewrite_graph
from ao_act24.passes.judge import why_dense
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
    _visit(model, "", checked(config), verdicts)
    if not any(map(_is_sparsified, model.modules())):
        reasons = "; ".join(sorted({v.reason for v in verdicts})) or "no Linear→ReLU²→Linear block could be traced"
        message = f"ao_act24.sparsify_ rewrote nothing: {reasons}. ao_act24.explain(model, *inputs) lists every site."
        warnings.warn(message, Act24Warning, stacklevel=2)
    return Report(tuple(verdicts))


def unsparsify_(model: nn.Module) -> int:
    """Undo ``sparsify_`` on ``model`` and everything in it. Returns the number of modules that were restored."""
    sparsified = [module for module in model.modules() if _is_sparsified(module)]
    for module in sparsified:
        del module.forward
    return len(sparsified)


def _is_sparsified(module: nn.Module) -> bool:
    return hasattr(module.__dict__.get("forward"), "_act24_verdicts")


def _is_patched(module: nn.Module) -> bool:
    """Whether somebody else gave the instance another forward; a pickled bound method comes back as the class's own."""
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def _is_hooked(module: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


def _matrices(module: nn.Module) -> int:
    return sum(parameter.ndim == 2 for parameter in module.parameters())


def _visit(module: nn.Module, path: str, config: Act24Config, verdicts: list[Verdict]) -> None:
    """Rewrite ``module`` and everything in it, innermost first; what holds several matrices is opaque to its parent."""
    if _is_sparsified(module):
        verdicts.extend(verdict.within(path) for verdict in module.forward._act24_verdicts)  # type: ignore[attr-defined]
    for name, child in module.named_children():
        _visit(child, f"{path}.{name}".lstrip("."), config, verdicts)
    own = sum(parameter.ndim == 2 for parameter in module.parameters(recurse=False))
    own += sum(min(_matrices(child), 1) for child in module.children())  # several: say a LoRA adapter around one
    if own < 2 or _is_patched(module):
        return
    train, evaluate = (_trace(module, training) for training in (True, False))
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
        forward = _dispatcher(module, *forwards)
        forward._act24_verdicts = here  # type: ignore[attr-defined]
        module.forward = types.MethodType(forward, module)


class _Tracer(Tracer):
    """Keeps as module calls: torch's own modules, and what holds several matrices, hooks or a forward of its own."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        inside = list(module.modules())
        opaque = _matrices(module) > 1 or any(map(_is_hooked, inside)) or any(map(_is_patched, inside))
        return opaque or super().is_leaf_module(module, qualified_name)


def _trace(module: nn.Module, training: bool) -> GraphModule | None:
    """The graph of ``module``'s forward on a copy that shares its tensors; None if it cannot be traced faithfully."""
    parameters = _parameters(type(module).forward)
    if parameters is None or any(
        _reads_global_state(type(m).forward) for m in module.modules() if _is_inlined(m, module)
    ):
        return None
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    tensors = [*module.parameters(), *module.buffers()]
    try:
        root = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors}).train(training)
        before = _attributes(root)
        graph = _Tracer().trace(root, concrete_args=defaults or None)
        if _attributes(root) != before:
            return None  # forward stores something; generated code would not
        for node in reversed(graph.nodes):  # torch.fx asserts that defaults are not given; the dispatcher sees to that
            if node.target in (torch._assert, operator.eq) or getattr(node.target, "__name__", "") == "_assert_is_none":
                if not node.users:
                    graph.erase_node(node)
            elif node.op == "placeholder" and str(node.target) not in _required(parameters):
                if node.users:
                    return None
                graph.erase_node(node)
        graph_module = GraphModule(root, graph)
    except Exception:  # symbolic tracing runs the module's own code on proxies, and that may raise anything
        return None
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            node.meta["example_value"] = _attribute(root, str(node.target))
    return graph_module


def _is_inlined(part: nn.Module, module: nn.Module) -> bool:
    return part is module or not (_matrices(part) > 1 or type(part).__module__.startswith("torch.nn"))


_GLOBAL_STATE = {
    "no_grad", "enable_grad", "set_grad_enabled", "inference_mode", "autocast", "random",
    "is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "get_autocast_dtype",
}  # fmt: skip


def _reads_global_state(forward: _Forward) -> bool:
    """Whether a forward sets or asks for grad mode or autocast, draws random numbers, or is wrapped by what may.

    Symbolic tracing would run that once and leave it out of the graph.
    """
    if hasattr(forward, "__wrapped__") or not hasattr(forward, "__code__"):
        return True
    codes = [forward.__code__]
    for code in codes:
        if _GLOBAL_STATE & {*code.co_names, *code.co_freevars}:
            return True
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return False


def _attributes(root: nn.Module) -> list[object]:
    """Everything that a forward could store in its modules, as something to compare."""

    def identity(value: object) -> object:
        return [id(item) for item in value] if isinstance(value, (list, tuple, set)) else id(value)

    found: list[object] = []
    for name, module in root.named_modules():
        for key, value in vars(module).items():
            items = value.items() if isinstance(value, dict) else [("", value)]
            found.append((name, key, [(item, identity(part)) for item, part in items]))
    return found


def _attribute(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _parameters(forward: _Forward) -> list[inspect.Parameter] | None:
    """A forward's parameters but for self; None if it takes ``*args`` or ``**kwargs``."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    variable = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    return None if variable else parameters


def _required(parameters: list[inspect.Parameter]) -> list[str]:
    return [p.name for p in parameters if p.default is p.empty]


@dataclass
class _Generated:
    """A generated forward, and what must still hold when it is called."""

    run: _Forward
    inlined: list[tuple[str, type[nn.Module]]]  # submodules whose code was traced, and so is not called any more
    biased: set[str]  # the linear layers among them that have a bias
    weights: list[str]  # what sparse_mm multiplies by
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
    multiplied = [node.args[2] for node in graph.nodes if is_our_op(node, "sparse_mm")]
    weights = [str(node.target) for node in multiplied if isinstance(node, Node) and node.op == "get_attr"]
    biased = {name for name, _ in inlined if getattr(module.get_submodule(name), "bias", None) is not None}
    return _Generated(namespace["forward"], inlined, biased, weights, config)


def _dispatcher(module: nn.Module, train: _Generated | None, evaluate: _Generated | None) -> _Forward:
    """The new forward: the generated one for the module's mode if its conditions hold, else the original."""
    original = type(module).forward
    parameters = _parameters(original)
    assert parameters is not None
    positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    required = _required(parameters)
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    warned = set()

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
        if not changed:
            return generated.run(self, *inputs)
        if not torch.compiler.is_compiling() and changed not in warned:
            warned.add(changed)
            warnings.warn(f"{changed}: {type(self).__name__} runs dense", Act24Warning, stacklevel=2)
        return original(self, *args, **kwargs)

    forward.__wrapped__ = next(g.run for g in (train, evaluate) if g)  # type: ignore[attr-defined]  # for inspect.getsource
    return forward


def _changed(module: nn.Module, generated: _Generated, inputs: list[Tensor]) -> str:
    """What no longer is as it was when ``sparsify_`` looked; empty if nothing."""
    for path, kind in generated.inlined:
        child = module.get_submodule(path)
        if type(child) is not kind:
            return f"{path} was replaced after sparsify_, by a {type(child).__name__}"
        if _is_hooked(child):
            return f"{path} has a hook"
        if _is_patched(child):
            return f"{path} was given another forward"
        if child.training != module.training and not isinstance(child, nn.Linear):
            return f"{path} is not in the training mode of the module around it"
        if kind is nn.Dropout and child.training and child.p:
            return f"{path} drops with p={child.p}"
        if isinstance(child, nn.Linear) and child.bias is not None and path not in generated.biased:
            return f"{path} has a bias, and had none when sparsify_ looked"
    for path in generated.weights:
        weight = _attribute(module, path)
        if is_traceable_wrapper_subclass(weight):
            return f"{path} became a {type(weight).__name__}"
        if weight.shape[-1] % 4:
            return f"{path} now has shape {tuple(weight.shape)}"
    return why_dense(inputs[0].device, generated.config) if inputs else ""
