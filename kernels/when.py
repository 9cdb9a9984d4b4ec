"""Where 2:4 is faster than dense: a rule, as data, with the measurement that it comes from.

Measured on one H200 (``benchmarks/results``): with fewer tokens a dense FFN is as fast or faster, since its matmuls are
bound by reading the weights, which 2:4 activations do not make smaller.
"""

from . import cuda

MIN_TOKENS = 4096
MIN_MODEL_DIM = 1024
MIN_HIDDEN_DIM = 4096


def why_dense(device, dtype, tokens, model_dim, hidden_dim, training):  # type: ignore[no-untyped-def]  # int or SymInt
    """Why an FFN of this size runs dense; empty if its 2:4 form is faster. A size may be None: not known yet.

    Comparing a SymInt installs a guard: one model then owns a dense and a 2:4 graph.
    """
    if reason := cuda.why_not(device, dtype):
        return reason
    if training:
        return "there are no 2:4 kernels for the backward yet: training stays dense"
    for name, size, factor in (("hidden_dim", hidden_dim, 64), ("model_dim", model_dim, 8)):
        if size is not None and size % factor:
            return f"the 2:4 kernels take {name} divisible by {factor}, got {size}"
    for name, size, least in (
        ("tokens", tokens, MIN_TOKENS),
        ("model_dim", model_dim, MIN_MODEL_DIM),
        ("hidden_dim", hidden_dim, MIN_HIDDEN_DIM),
    ):
        if size is not None and size < least:
            return f"2:4 pays from {least} {name} on, got {size}: dense is faster here"
    return ""
