"""Decide about a site that has the right form: do shapes, dtypes and devices allow 2:4, and is there code to run it?"""

import math
from typing import Any

from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ao_act24.config import Act24Config
from ao_act24.ops import DTYPES
from ao_act24.when import why_dense

from .find import Site
from .fuse import packs_itself, why_apart
from .rewrite import narrow_source
from .vocabulary import cast_dtype, same_size, submodule, value, weight_origin


def judge(site: Site, config: Act24Config) -> str:
    """The reason to leave ``site`` dense; empty if it is to be rewritten."""
    if site.reason or site.rewritten:
        return site.reason
    assert site.relu2 is not None and site.down is not None
    h, (weight, transposed) = value(site.relu2.h), down_weight(site)
    for name, tensor in (("the hidden activation", h), ("the down projection's weight", weight)):
        if tensor is not None and is_traceable_wrapper_subclass(tensor):
            return f"{name} is a {type(tensor).__name__}: 2:4 works on plain tensors only"
    bias = value(site.down.bias)
    if weight is not None and weight.ndim != 2:
        return f"the down projection's weight must be a matrix, got shape {tuple(weight.shape)}"
    if bias is not None and weight is not None and site.down.weight is not None:
        outputs = weight.shape[1 if transposed else 0]
        if bias.ndim != 1 or not same_size(bias.shape[0], outputs):
            return f"the down projection's bias must have shape ({outputs},), got {tuple(bias.shape)}"
    hidden_dim = hidden_size(site)
    if hidden_dim is None:
        return "the hidden size is not known from the graph"
    if not same_size(hidden_dim % 4, 0):
        return f"the hidden size must be divisible by 4, got {hidden_dim}"
    like = h if h is not None else weight
    if like is None:
        return "the dtype is not known from the graph"
    steps = site.relu2.before_square + site.relu2.after_square
    casts = [cast_dtype(step.node) for step in steps if step.kind == "cast"]
    if any(dtype not in DTYPES for dtype in casts):
        return f"the activation is cast to {next(dtype for dtype in casts if dtype not in DTYPES)} on its way"
    if like.dtype not in DTYPES:
        return f"the activation must have dtype bfloat16, float16, float32 or float64, got {like.dtype}"
    out = value(site.down.node)
    narrow = narrow_source(site.relu2)
    dtypes = {like.dtype if narrow is None or h is None else value(narrow).dtype}
    dtypes |= set() if out is None else {out.dtype}
    tokens = None if out is None else math.prod(out.shape[:-1])
    model_dim = None if weight is None else weight.shape[1 if transposed else 0]
    in_rows = weight is None or (weight.t() if transposed else weight).is_contiguous()
    training = h is not None and h.requires_grad
    size = (tokens, model_dim, hidden_dim, in_rows, training, training or packs_itself(site))
    if reason := next(filter(None, (why_dense(like.device, dtype, *size, config) for dtype in dtypes)), ""):
        return reason
    if training and like.is_cuda and not config.emulate and (apart := why_apart(site)):
        return f"{apart}: in training only both projections in one operator are faster than dense"
    return ""


def down_weight(site: Site) -> tuple[Any, bool]:
    """The down projection's weight as the graph knows it (fake, real, or None), and whether it is ``[H, D]``."""
    assert site.down is not None
    if site.down.node.op == "call_module":
        return submodule(site.down.node).weight, False
    assert site.down.weight is not None
    origin = weight_origin(site.down.weight)
    return value(origin.node), origin.transposed != site.down.transposed


def hidden_size(site: Site):  # type: ignore[no-untyped-def]  # int, SymInt or None
    """H, from the activation or else from the down projection's weight."""
    if site.relu2 is not None and value(site.relu2.h) is not None:
        return value(site.relu2.h).shape[-1]
    weight, transposed = down_weight(site) if site.down else (None, False)
    return None if weight is None else weight.shape[0 if transposed else 1]
