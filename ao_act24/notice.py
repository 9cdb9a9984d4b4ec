"""Tell the user, once for each compiled model and cause, that nothing in it was sped up.

Dynamo hands over one graph at a time and does not say whose it is, nor which is the last. The stack does: the call of
the compiled model is on it. A graph that is all of the model is judged at once. Of a part, as graph breaks make them,
only what is wrong with its own FFN-like sites is said at once; that it has none is said when it runs a second time, if
by then nothing in the model was rewritten.
"""

import functools
import itertools
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.fx import GraphModule

from ao_act24.passes import Act24Warning, Verdict, graph_modules
from ao_act24.passes.vocabulary import as_linear


@dataclass
class _Model:
    """What is known of one compiled model or function."""

    rewritten: bool = False
    said: set[str] = field(default_factory=set)

    def say(self, cause: str, note: str) -> None:
        if cause not in self.said:
            self.said.add(cause)
            message = f"ao_act24 rewrote nothing in a compiled graph: {cause}. "
            message += f"ao_act24.explain(model, *inputs) lists every site. {note}"
            warnings.warn(message.strip(), Act24Warning, stacklevel=3)


_models: WeakKeyDictionary[Any, _Model] = WeakKeyDictionary()
_unknown = _Model()


def watch(gm: GraphModule, verdicts: list[Verdict]) -> Callable[[Any], Any]:
    """Warn if ``gm``, a graph of Dynamo's, stays dense. Returns a decorator for its compiled form."""
    model, outermost = _being_compiled()
    model.rewritten |= any(verdict.rewritten for verdict in verdicts)
    linears = sum(as_linear(node) is not None for module in graph_modules(gm) for node in module.graph.nodes)
    split = splits_for_ddp() and linears > 0
    note = DDP_NOTE if split else ""
    if any(verdict.rewritten for verdict in verdicts):
        return _as_it_is
    if verdicts:
        model.say("; ".join(sorted({verdict.reason for verdict in verdicts})), note)
        return _as_it_is
    cause = f"none of its {linears} linear layers belong to a Linear→ReLU²→Linear block"
    reason = getattr(gm, "compile_subgraph_reason", None)
    whole = outermost and reason is not None and not reason.graph_break
    if split or (whole and linears > 1 and not model.rewritten):
        model.say(cause, note)
    if whole or not linears:
        return _as_it_is
    return functools.partial(_at_second_run, model, cause, note)


def _as_it_is(compiled: Any) -> Any:
    return compiled


def _at_second_run(model: _Model, cause: str, note: str, compiled: Callable[..., Any]) -> Callable[..., Any]:
    runs = itertools.count(1)

    @functools.wraps(compiled)
    def run(*args: Any) -> Any:
        if next(runs) == 2 and not model.rewritten:
            model.say(cause, note)
        return compiled(*args)

    return run


def _being_compiled() -> tuple[_Model, bool]:
    """The compiled model whose call is on the stack, and whether its own code is being compiled, not a part's."""
    outermost = True
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        name = str(frame.f_globals.get("__name__"))
        if name == "torch._dynamo.eval_frame" and frame.f_code.co_name == "compile_wrapper":
            call = frame.f_locals.get("fn")
            return _models.setdefault(getattr(call, "__self__", call), _Model()), outermost
        ours = name.startswith(("ao_act24.", "torch._")) or name in ("torch", "torch.nn.modules.module")
        outermost = outermost and ours
    return _unknown, False


DDP_NOTE = (
    "DistributedDataParallel splits graphs by gradient bucket, often between the two projections: set "
    "torch._dynamo.config.optimize_ddp = False."
)


def splits_for_ddp() -> bool:
    """Whether the model being traced is wrapped in DDP and Dynamo will cut its graph."""
    ddp = torch.nn.parallel.DistributedDataParallel
    return bool(torch._dynamo.config.optimize_ddp) and ddp._get_active_ddp_module() is not None
