"""What would be rewritten, what would not, and why."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn
from torch.fx import GraphModule

from ao_act24 import notice, phases
from ao_act24.capture import is_disabled, locator, run_captured
from ao_act24.config import Act24Config, checked
from ao_act24.passes import Report, Verdict, examine
from ao_act24.passes.find import Site
from ao_act24.passes.fuse import packs_itself, why_apart
from ao_act24.passes.vocabulary import value
from ao_act24.transform import is_sparsified
from ao_act24.when import where_dynamic, why_exact_grads


def explain(model: Callable[..., Any], /, *inputs: Any, config: Act24Config | None = None, **kwargs: Any) -> Report:
    """Find every FFN-like site of ``model`` and say of each whether it runs in 2:4, and if not, why.

    Runs ``model(*inputs, **kwargs)`` once through Dynamo, in the current grad, autocast and training mode, and looks
    at the graphs. Afterwards the model, its buffers and torch's random state are as before. Compile caches play
    no part. In a dense phase of a ``Schedule`` it says what comes after that, and notes the phase.

    Args:
        model: a module or function; may be compiled or transformed by ``sparsify_`` already.
        inputs, kwargs: arguments that the model can run on.
        config: as for compiling; never passed to the model.

    Returns:
        A ``Report``: prints as a table, iterates over ``Verdict``.
    """
    config = checked(config)
    verdicts: list[Verdict] = []
    graphs = 0
    ddp = trains_on_gpu = False

    def look(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        nonlocal graphs, ddp, trains_on_gpu
        graphs += 1
        ddp |= notice.splits_for_ddp()
        sites = examine(gm, config)
        trains_on_gpu |= any(verdict.rewritten and _trains_on_gpu(site) for site, verdict in sites)
        remarked = ((site, replace(v, remark=_remark(site, config) if v.rewritten else "")) for site, v in sites)
        locators = [locator(gm, model, site, verdict) for site, verdict in remarked]
        places = set()

        def run(*args: Any) -> Any:
            for number, locate in enumerate(locators):
                weights, verdict = locate(args)
                if (number, weights) not in places:  # one graph may serve many modules, and many calls of one
                    places.add((number, weights))
                    verdicts.append(verdict)
            return gm.forward(*args)

        return run

    with phases.ignored():
        run_captured(model, inputs, kwargs, look)
    notes = ["The schedule has a dense phase now: all of it runs dense until that ends."] if phases.PHASE.dense else []
    if graphs and not verdicts:
        notes.append("No graph holds two linear layers with an activation between them.")
    if graphs == 0:
        notes.append("Dynamo captured no graph: is torch.compile disabled, or the model skipped by it?")
    if graphs > 1:
        notes.append(
            f"The model falls into {graphs} graphs (graph breaks); a block that one of them cuts cannot be rewritten. "
            'TORCH_LOGS="graph_breaks" says where they are.'
        )
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    if disabled := [path or "the model" for path, module in modules.items() if is_disabled(module.forward)]:
        notes.append(f"torch.compiler.disable hides code from Dynamo, and so from this report: {', '.join(disabled)}.")
    if ddp:
        notes.append(notice.DDP_NOTE)
    if trains_on_gpu and any(map(is_sparsified, modules.values())):
        notes.append(
            "What sparsify_ has rewritten trains dense on a GPU by itself: this report holds with "
            'torch.compile(model, backend="ao_act24").'
        )
    return Report(tuple(verdicts), tuple(notes))


def _remark(site: Site, config: Act24Config) -> str:
    """What the verdict on a site that runs in 2:4 does not say."""
    h, out = (value(node) for node in (site.relu2 and site.relu2.h, site.down and site.down.node))
    if site.few:
        return "few tokens: exactly, by the neurons that fire alone"
    if site.rewritten or h is None or out is None:
        return ""
    *tokens, model_dim = out.shape
    size = (h.device, math.prod(tokens), model_dim, h.shape[-1])
    remarks = [where_dynamic(*size, h.requires_grad, h.requires_grad or packs_itself(site), config)]
    if h.requires_grad and config.weight_grads == "sparse":
        why_exact = why_apart(site) or why_exact_grads(*size, config)
        remarks.append(f"gradients of weights are {f'exact: {why_exact}' if why_exact else 'sparse'}")
    return "; ".join(filter(None, remarks))


def _trains_on_gpu(site: Site) -> bool:
    """Whether the graph, in which a site may be rewritten, keeps it for a backward on a GPU."""
    h = value(site.relu2.h) if site.relu2 and not site.rewritten else None
    return h is not None and h.device.type == "cuda" and h.requires_grad
