"""Few tokens by the neurons that fire: the parts ``decode`` and ``decode-fp8`` of ``hopper.py``."""

import copy
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from ffns import FP8_BY_CUBLAS, SHIFTS, compiled, ffn_and_input, in_fp8, placed, with_own_code
from machine import Meter
from summary import Row
from timing import Runs, captured, in_turn
from torch import Tensor, nn

import ao_act24
from ao_act24 import ops
from ao_act24.kernels import plans

SIZES = [(4096, 16384), (8192, 32768)]
TOKENS = [1, 2, 4, 8, 16, 32, 64]
OTHERS = [(1024, 4096), (2048, 8192), (3072, 12288), (5120, 20480), (6144, 24576)]  # for the rule
NOT_IN_L2 = 150 << 20  # bytes
TOKENS_IN_FP8 = [1, 4, 8]


def decode(quick: bool, meter: Meter) -> Iterator[list[Row]]:
    """Few tokens by the neurons that fire, as the rule chooses and always, and dense; of each token's own or in common.

    Against ``torch.compile`` and plain cuBLAS. All in CUDA graphs, in which FFNs take turns: no weight is in L2 from
    the call before; at the sizes for the rule also as called. ``fires``: the share of neurons that fire for one token
    at least.
    """
    every = [(size, TOKENS, list(SHIFTS)) for size in SIZES]
    every += [(size, TOKENS[:5], [50, 95]) for size in OTHERS]
    for size, numbers, percents in [(SIZES[0], TOKENS[:3], [50, 95])] if quick else every:
        ffns = [ffn_and_input((1, *size), 90)[0] for _ in range(max(2, -(-NOT_IN_L2 // (4 * size[0] * size[1]))))]
        plain = [(ffn.up.weight, ffn.up.bias, ffn.down.weight, ffn.down.bias) for ffn in ffns]
        ours = [(up, up_bias, down.t().contiguous().t(), bias) for up, up_bias, down, bias in plain]
        for tokens in numbers:
            x = torch.empty(tokens, size[0], device="cuda", dtype=torch.bfloat16)
            made: dict[str, tuple[Callable[..., Tensor], list[tuple[Tensor, ...]]]] = {"cuBLAS": (ffn_of, plain)}
            for name, weights, how in (("dense", plain, {}), ("few", ours, {"backend": "ao_act24"})):
                made[name] = torch.compile(with_own_code(ffn_of), fullgraph=True, dynamic=False, **how), weights
            if tokens <= plans.ACTIVE_TOKENS:
                made["by neurons"] = ops.active_ffn, ours
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ao_act24.Act24Warning)  # where the rule stays dense
                for run, weights in made.values():
                    run(x, *weights[0])
            calls: Runs = {
                name: functools.partial(each_of, [functools.partial(run, x, *each) for each in weights])
                for name, (run, weights) in made.items()
            }
            runs = {name: captured(call, 1) for name, call in calls.items()}
            if size in OTHERS:
                runs |= {f"{name} called": calls[name] for name in ("dense", "few")}
            for zeros, common in itertools.product(percents, (False, True) if size in SIZES else (False,)):
                for ffn in ffns:
                    nn.init.constant_(ffn.up.bias, SHIFTS[zeros])
                x.normal_()
                if common:
                    x.mul_(0.3).add_(torch.randn_like(x[:1]), alpha=0.95)
                timed = in_turn(runs, 0.02, 5, each=len(ffns))
                timed["few"]["fires"] = round((ffns[0].up(x) > 0).any(0).float().mean().item(), 4)
                for found in timed.values():
                    found["what"] += " common" * common
                yield placed(timed, (tokens, *size), zeros)


def decode_fp8(quick: bool, meter: Meter) -> Iterator[list[Row]]:
    """Few tokens by the neurons that fire, of weights in fp8, against dense fp8 and against both in bf16.

    As ``decode``, each token's neurons its own. Dense fp8 is left out where cuBLAS refuses it: by rows, few tokens, and
    K as long as here (https://github.com/pytorch/ao/issues/4582).
    """
    for size, tokens in itertools.product(SIZES[: 1 if quick else None], TOKENS_IN_FP8):
        ffns = {"dense": [ffn_and_input((1, *size), 90)[0] for _ in range(2)]}
        ffns["dense fp8"] = [in_fp8(ffn) for ffn in ffns["dense"]]
        for suffix in ("", " fp8"):
            ffns[f"few{suffix}"] = copy.deepcopy(ffns[f"dense{suffix}"])
            for ffn in ffns[f"few{suffix}"]:
                ao_act24.neuron_major_(ffn)
        x = torch.randn(tokens, size[0], device="cuda", dtype=torch.bfloat16)
        runs: Runs = {}
        for name, each in ffns.items():
            how = {"backend": "ao_act24"} if "few" in name else {}
            with FP8_BY_CUBLAS, warnings.catch_warnings():
                warnings.simplefilter("ignore", ao_act24.Act24Warning)  # where the rule stays dense
                try:
                    calls = [compiled(ffn, x, **{name: how})[name] for ffn in each]
                except RuntimeError as error:
                    if name != "dense fp8" or "CUBLAS_STATUS_NOT_SUPPORTED" not in str(error):
                        raise
                    print(f"{tokens} x {size[0]} x {size[1]}, {name}: {error}")
                    continue
            runs[name] = captured(functools.partial(each_of, calls), 1)
        for zeros in SHIFTS:
            for ffn in itertools.chain(*ffns.values()):
                nn.init.constant_(ffn.up.bias, SHIFTS[zeros])
            yield placed(in_turn(runs, 0.02, 5, each=2), (tokens, *size), zeros)


def ffn_of(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, up, up_bias)).square(), down, bias)


def each_of(runs: list[Callable[[], object]]) -> None:
    for run in runs:
        run()
