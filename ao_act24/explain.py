"""What would be rewritten, what would not, and why."""

from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule

from ao_act24 import notice
from ao_act24.capture import locator, run_captured
from ao_act24.config import Act24Config, checked
from ao_act24.passes import Report, Verdict, examine


def explain(model: Callable[..., Any], *inputs: Any, config: Act24Config | None = None, **kwargs: Any) -> Report:
    """Find every FFN-like site of ``model`` and say of each whether it runs in 2:4, and if not, why.

    Runs ``model(*inputs, **kwargs)`` once through Dynamo, in the current grad, autocast and training mode, and looks
    at the graphs. The model, its buffers and the random state are as before afterwards; compile caches play no part.

    Args:
        model: a module or function; may be compiled or transformed by ``sparsify_`` already.
        inputs, kwargs: arguments that the model can run on.
        config: as for compiling.

    Returns:
        A ``Report``: prints as a table, iterates over ``Verdict``.
    """
    config = checked(config)
    verdicts: list[Verdict] = []
    graphs = 0
    ddp = False

    def look(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        nonlocal graphs, ddp
        graphs += 1
        ddp |= notice.splits_for_ddp()
        found = examine(gm, config)
        locate = locator(gm, model)
        places = set()

        def run(*args: Any) -> Any:
            here, there = locate(args)
            if there not in places:  # one graph may serve many modules, and many calls of one
                places.add(there)
                verdicts.extend(verdict.within(there, here) for verdict in found)
            return gm.forward(*args)

        return run

    run_captured(model, inputs, kwargs, look)
    notes = []
    if graphs and not verdicts:
        notes.append("No graph holds two linear layers with an activation between them.")
    if graphs == 0:
        notes.append("Dynamo captured no graph: is torch.compile disabled, or the model skipped by it?")
    if graphs > 1:
        notes.append(
            f"The model falls into {graphs} graphs (graph breaks); a block that one of them cuts cannot be rewritten. "
            'TORCH_LOGS="graph_breaks" says where they are.'
        )
    if ddp:
        notes.append(notice.DDP_NOTE)
    return Report(tuple(verdicts), tuple(notes))
