"""``neuron_major_``: down projections stored with a row for each neuron, so that few tokens can leave out rows."""

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ao_act24.passes.find import find_sites
from ao_act24.passes.vocabulary import known_weight
from ao_act24.trace import may_hold_ffn, trace


@torch.no_grad()
def neuron_major_(model: nn.Module) -> int:
    """Lay the weights of the down projections of Linear→ReLU²→Linear blocks in memory as ``[H, D]``, in place.

    Parameters, shapes, values and ``state_dict`` stay; only strides change, and loading a ``state_dict`` keeps them.
    Then ``torch.compile(model, backend="ao_act24")`` runs few tokens, in inference, by the rows of the neurons that
    fire alone. Many tokens run in 2:4 all the same; training on a GPU runs dense.

    Args:
        model: the model, or a part of it. Blocks that ``torch.fx`` cannot trace alone stay as they are.

    Returns:
        The number of weights that are stored so.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found: set[int] = set()
    for module in getattr(model, "_orig_mod", model).modules():
        graph_module = trace(module, False) if may_hold_ffn(module) else None
        for site in find_sites(graph_module.graph) if graph_module else ():
            if site.reason or site.down is None:
                continue
            weight, transposed = known_weight(site.down)
            if isinstance(weight, nn.Parameter) and not is_traceable_wrapper_subclass(weight):
                found.add(id(weight))
                if not transposed:
                    weight.data = weight.data.t().contiguous().t()
    return len(found)
