"""Where 2:4 is faster than dense: a rule, as data, with the measurement that it comes from.

Tiles are of a fixed size, and where they do not come out even, some multiprocessors wait: ``waste`` counts how much
longer than if all worked alike (``kernels/schedule.py``). Dense over 2:4 time of a whole FFN, forward, by
``torch.compile`` (the faster of its modes where marked +), all in CUDA graphs, 90 % zeros, one H200::

    T x D x H                   waste  dense / 2:4  both multiplied
    8192 x 4096 x 16384          1.03         1.24     1.28    +  97 % zeros: 1.21   in two steps: 1.17
    4096 x 8192 x 32768          1.04         1.26     1.31
    8192 x 4096 x  4096          1.05         1.20     1.26
    8192 x 2048 x  2048          1.05         1.22     1.28
    4096 x 2048 x  8192          1.07         1.19     1.27    +                     in two steps: 1.13
    1024 x 4096 x 16384          1.07         1.15     1.23    +
     512 x 8192 x 32768          1.11         1.14     1.27    +
    1152 x 4096 x 16384          1.15         1.15     1.32    +                     in two steps: 1.10
    1552 x 3584 x 14336          1.17         1.09     1.27    +
    1168 x 4608 x 18432          1.21         1.18     1.42    +  fp16: 1.17
     848 x 8192 x 32768          1.22         1.06     1.29
    1376 x 3328 x 13312          1.22         1.05     1.28       97 % zeros: 1.04
    1680 x 4096 x  8192          1.22         1.10     1.34       97 % zeros: 1.09
    2736 x 2304 x 13824          1.22         1.06     1.29       97 % zeros: 1.05
    1488 x 2048 x  8192          1.22         1.13     1.38    +  fp16: 1.13
    8512 x  768 x  3072          1.22         1.23     1.50    +
    1024 x 2048 x  8192          1.22         1.02     1.25       1.225: not taken
    2048 x 1024 x  4096          1.22         0.99     1.21       1.225: not taken
    1648 x 2560 x 10240          1.25         0.99     1.23
     640 x 5120 x 20480          1.43         0.96     1.38    +
    1049 x 3328 x 13312          1.49         0.85     1.27
     512 x 2048 x  8192          1.71         0.88     1.50
    8192 x 1024 x  1024          1.11         1.11     1.23       short K: not taken
    8192 x 4096 x  1024          1.09         1.10     1.20       short K: not taken

Multiplied, they are 1.20 and more: so 2:4 runs where ``waste`` is up to 1.22. From ``least_tokens`` on it is, for any
number of tokens; below, for some. (``benchmarks/results/hopper.json``, with more sizes: ``python benchmarks/hopper.py
--only tokens rule outside``; a test holds the rule to it.)

Where the first matmul does not pack its own result ("in two steps"), only the second is ours, and its waste alone is
asked. GPUs of another number of multiprocessors and model_dim below 768 were not measured: dense. fp8 goes by the same
rule, which leaves it more: 1.19 to 1.52 where waste is 1.07 to 1.22; in two steps 1.13 to 1.26, where that of the
second matmul alone is 1.11 to 1.53 (``--only rule-fp8``, six sizes). Not measured at its edges: weights that have a row
for each neuron.

Few tokens of such weights, by the neurons that fire. Dense over that time, in CUDA graphs, weights never in L2, zeros
independent (``--only decode``); in brackets what the operator would reach where the rule leaves it dense. Half of the
activations are zero in a ReLU² model that was not trained at all; of four tokens' that leaves 6 % of the neurons out,
of eight tokens' none::

    D x H           1 token, 95 %   4 tokens, 95 %   8 tokens, 95 %   1, 50 %   4, 50 %   8, 50 %
    1024 x  4096             1.49             1.28           (1.10)      1.22      1.01    (0.94)
    2048 x  8192             1.48             1.44           (1.21)      1.12      1.00    (0.94)
    3072 x 12288             1.66             1.55           (1.31)      1.19      1.03    (0.97)
    4096 x 16384             1.68             1.56           (1.41)      1.20      1.00    (0.99)
    5120 x 20480             1.94             1.65           (1.46)      1.30      0.99    (0.97)
    6144 x 24576             1.86             1.61             1.53      1.28      1.01      1.07
    8192 x 32768             1.93             1.69             1.55      1.33      1.04      1.06

So ``FEW_TOKENS``: from D x H on, up to so many tokens; 16 were 0.97 at most with half of the neurons firing, of each
token others. Without a graph few tokens launch two kernels for three: 1.3 to 1.7 up to 5120 x 20480, whatever fires.
Smaller sizes were not measured: dense, or 2:4. Nor were other shapes of as many weights. Weights in fp8 count as half
as many, and run so for as many tokens as the operator takes: dense, torchao copies them at each call, since fp8 is
multiplied by rows of outputs only, and cuBLAS refuses few tokens where K is long.

In training, forward and backward, over the same (``--only training rule-training`` and, marked *, seen), gradients of
weights exact or in 2:4 along tokens::

    T x D x H                   waste    exact   sparse
    16384 x 2048 x  8192         1.03     1.12     1.21
     8192 x 4096 x 16384         1.03     1.13     1.25
    32768 x 4096 x 16384         1.01     1.14     1.29
    32768 x 1024 x  4096         1.03     1.12     1.19
    16384 x 1024 x  4096         1.04     1.11     0.86
    11009 x 2048 x  8192         1.05     1.09     1.13
    26113 x  768 x  3072         1.06     1.06     0.53
     2048 x 4096 x 16384         1.07     1.09     1.14       1.06: not taken
     4096 x 2048 x  8192         1.07     1.05     0.91  *
     4096 x 1024 x  4096         1.07     1.00     0.68  *

Where the sparse ones lose, the GPU waits: of 1.70 ms at 16384 x 1024 x 4096 their kernels take 1.14, as much as those
of exact ones; more where tokens make no four. So they run from 2**37 multiplications on, exact ones below. Not measured
in training, so dense: waste above 1.06, hidden_dim below 3072 and below twice model_dim.

Called one by one, without a graph, 2:4 is faster at the small sizes, too, where launching binds; the rule is for both.
Few tokens bind both matmuls to reading the weights, which 2:4 activations do not make smaller: 128 were slower, 512
followed the rule. Other Hopper cards of as many multiprocessors, with less power or memory
bandwidth for dense and 2:4 alike, were not measured.
"""

