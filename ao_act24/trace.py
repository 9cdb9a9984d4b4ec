"""A module's forward as a graph of ``torch.fx``, or nothing where the graph would not be what the code computes.

Symbolic tracing runs the module's own code once, on stand-ins for its tensors. Whatever that code decides, stores or
draws meanwhile would be frozen or lost. So a stand-in answers no question that only the real tensor could answer, and
all code that runs is watched: a module that swallows such a refusal, that stores something, draws random numbers, or
enters or asks for grad mode or autocast is not traced.
"""

import copy
import dis
import gc
import inspect
import operator
import os
import pickle
import random
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
import torchao
from torch import Tensor, nn
from torch.fx import GraphModule, Node, Proxy, Tracer
from torch.fx.proxy import Attribute, TraceError


def trace(module: nn.Module, training: bool) -> GraphModule | None:
    """The graph of ``module``'s forward on a copy that shares its tensors; None if it cannot be traced faithfully."""
    parameters = forward_parameters(type(module).forward)
    if parameters is None:
        return None
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    tensors = [*module.parameters(), *module.buffers()]
    tracer = _Tracer()
    try:
        root = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors}).train(training)
        before = _attributes(root)
        with tracer.watching():
            graph = tracer.trace(root, concrete_args=defaults or None)
        if not tracer.faithful or _attributes(root) != before:
            return None
        for node in reversed(graph.nodes):  # torch.fx asserts that defaults are not given; the dispatcher sees to that
            if node.target in (torch._assert, operator.eq) or getattr(node.target, "__name__", "") == "_assert_is_none":
                if not node.users:
                    graph.erase_node(node)
            elif node.op == "placeholder" and str(node.target) not in required_names(parameters):
                if node.users:
                    return None
                graph.erase_node(node)
        graph_module = GraphModule(root, graph)
    except Exception:  # symbolic tracing runs the module's own code on proxies, and that may raise anything
        return None
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            node.meta["example_value"] = attribute(root, str(node.target))
    return graph_module


class _Value(Proxy):
    """A proxy that does not let itself be told what it is.

    It may not pretend to be a tensor: ``torch``'s functions in C++ would believe it, and crash.
    """

    def _unknown(self, *_: object) -> Any:
        raise TraceError("symbolic tracing does not know this of a value")

    __hash__ = __repr__ = _unknown

    def __getattr__(self, name: str) -> "_Attribute":
        return _Attribute(self, name) if hasattr(Tensor, name) else self._unknown()

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Proxy:
        return Proxy.__torch_function__(*args, **kwargs)  # which asks of every argument whether it is a ``cls``


class _Attribute(_Value, Attribute):
    pass


_TORCH, _TORCHAO = (os.path.join(*package.__path__, "") for package in (torch, torchao))
_MODES = tuple(_TORCH + name + os.sep for name in ("amp", "autograd"))
_LIBRARY, _HERE = os.path.dirname(os.__file__) + os.sep, os.path.dirname(__file__) + os.sep


class _Tracer(Tracer):
    """Keeps as module calls: torch's own modules, and what holds several matrices, hooks or a forward of its own.

    ``faithful`` becomes false when the code does something that the graph does not show.
    """

    proxy_buffer_attributes = True
    faithful = True

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        inside = list(module.modules())
        opaque = matrices(module) > 1 or any(map(is_hooked, inside)) or any(map(is_patched, inside))
        return opaque or super().is_leaf_module(module, qualified_name)

    def proxy(self, node: Node) -> Proxy:
        return _Value(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if isinstance(a, Proxy) else super().create_arg(a)  # which would ask it what else it may be

    @contextmanager
    def watching(self) -> Iterator[None]:
        states, previous, collecting = _random_states(), sys.gettrace(), gc.isenabled()
        gc.disable()  # what a collection calls is not the module's doing
        sys.settrace(self._watch)
        try:
            yield
        finally:
            sys.settrace(previous)
            if collecting:
                gc.enable()
            if pickle.dumps(_random_states()) != pickle.dumps(states):
                self.faithful = False
                random.setstate(states[0])
                numpy.random.set_state(states[1])
                torch.set_rng_state(torch.from_numpy(states[2]))
                for device, state in enumerate(states[3:]):
                    torch.cuda.set_rng_state(torch.from_numpy(state), device)

    def _watch(self, frame: types.FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        """For ``sys.settrace``: sees all functions that are called, and exceptions in those that are not torch's.

        torchao's tensors run code of theirs where attributes are read."""
        file = frame.f_code.co_filename
        if event == "exception" and not issubclass(argument[0], (StopIteration, GeneratorExit)):
            self.faithful = False  # that matters where it is swallowed
        if file.startswith(_MODES):
            self.faithful = False
        if file.startswith((_TORCH, _TORCHAO, _HERE)) or (file.startswith(_LIBRARY) and "site-packages" not in file):
            return None
        if event == "call":
            frame.f_trace_lines = False
            self.faithful &= not _has_effects(frame.f_code)
        return self._watch


def _random_states() -> list[Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [random.getstate(), numpy.random.get_state(), *(s.numpy() for s in (torch.get_rng_state(), *cuda))]


_STORES = {"STORE_GLOBAL", "STORE_SUBSCR", "STORE_SLICE", "DELETE_GLOBAL", "DELETE_SUBSCR", "DELETE_ATTR"}
_QUESTIONS = {
    "is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "get_autocast_dtype",
    "type", "isinstance", "issubclass", "hasattr", "is_tensor",
}  # fmt: skip


def _has_effects(code: types.CodeType) -> bool:
    """Whether code stores anywhere but in its own variables, asks for a mode, or what a value is."""
    return any(
        step.opname in _STORES
        or (step.opname == "STORE_ATTR" and code.co_name != "__init__")  # there it is something new
        or (step.opname == "STORE_DEREF" and step.argval in code.co_freevars)
        or (step.opname != "LOAD_CONST" and step.argval in _QUESTIONS)
        for step in dis.get_instructions(code)
    )


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


def attribute(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def forward_parameters(forward: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """A forward's parameters but for self; None if it takes ``*args`` or ``**kwargs``."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    variable = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    return None if variable else parameters


def required_names(parameters: list[inspect.Parameter]) -> list[str]:
    return [p.name for p in parameters if p.default is p.empty]


def is_patched(module: nn.Module) -> bool:
    """Whether somebody else gave the instance another forward; a pickled bound method comes back as the class's own."""
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def is_hooked(module: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


def matrices(module: nn.Module) -> int:
    return sum(parameter.ndim == 2 for parameter in module.parameters())


def may_hold_ffn(module: nn.Module) -> bool:
    """Whether a module has two matrices or more, its own or of children: then its forward is looked at."""
    own = sum(parameter.ndim == 2 for parameter in module.parameters(recurse=False))
    own += sum(min(matrices(child), 1) for child in module.children())  # several: say a LoRA adapter around one
    return own >= 2 and not is_patched(module)
