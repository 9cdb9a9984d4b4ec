"""Dense first, then 2:4, perhaps dense again: training by a schedule of optimiser steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class _Phase:
    dense = False  # everything stays dense for now; one for the process, as compiled graphs are


PHASE = _Phase()


@contextmanager
def ignored() -> Iterator[None]:
    """For looking at what 2:4 does, whatever the phase."""
    was, PHASE.dense = PHASE.dense, False
    try:
        yield
    finally:
        PHASE.dense = was


class Schedule:
    """Keeps FFNs dense for the first steps of a training run, and again from some step on.

    The first steps of training need all activations (arXiv 2503.16672; 1,000 steps is what related work uses), and the
    last ones may be used to come back to a dense model (arXiv 2602.06183). ::

        model = torch.compile(model, backend="ao_act24")
        schedule = ao_act24.Schedule(model, warmup_steps=1000)
        for batch in data:
            ...
            optimizer.step()
            schedule.step()
        torch.save({..., "schedule": schedule.state_dict()}, path)

    A compiled model is compiled once for each phase, at the first call after a change; with gradient accumulation the
    phase changes between optimiser steps only. Inference is dense in a dense phase, too, and ``explain`` says so.

    There is one schedule at a time in a process. ``close`` ends it: 2:4 from then on.

    Args:
        model: what is trained. Its modules that hold layers or matrices get a forward pre-hook, which does nothing but
            make ``torch.compile`` look at the phase. (A module that is compiled by itself and has its matrices as bare
            parameters, not in layers, has no place for one, and stays in the phase in which it was compiled.)
        warmup_steps: dense optimiser steps at the start.
        dense_from: the step from which on it is dense again; None: never.

    Raises:
        ValueError: a step is negative, or ``dense_from`` comes before the warm-up ends.
        RuntimeError: another schedule is open.
    """

    def __init__(self, model: nn.Module, warmup_steps: int = 1000, dense_from: int | None = None) -> None:
        global _open
        _check_steps("warmup_steps", warmup_steps, 0)
        if dense_from is not None:
            _check_steps("dense_from", dense_from, warmup_steps)
        if _open is not None:
            raise RuntimeError("another ao_act24.Schedule is open in this process: close() it first")
        self.warmup_steps, self.dense_from, self.steps = warmup_steps, dense_from, 0
        self._hooks = [
            module.register_forward_pre_hook(look_at_the_phase)
            for module in model.modules()
            if next(module.children(), None) is not None or any(p.ndim == 2 for p in module.parameters(recurse=False))
        ]
        _open = self
        self._set_phase()

    @property
    def dense(self) -> bool:
        """Whether the next step is dense."""
        return self.steps < self.warmup_steps or (self.dense_from is not None and self.steps >= self.dense_from)

    def step(self) -> None:
        """Call it after each ``optimizer.step()``."""
        self.steps += 1
        self._set_phase()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: the steps that were taken."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; ``warmup_steps`` and ``dense_from`` are those given here."""
        _check_steps("steps", state["steps"], 0)
        self.steps = state["steps"]
        self._set_phase()

    def close(self) -> None:
        """End the schedule: 2:4 from now on, and no hooks."""
        global _open
        for hook in self._hooks:
            hook.remove()
        if _open is self:
            _open, PHASE.dense = None, False

    def _set_phase(self) -> None:
        if _open is not self:
            raise RuntimeError("this ao_act24.Schedule is closed")
        PHASE.dense = self.dense


_open: Schedule | None = None


def look_at_the_phase(module: nn.Module, args: Any) -> None:
    if PHASE.dense:  # traced by Dynamo, this is a guard: a graph of one phase is not taken in another
        return


def _check_steps(name: str, steps: object, least: int) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < least:
        raise ValueError(f"{name} must be an integer from {least} on, got {steps!r}")