import functools

import torch

from ao_act24.kernels import cuda, plans, schedule
from ao_act24.phases import PHASE

MIN_TOKENS = 512
MIN_DIM, MIN_HIDDEN_DIM, MIN_TRAINING_HIDDEN_DIM = 768, 2048, 3072  # at a short K, a tile's end weighs more
MAX_WASTE = 1.22
MAX_TRAINING_WASTE = 1.06
NEVER = 2**60
FEW_TOKENS = ((2**22, 4), (2**27, 8))  # model_dim * hidden_dim, tokens
MIN_SPARSE_GRADS = 2**37  # tokens * model_dim * hidden_dim
CLUSTERS = 66  # of an H100 or H200 (SXM)


def why_dense(  # type: ignore[no-untyped-def]
    device, dtype, tokens, model_dim, hidden_dim, in_rows, training, packs, config, least=None
) -> str:
    """Why an FFN of this size stays dense; empty if it runs in 2:4. A size (int or SymInt) may be None: not known yet.

    ``in_rows``: the down projection's weight lies in memory as ``[model_dim, hidden_dim]``, row after row, or, but for
    training and fp8, as ``[hidden_dim, model_dim]``. ``packs``: the first matmul packs its own result. ``least``:
    ``least_tokens``, where it is known.

    The CPU always runs the reference; so does all with ``emulate``. Comparing a SymInt installs a guard: one model then
    owns a dense and a 2:4 graph.
    """
    if PHASE.dense:
        return "the schedule has a dense phase now"
    if device.type in ("cpu", "meta") or config.emulate:
        return ""
    reason = cuda.why_not(device, dtype) or _why_not_measured(device)
    reason = reason or why_slower(tokens, model_dim, hidden_dim, in_rows, training, packs, least)
    return reason and f"{reason} (Act24Config(emulate=True) runs 2:4 all the same)"


@torch.compiler.assume_constant_result
def _why_not_measured(device: torch.device) -> str:
    found = torch.cuda.get_device_properties(device).multi_processor_count
    if found // schedule.CLUSTER == CLUSTERS:
        return ""
    return f"when 2:4 pays was measured on a GPU of {CLUSTERS * schedule.CLUSTER} multiprocessors, this one has {found}"


def few_tokens_pay(  # type: ignore[no-untyped-def]
    device, dtype, tokens, model_dim, hidden_dim, out_dim, in_fp8=False
) -> bool:
    """Whether few tokens run exactly, by the neurons that fire alone. Asks for tokens last: that installs a guard."""
    most = most_few_tokens(model_dim, hidden_dim, out_dim, in_fp8)
    if not most or PHASE.dense or cuda.why_not(device, dtype):
        return False
    if device.type == "cuda" and _why_not_measured(device):
        return False
    return 0 < tokens <= most


