"""Where 2:4 is faster than dense: a rule, as data, with the measurement that it comes from.

Dense over 2:4 time of a whole FFN, forward, bf16, ``torch.compile`` with default options, one H200: an early run of
``few_tokens`` in ``benchmarks/hopper.py``. Where launching binds, below about 0.2 ms, it scatters by a factor of two;
there the ratio is below 1 because launching 2:4 costs host time::

    D x H            T = 768   1024   1536   2048   4096
    1024 x 4096         0.48   0.46   0.49   0.48   0.58
    2048 x 8192         0.46   0.30   0.68   0.88   1.06
    4096 x 16384        0.98   1.16   1.15   1.13   1.13

Few tokens also bind both matmuls to reading the weights, which 2:4 activations do not make smaller.
"""

from . import cuda

MIN_TOKENS = 1024
MIN_PRODUCT = 2**36  # tokens * model_dim * hidden_dim: multiplications of one dense matmul


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
    if tokens is None or model_dim is None or hidden_dim is None:
        return ""
    if tokens < MIN_TOKENS:
        return f"2:4 pays from {MIN_TOKENS} tokens on, got {tokens}: dense is faster here"
    if tokens * model_dim * hidden_dim < MIN_PRODUCT:
        least = -(-MIN_PRODUCT // (model_dim * hidden_dim))
        return f"2:4 pays from {least} tokens on at this size, got {tokens}: dense is faster here"
    return ""
