"""Decide about a site that has the right form: do shapes, dtypes and devices allow 2:4, and is there code to run it?"""

import math
from typing import Any

import torch
from torch._subclasses.fake_tensor import maybe_get_fake_mode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ao_act24 import fp8
from ao_act24.config import Act24Config
from ao_act24.fp8 import HOW_TO_CONVERT, INFERENCE_ONLY, NOT_CONVERTED, is_fp8, why_not_by_rows
from ao_act24.ops import DTYPES
from ao_act24.when import most_few_tokens, why_dense

from .find import Site
from .fuse import packs_itself, runs_active, why_apart
from .rewrite import narrow_source
from .vocabulary import Linear, cast_dtype, depends_on_data, known_weight, same_size, submodule, value


def judge(site: Site, config: Act24Config) -> str:
    """The reason to leave ``site`` dense; empty if it is to be rewritten."""
    if site.reason or site.rewritten:
        return site.reason
    assert site.relu2 is not None and site.down is not None
    h, (weight, transposed) = value(site.relu2.h), known_weight(site.down)
    for name, tensor in (("the hidden activation", h), ("the down projection's weight", weight)):
        if tensor is not None and is_traceable_wrapper_subclass(tensor) and not is_fp8(tensor):
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
    training = h is not None and h.requires_grad
    grad = training or (out is not None and out.requires_grad)  # of the second bias alone
    in_fp8 = config.dtype == "fp8" or is_fp8(weight)
    if in_fp8 and (reason := _why_not_fp8(site, config, grad, dtypes)):
        return reason
    if not grad and not config.emulate and runs_active(site):
        site.few = True
        return ""
    in_rows, by_neurons = True, False  # converted to fp8, it will lie in rows
    if weight is not None and is_fp8(weight) == in_fp8:
        stored = weight.qdata if in_fp8 else weight
        rows = stored.t() if transposed else stored
        in_rows, by_neurons = rows.is_contiguous(), rows.t().is_contiguous()
    if in_fp8 and by_neurons and not in_rows and like.is_cuda and not config.emulate:
        most = most_few_tokens(model_dim, hidden_dim, model_dim, in_fp8)
        return f"a weight in fp8 with a row for each neuron runs by neurons: up to {most} tokens here, got {tokens}"
    if like.is_cuda and not config.emulate and depends_on_data(tokens):
        return "the number of tokens depends on data: whether 2:4 is faster is not known before"
    in_rows = in_rows or (by_neurons and not in_fp8 and not training)
    size = (tokens, model_dim, hidden_dim, in_rows, training, training or packs_itself(site))
    if reason := next(filter(None, (why_dense(like.device, dtype, *size, config) for dtype in dtypes)), ""):
        return reason
    if training and like.is_cuda and not config.emulate and (apart := why_apart(site)):
        return f"{apart}: in training only both projections in one operator are faster than dense"
    return _why_not_converted(site, config, dtypes) if in_fp8 and not is_fp8(weight) else ""


def _why_not_fp8(site: Site, config: Act24Config, grad: bool, dtypes: set[torch.dtype]) -> str:
    """``dtypes``: of the activation and of the result."""
    assert site.relu2 is not None and site.up is not None and site.down is not None
    if grad:
        return INFERENCE_ONLY
    (up, _), (down, transposed) = known_weight(site.up), known_weight(site.down)
    if transposed:
        return "a weight in fp8 must be [outputs, inputs]"
    wrong = [weight.dtype for weight in (up, down) if weight is not None and weight.dtype != torch.bfloat16]
    if wrong and not is_fp8(down):
        return f"only bfloat16 weights are converted to fp8, got {wrong[0]}"
    if others := dtypes - set(fp8.DTYPES):
        return f"fp8 takes bfloat16 and float16 activations, got {', '.join(sorted(map(str, others)))}"
    if len(dtypes) > 1 or narrow_source(site.relu2) is None:
        return "the activation is cast on its way, which fp8 does not take"
    bias = _bias(site.down)
    if bias is not None and bias.dtype not in dtypes:
        return f"the down projection's bias must have the dtype of its result, {dtypes.pop()}, got {bias.dtype}"
    if is_fp8(down):
        reason = why_not_by_rows(down)
        return reason and f"the down projection's weight is in fp8, but not as 2:4 takes it: {reason}"
    if odd := [
        size for weight in (up, down) if weight is not None for size in weight.shape if not same_size(size % 16, 0)
    ]:
        return f"only weights of sizes divisible by 16 are converted to fp8, got {odd[0]}"
    return ""


def _why_not_converted(site: Site, config: Act24Config, dtypes: set[torch.dtype]) -> str:
    """Of weights that are not in fp8 and lack nothing else. Empty if they are to be converted at each call."""
    assert site.up is not None and site.down is not None
    up, down = known_weight(site.up)[0], known_weight(site.down)[0]
    if isinstance(down, torch.Tensor) and maybe_get_fake_mode(down) is None:  # a module's own, not Dynamo's
        return NOT_CONVERTED
    if not config.emulate:
        return f"the weights are not in fp8 yet: {HOW_TO_CONVERT}"
    if any(linear.transposed or linear.weight is None for linear in (site.up, site.down)) or up is None:
        return "only weights [outputs, inputs] that the graph knows can be converted to fp8 at each call"
    if (x := value(site.up.input)) is not None and x.dtype not in dtypes:
        return f"the input must have the dtype of the result, as torchao ignores autocast, got {x.dtype}"
    return ""


def _bias(linear: Linear) -> Any:
    return submodule(linear.node).bias if linear.weight is None else value(linear.bias)


def hidden_size(site: Site):  # type: ignore[no-untyped-def]  # int, SymInt or None
    """H, from the activation or else from the down projection's weight."""
    if site.relu2 is not None and value(site.relu2.h) is not None:
        return value(site.relu2.h).shape[-1]
    weight, transposed = known_weight(site.down) if site.down else (None, False)
    return None if weight is None else weight.shape[0 if transposed else 1]
