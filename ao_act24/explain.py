"""What would be rewritten, what would not, and why."""

from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule

from ao_act24 import backend
from ao_act24.capture import module_prefix, run_captured
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
        ddp |= backend.splits_for_ddp()
        prefix = module_prefix(gm, model)
        verdicts.extend(verdict.within(prefix) for verdict in examine(gm, config))
        return gm.forward

    run_captured(model, inputs, kwargs, look)
    notes = []
    if graphs == 0:
        notes.append("Dynamo captured no graph: is torch.compile disabled, or the model skipped by it?")
    if graphs > 1:
        notes.append(
            f"The model falls into {graphs} graphs (graph breaks); a block that one of them cuts cannot be rewritten. "
            'TORCH_LOGS="graph_breaks" says where they are. Layers that share one graph are listed once.'
        )
    if ddp:
        notes.append(backend.DDP_NOTE)
    return Report(tuple(verdicts), tuple(notes))
