"""Tell the user, once for each compiled model, that nothing in it was sped up; and of training without a warm-up.

Dynamo hands over one graph at a time and does not say whose it is, nor which is the last. The stack does: the call of
the compiled model is on it. A graph that is all of the model is judged at once. A part, as graph breaks make them,
waits for a later call of the model, when every other part that the first call needed has been compiled, too.
"""

import functools
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.fx import GraphModule

from ao_act24 import phases
from ao_act24.config import Act24Config
from ao_act24.passes import Act24Warning, examine, graph_modules
from ao_act24.passes.vocabulary import as_linear, value


@dataclass
class _Model:
    """What is known of one compiled model or function."""

    rewritten: bool = False
    reasons: set[str] = field(default_factory=set)
    judged: bool = False

    def judge(self, note: str) -> None:
        if self.rewritten or self.judged:
            return
        self.judged = True
        cause = "; ".join(sorted(self.reasons)) or "no linear layers in it form a Linear→ReLU²→Linear block"
        message = f"ao_act24 rewrote nothing in a compiled model: {cause}. "
        message += f"ao_act24.explain(model, *inputs) lists every site. {note}"
        warnings.warn(message.strip(), Act24Warning, stacklevel=3)


class _Call:
    """One call of a compiled model; lives as long as its frame."""


_models: WeakKeyDictionary[Any, _Model] = WeakKeyDictionary()


def watch(gm: GraphModule, config: Act24Config) -> Callable[[Any], Any]:
    """Warn if the model that ``gm``, a graph of Dynamo's, belongs to stays dense. Decorates its compiled form.

    In a dense phase: if it would stay dense after it, too. And warn when it trains in 2:4 and there was no schedule.
    """
    with phases.ignored():
        sites = examine(gm, config)
    verdicts = [verdict for _, verdict in sites]
    trains = any(verdict.rewritten and site.relu2 and value(site.relu2.h).requires_grad for site, verdict in sites)
    decorate = _when_it_trains if trains else _as_it_is
    model, call, outermost = _being_compiled()
    model.rewritten |= any(verdict.rewritten for verdict in verdicts)
    model.reasons |= {verdict.reason for verdict in verdicts}
    linears = sum(as_linear(node) is not None for module in graph_modules(gm) for node in module.graph.nodes)
    note = DDP_NOTE if splits_for_ddp() else ""
    reason = getattr(gm, "compile_subgraph_reason", None)
    whole = outermost and reason is not None and not reason.graph_break
    if whole and (verdicts or linears > 1):
        model.judge(note)
    if whole or not (verdicts or linears):
        return decorate
    return lambda compiled: _at_a_later_call(model, call, note, decorate(compiled))


def _as_it_is(compiled: Any) -> Any:
    return compiled


def _at_a_later_call(model: _Model, call: ref[_Call], note: str, compiled: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(compiled)
    def run(*args: Any) -> Any:
        if call() is None:
            model.judge(note)
        return compiled(*args)

    return run


def _when_it_trains(compiled: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(compiled)
    def run(*args: Any) -> Any:
        out = compiled(*args)
        if not phases.PHASE.scheduled:
            for each in out:
                if isinstance(each, Tensor) and each.requires_grad:
                    each.register_hook(_unscheduled)
        return out

    return run


def _unscheduled(gradient: Tensor) -> None:
    if not phases.PHASE.scheduled:
        phases.PHASE.scheduled = True  # said once
        warnings.warn(UNSCHEDULED, Act24Warning, stacklevel=2)


UNSCHEDULED = (
    "A model trains in 2:4, and there is no ao_act24.Schedule. A new model needs dense steps first, until most of its "
    "activations are zero, or it learns less: schedule = ao_act24.Schedule(warmup_steps=1000), and schedule.step() "
    "after each optimizer.step(). Of a model that is sparse already, ao_act24.Schedule(0) says so."
)


def _being_compiled() -> tuple[_Model, ref[_Call], bool]:
    """The compiled model and its call on the stack, and whether its own code is being compiled, not a part's."""
    outermost = True
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        name = str(frame.f_globals.get("__name__"))
        if name == "torch._dynamo.eval_frame" and frame.f_code.co_name == "compile_wrapper":
            model = _models.setdefault(frame.f_locals["self"], _Model())  # one context for each torch.compile
            call = frame.f_locals.setdefault("_ao_act24_call", _Call())  # a frame keeps what is no variable of it
            return model, ref(call), outermost
        ours = name.startswith(("ao_act24.", "torch._", "torch.fx.")) or name in ("torch", "torch.nn.modules.module")
        outermost = outermost and ours
    return _Model(), ref(_Call()), False


DDP_NOTE = (
    "DistributedDataParallel splits graphs by gradient bucket, often between the two projections: set "
    "torch._dynamo.config.optimize_ddp = False."
)


def splits_for_ddp() -> bool:
    """Whether the model being traced is wrapped in DDP and Dynamo will cut its graph."""
    ddp = torch.nn.parallel.DistributedDataParallel
    return bool(torch._dynamo.config.optimize_ddp) and ddp._get_active_ddp_module() is not None
