"""Where 2:4 is faster than dense: a rule, as data, with the measurement that it comes from.

Dense over 2:4 time of a whole FFN, forward, bf16, ``torch.compile`` with default options, both in a CUDA graph, one
H200, ``python benchmarks/hopper.py --only tokens`` (``benchmarks/results/hopper.json``)::

    D x H            T = 128    512   1024   1536   2048   4096
    768 x 3072          0.48   0.63   0.80   0.94   1.00   1.27    14563: 1.41
    1024 x 4096         0.48   0.74   0.86   0.98   1.08   1.23     8192: 1.23
    2048 x 8192         0.49   0.80   1.06   1.15   1.22   1.23     2176: 1.17
    3584 x 14336                                                     1552: 1.12
    4096 x 16384        0.66   1.05   1.22   1.26   1.22   1.27     1152: 1.12
    4608 x 18432                                                     1168: 1.15
    8192 x 32768        0.81   1.21   1.22   1.26   1.25   1.26

The rule starts at 14564, 8192, 2048 and, from 3584 x 14336 on, 1024 tokens. The sizes to the right are uneven by
``kernels/schedule.py``, but not the most uneven: by its count clusters wait longer at 1049 x 3328 x 13312 and at
1079 x 2304 x 13824, which are not measured. Nor is hidden_dim other than four times model_dim; nor fp16, which takes
the same instructions; nor other Hopper cards, which have less power or memory bandwidth for dense and 2:4 alike.

Called one by one, without a graph, 2:4 is no slower at the small sizes either: launching binds, and takes less time.
Few tokens also bind both matmuls to reading the weights, which 2:4 activations do not make smaller.
"""

from ao_act24.kernels import cuda
from ao_act24.kernels.schedule import TILE_COLUMNS
from ao_act24.phases import PHASE

MIN_TOKENS = 1024
MIN_PRODUCT = 2**35  # tokens * model_dim * hidden_dim: multiplications of one dense matmul
MIN_DIM = 768  # of both: smaller ones were not measured; at few columns a tile's end is as long as its stages
MAX_PADDING = 1.05  # of a weight, both ways to whole tiles; not measured: small against what 2:4 gains


def why_dense(device, dtype, tokens, model_dim, hidden_dim, in_rows, training, config) -> str:  # type: ignore[no-untyped-def]
    """Why an FFN of this size stays dense; empty if it runs in 2:4. A size (int or SymInt) may be None: not known yet.

    ``in_rows``: the down projection's weight lies in memory as ``[model_dim, hidden_dim]``, row after row.

    The CPU always runs the reference; so does all with ``emulate``. Comparing a SymInt installs a guard: one model then
    owns a dense and a 2:4 graph.
    """
    if PHASE.dense:
        return "the schedule has a dense phase now"
    if device.type in ("cpu", "meta") or config.emulate:
        return ""
    reason = cuda.why_not(device, dtype) or _why_slower(tokens, model_dim, hidden_dim, in_rows, training)
    return reason and f"{reason} (Act24Config(emulate=True) runs 2:4 all the same)"


def why_not_fused(device, dtype, model_dim, hidden_dim) -> str:  # type: ignore[no-untyped-def]
    """Why the first matmul does not pack its own result; empty if it does: faster at any size where 2:4 pays."""
    for name, size, factor in (("model_dim", model_dim, 8), ("hidden_dim", hidden_dim, 64)):
        if size % factor:
            return f"the fused first matmul takes {name} divisible by {factor}, got {size}"
    return cuda.why_not(device, dtype)


def _why_slower(tokens, model_dim, hidden_dim, in_rows, training) -> str:  # type: ignore[no-untyped-def]
    if training:
        return "2:4 is not fast enough in training yet: training stays dense"
    for name, size, factor in (("hidden_dim", hidden_dim, 64), ("model_dim", model_dim, 64)):
        if size is not None and size % factor:
            return f"the 2:4 kernels take {name} divisible by {factor}, got {size}"
    if not in_rows:
        return "the down projection's weight is stored [hidden_dim, model_dim]: 2:4 would copy it at each call"
    if model_dim is not None and hidden_dim is not None:
        padded = [-(-size // TILE_COLUMNS) * TILE_COLUMNS for size in (model_dim, hidden_dim)]
        if padded[0] * padded[1] > MAX_PADDING * model_dim * hidden_dim:
            return f"the 2:4 kernels would pad a {model_dim} x {hidden_dim} weight to {padded[0]} x {padded[1]}"
        if min(model_dim, hidden_dim) < MIN_DIM:
            return f"2:4 pays from model_dim and hidden_dim {MIN_DIM} on, got {model_dim} and {hidden_dim}"
    if tokens is None or model_dim is None or hidden_dim is None:
        return ""
    if tokens < MIN_TOKENS:
        return f"2:4 pays from {MIN_TOKENS} tokens on, got {tokens}: dense is faster here"
    if tokens * model_dim * hidden_dim < MIN_PRODUCT:
        least = -(-MIN_PRODUCT // (model_dim * hidden_dim))
        return f"2:4 pays from {least} tokens on at this size, got {tokens}: dense is faster here"
    return ""