def most_few_tokens(model_dim, hidden_dim, out_dim, in_fp8) -> int:  # type: ignore[no-untyped-def]
    """Up to how many tokens an FFN of this size runs by the neurons that fire; 0 if it does not."""
    each = 2 if in_fp8 else 1  # of weights in 16 bits
    if model_dim == 0 or model_dim % (64 * each) or hidden_dim % 64 or out_dim % (64 * each):
        return 0
    if hidden_dim > plans.ACTIVE_HIDDEN_DIM:
        return 0
    size = min(model_dim, out_dim) * hidden_dim // each
    most = max((tokens for least, tokens in FEW_TOKENS if size >= least), default=0)
    if in_fp8 and most:
        most = plans.ACTIVE_TOKENS
    return min(most, plans.ACTIVE_X // model_dim)


def why_not_fused(device, dtype, model_dim, hidden_dim) -> str:  # type: ignore[no-untyped-def]
    """Why the first matmul does not pack its own result; empty if it does: faster at any size where 2:4 pays."""
    for name, size, factor in (("model_dim", model_dim, 8), ("hidden_dim", hidden_dim, 64)):
        if size % factor:
            return f"the fused first matmul takes {name} divisible by {factor}, got {size}"
    return cuda.why_not(device, dtype)


def why_slower(  # type: ignore[no-untyped-def]
    tokens, model_dim, hidden_dim, in_rows, training, packs, least=None
) -> str:
    """Why 2:4 would be slower at this size, or was not measured; arguments as of ``why_dense``."""
    for name, size, factor in (("hidden_dim", hidden_dim, 64), ("model_dim", model_dim, 64)):
        if size is not None and size % factor:
            return f"the 2:4 kernels take {name} divisible by {factor}, got {size}"
    if not in_rows:
        return "the down projection's weight does not lie in rows: 2:4 would copy it at each call"
    if model_dim is None or hidden_dim is None:
        return ""
    least_hidden = max(MIN_TRAINING_HIDDEN_DIM, 2 * model_dim) if training else max(MIN_HIDDEN_DIM, model_dim)
    if model_dim < MIN_DIM or hidden_dim < least_hidden:
        return f"2:4 runs from model_dim {MIN_DIM} and here hidden_dim {least_hidden} on, got {model_dim}, {hidden_dim}"
    if tokens is None:
        return ""
    most = MAX_TRAINING_WASTE if training else MAX_WASTE
    if least is None:
        least = least_tokens(int(model_dim), int(hidden_dim), most, packs)
    if tokens >= least:
        return ""
    if torch.compiler.is_compiling():  # Dynamo takes a SymInt for an int, and breaks the graph where a text names one
        return "2:4 runs from more tokens on at this size"
    static = isinstance(tokens, int)  # one graph for each number of tokens
    if static and tokens >= MIN_TOKENS and waste(tokens, int(model_dim), int(hidden_dim), packs) <= most:
        return ""
    if least == NEVER:
        return f"2:4 runs at few numbers of tokens of this size only, got {tokens}"
    some_fewer = ", and at some fewer" if static and least > MIN_TOKENS else ""
    return f"2:4 runs from {least} tokens on at this size{some_fewer}, got {tokens}"


def where_dynamic(device, tokens, model_dim, hidden_dim, training, packs, config) -> str:  # type: ignore[no-untyped-def]
    """Where an FFN that runs in 2:4 would not, were the number of tokens dynamic: one bound is asked then."""
    if device.type in ("cpu", "meta") or config.emulate or not isinstance(tokens, int):
        return ""
    least = least_tokens(int(model_dim), int(hidden_dim), MAX_TRAINING_WASTE if training else MAX_WASTE, packs)
    if tokens >= least:
        return ""
    if least == NEVER:
        return "not where the number of tokens is dynamic"
    return f"where the number of tokens is dynamic, only from {least} on"


def why_exact_grads(device, tokens, model_dim, hidden_dim, config) -> str:  # type: ignore[no-untyped-def]
    """Why gradients of weights stay exact in an FFN that runs in 2:4; empty if in 2:4 along tokens they are faster."""
    if device.type in ("cpu", "meta") or config.emulate:
        return ""
    if schedule.waste(int(hidden_dim), int(model_dim), CLUSTERS) > MAX_WASTE:
        return f"a gradient of {hidden_dim} x {model_dim} does not fill the GPU evenly"
    if tokens * model_dim * hidden_dim < MIN_SPARSE_GRADS:
        least = -(-MIN_SPARSE_GRADS // (model_dim * hidden_dim))
        return f"sparse ones pay from {least} tokens on at this size, got {tokens}"
    return ""


@functools.lru_cache(maxsize=1024)
def least_tokens(model_dim: int, hidden_dim: int, most_waste: float = MAX_WASTE, packs: bool = True) -> int:
    """From how many tokens on 2:4 pays, whatever their number; ``NEVER`` where from none."""
    step = schedule.TILE_ROWS * schedule.CLUSTER // 3  # most is lost one token beyond whole ones
    counts = range(2**16 + 1, MIN_TOKENS, -step)
    if waste(counts[0], model_dim, hidden_dim, packs) > most_waste:
        return NEVER
    uneven = (tokens + step for tokens in counts if waste(tokens, model_dim, hidden_dim, packs) > most_waste)
    return next(uneven, MIN_TOKENS)


@functools.lru_cache(maxsize=1024)
def waste(tokens: int, model_dim: int, hidden_dim: int, packs: bool = True) -> float:
    """Of both matmuls, of which the dense one takes twice as long; of the second, where only that one is ours."""
    first, second = (schedule.waste(tokens, columns, CLUSTERS) for columns in (hidden_dim, model_dim))
    return (2 * first + second) / 3 if packs else second
