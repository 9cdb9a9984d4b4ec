"""Dense first, then 2:4, perhaps dense again: training by a schedule of optimiser steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _Phase:
    dense = False  # everything stays dense for now; one for the process, as compiled graphs are
    scheduled = False  # there has been a schedule


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
        schedule = ao_act24.Schedule(warmup_steps=1000)
        for batch in data:
            ...
            optimizer.step()
            schedule.step()
        torch.save({..., "schedule": schedule.state_dict()}, path)

    With gradient accumulation the phase changes between optimiser steps only. When it changes, ``torch.compiler.reset``
    lets everything in the process that is compiled be compiled again at its next call (from torch's caches, where the
    phase makes no difference): once for each phase. Inference is dense in a dense phase, too, and ``explain`` says so.

    There is one schedule at a time in a process: another one takes its place. ``close`` ends it: 2:4 from then on.
    Training in 2:4 without one gives a warning, once; of a model that is sparse already, ``Schedule(0)`` says so.

    Args:
        warmup_steps: dense optimiser steps at the start.
        dense_from: the step from which on it is dense again; None: never.

    Raises:
        ValueError: a step is negative, or ``dense_from`` comes before the warm-up ends.
    """

    def __init__(self, warmup_steps: int = 1000, dense_from: int | None = None) -> None:
        global _open
        _check_steps("warmup_steps", warmup_steps, 0)
        if dense_from is not None:
            _check_steps("dense_from", dense_from, warmup_steps)
        self.warmup_steps, self.dense_from, self.steps = warmup_steps, dense_from, 0
        _open, PHASE.scheduled = self, True
        _enter(self.dense)

    @property
    def dense(self) -> bool:
        """Whether the next step is dense."""
        return self.steps < self.warmup_steps or (self.dense_from is not None and self.steps >= self.dense_from)

    def step(self) -> None:
        """Call it after each ``optimizer.step()``."""
        self._go_to(self.steps + 1)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: the steps that were taken."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; ``warmup_steps`` and ``dense_from`` are those given here."""
        _check_steps("steps", state["steps"], 0)
        self._go_to(state["steps"])

    def close(self) -> None:
        """End the schedule: 2:4 from now on."""
        global _open
        if _open is self:
            _open = None
            _enter(dense=False)

    def _go_to(self, steps: int) -> None:
        if _open is not self:
            raise RuntimeError("this ao_act24.Schedule is closed, or another one took its place in this process")
        self.steps = steps
        _enter(self.dense)


_open: Schedule | None = None


def _enter(dense: bool) -> None:
    if PHASE.dense != dense:
        PHASE.dense = dense
        torch.compiler.reset()


def _check_steps(name: str, steps: object, least: int) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < least:
        raise ValueError(f"{name} must be an integer from {least} on, got {steps!r}")
