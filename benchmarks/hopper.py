"""How fast are the Hopper kernels, against what a user can get today?

    python benchmarks/hopper.py                  the whole table and its plots: some 40 minutes (estimated)
    python benchmarks/hopper.py --quick          90 % zeros, three shapes, default torch.compile only: 3 (estimated)
    python benchmarks/hopper.py --only kernels   of kernels, ffn, tokens, rule, outside, training, rule-training,
                                                 fp8, fp8-ffn, rule-fp8, decode, decode-fp8

Everything is timed in one process, in turn, on the same data. A time is the median of rounds, how many times as fast
one thing is as another the median over rounds of their ratio; bytes a second, sums, energy and host time are of
medians. A round is a burst of calls after a third as many for warming up; each thing comes first in turn.
Bursts of matmuls and FFNs are long enough to reach the power limit. Matmuls run as CUDA graphs, so that no host time
counts. Clocks are as they come, and sampled. Energy is given for bursts of a second or more.

L2: a call at the benchmark shapes reads and writes more than it holds. Of the FFNs for few tokens, the weights of
1024 x 4096 (17 MB) stay in L2 from call to call, in all variants alike.

Zeros are natural: a bias shifts the first matmul's results. cuSPARSELt multiplies without a bias, having none along D.
After each shape all that was measured is written to ``benchmarks/results/hopper.json``, with ``--quick`` to
``hopper-quick.json``; ``summary.py`` describes the form.
"""

import argparse
import contextlib
import copy
import functools
import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from decode import decode, decode_fp8
from ffns import FP8_BY_CUBLAS, compiled, ffn_and_input, in_fp8, placed
from machine import Meter, record, save
from summary import FFN_SHAPES, MATMUL_SHAPES, TRAINING_SHAPES, Row, Shape, named, shape_of, show, summary
from timing import Runs, burst, captured, host_in_turn, in_graphs, in_turn, kernel_times, middle, repeated, row
from torch import Tensor

import ao_act24
from ao_act24 import when
from ao_act24.fp8 import rows_to_fp8
from ao_act24.kernels import cuda, reference

FEW_SIZES = [(2048, 8192), (768, 3072), (1024, 4096), (4096, 16384), (8192, 32768)]
ALWAYS = ao_act24.Act24Backend(ao_act24.Act24Config(emulate=True))
STARTS = [(when.least_tokens(*size), *size) for size in FEW_SIZES]  # from where on the rule says 2:4
TOKENS = [1, 16, 128, 512, 1024, 2048, 4096]
UNEVEN = [(752, 4096, 16384), (848, 8192, 32768), (1040, 5120, 20480)]  # few, and as uneven as the rule takes
RULE = [(8192, 4096, 16384), (4096, 2048, 8192), (1024, 4096, 16384), (512, 8192, 32768), (640, 5120, 20480)]
RULE += [(1152, 4096, 16384), (1552, 3584, 14336), (1168, 4608, 18432)]  # uneven, up to
RULE += [(2176, 2048, 8192), (2976, 1024, 4096), (8512, 768, 3072), (5328, 832, 3328), (1488, 2048, 8192)]  # MAX_WASTE
OUTSIDE = [(1376, 3328, 13312), (1600, 4096, 16384), (2656, 2560, 10240), (1648, 2560, 10240), (1049, 3328, 13312)]
OUTSIDE += [(2736, 2304, 13824), (1680, 4096, 8192)]  # six times model_dim, and twice
OUTSIDE += [(8192, 4096, 4096), (8192, 2048, 2048), (8192, 1024, 1024), (8192, 4096, 1024)]  # with a short K
OUTSIDE_97 = [(8192, 4096, 16384), (2736, 2304, 13824), (1680, 4096, 8192), (1376, 3328, 13312)]  # percent of zeros
OUTSIDE_FP16 = [(1168, 4608, 18432), (1488, 2048, 8192)]  # all else is bf16
TWO_STEPS = [(8192, 4096, 16384), (4096, 2048, 8192), (1600, 4096, 16384), (1152, 4096, 16384)]  # also not fused
RULE_FP8 = [(4096, 2048, 8192), (1552, 3584, 14336), (1168, 4608, 18432), (1488, 2048, 8192), (2976, 1024, 4096)]
RULE_FP8 += [(8512, 768, 3072)]
RULE_TRAINING = [(2048, 4096, 16384), (11009, 2048, 8192), (16384, 1024, 4096), (32768, 1024, 4096), (26113, 768, 3072)]
RULE_TRAINING += [(4096, 2048, 8192), (8192, 1024, 4096), (4096, 1280, 5120)]
EDGES = ("rule", "outside", "rule-training", "rule-fp8")  # parts without a quick form
HOST_AT = (128, 2048, 8192)  # where host time is measured: small enough that the GPU waits for it
TUNED = {"dense tuned": {"mode": "max-autotune-no-cudagraphs"}}


def cusparselt(
    pruned: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None
) -> dict[tuple[int, int, int], Callable[[], Tensor]]:
    """cuSPARSELt's matmul with the two fastest algorithms of what its searches find and its default.

    A search times each candidate once, and may end at one that takes twice as long. ``torch._cslt_sparse_mm_search``
    moreover drops the split of K that its choice goes with. Each call plans anew, which takes up to 0.2 ms of host
    time: so all are timed as CUDA graphs.
    """
    compressed, b = torch._cslt_compress(pruned), weight.t()
    algorithms = {(0, 1, -1)}
    for _ in range(4):
        algorithm, split_k, mode, _ = torch._C._cusparselt.mm_search(compressed, b, None, None, out_dtype, False)
        algorithms |= {(algorithm, split_k, mode), (algorithm, 1, -1)}
    timed = {}
    for each in algorithms:
        run = functools.partial(torch._cslt_sparse_mm, compressed, b, None, None, out_dtype, False, *each)
        with contextlib.suppress(RuntimeError):  # not every algorithm goes without the split that was found for it
            calls, _ = repeated(run, 4)
            timed[each] = min(burst(calls, 5) for _ in range(3)), run
    return {each: timed[each][1] for each in sorted(timed, key=lambda each: timed[each][0])[:2]}


def check(what: str, got: Tensor, want: Tensor, most: float = 0.01) -> None:
    error = float((got.float() - want.float()).norm() / want.float().norm())
    if not error < most:
        raise RuntimeError(f"{what} must be within {most:.0%} of the product that it stands for, got {error:.2%}")


def cases(shapes: list[Shape], quick: bool) -> list[tuple[Shape, int]]:
    """Shapes and percents of zeros."""
    others = [] if quick else [(shape, zeros) for zeros in (50, 97) for shape in FFN_SHAPES[1:]]
    return [(shape, 90) for shape in shapes] + others


def kernels(quick: bool, meter: Meter) -> Iterator[list[Row]]:
    """Packing against a copy; the second matmul against cuBLAS and cuSPARSELt, all as CUDA graphs; and the first."""
    for shape, zeros in cases(FFN_SHAPES if quick else MATMUL_SHAPES, quick):
        ffn, x = ffn_and_input(shape, zeros)
        h, w, b = ffn.up(x), ffn.down.weight, ffn.down.bias
        y, other = F.relu(h).square(), torch.empty_like(h)
        packed, metadata = cuda.relu2_sparsify(h)
        pruned = reference.unpack(packed, metadata)
        check("sparse_mm", cuda.sparse_mm(packed, metadata, w, b), F.linear(pruned, w, b))
        matmuls: Runs = {
            "cuBLAS": functools.partial(F.linear, y, w, b),
            "2:4": functools.partial(cuda.sparse_mm, packed, metadata, w, b),
            "first matmul, cuBLAS": functools.partial(ffn.up, x),
            "first matmul, packing": functools.partial(cuda.linear_relu2_sparsify, x, ffn.up.weight, ffn.up.bias),
        }
        packing: Runs = {
            "pack": functools.partial(cuda.relu2_sparsify, h),
            "copy": functools.partial(other.copy_, h),
        }
        theirs = {}
        if torch.backends.cusparselt.is_available():
            theirs = {f"cuSPARSELt {algorithm}": run for algorithm, run in cusparselt(pruned, w).items()}
            for name, run in theirs.items():
                check(name, run(), F.linear(pruned, w))
            matmuls |= theirs
            packing["cuSPARSELt compress"] = functools.partial(torch._cslt_compress, pruned)
        rounds = 5 if zeros == 90 else 3
        in_graphs = {name: repeated(run, 4) for name, run in matmuls.items()}
        graphs: Runs = {name: calls for name, (calls, _) in in_graphs.items()}
        timed = in_turn(graphs, 0.4 if quick else 0.75, rounds, meter, 4) | in_turn(packing, 0.05, rounds, meter)
        sizes = {"pack": sum(t.nbytes for t in (h, packed, metadata)), "copy": 2 * h.nbytes}
        for name, size in sizes.items():
            timed[name]["TB/s"] = size / timed[name]["median"] / 1e9
        for name, (_, is_graph) in in_graphs.items():
            timed[name]["graph"] = is_graph
        yield placed(with_the_faster(timed, theirs), shape, zeros)


def fp8(quick: bool, meter: Meter) -> Iterator[list[Row]]:
    """The same in e4m3 with row scales: packing, amax included; the matmul against ``_scaled_mm`` and cuSPARSELt.

    cuSPARSELt has no row scales. ``_scaled_mm`` multiplies what was not pruned, with fast accumulation.
    """
    for shape in FFN_SHAPES[:1] if quick else FFN_SHAPES:
        ffn, x = ffn_and_input(shape, 90)
        h, b = ffn.up(x), ffn.down.bias
        y, other = F.relu(h).float().square(), torch.empty_like(h)
        w, w_scale = rows_to_fp8(ffn.down.weight)
        packed, metadata, scale = cuda.relu2_sparsify_fp8(h)
        pruned = reference.unpack(packed.float(), metadata)
        ours = functools.partial(cuda.sparse_mm_fp8, packed, metadata, scale, w, w_scale, b, torch.bfloat16)
        want = F.linear(pruned * scale[:, None], w.float() * w_scale[:, None], b.float())
        check("sparse_mm_fp8", ours(), want)
        dense, dense_scale = rows_to_fp8(y)
        scales = {"scale_a": dense_scale[:, None], "scale_b": w_scale[None], "bias": b}
        scales |= {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        matmuls: Runs = {"_scaled_mm": functools.partial(torch._scaled_mm, dense, w.t(), **scales), "2:4": ours}
        up, up_scale = rows_to_fp8(ffn.up.weight)
        x8, x_scale = rows_to_fp8(x)
        first = {"scale_a": x_scale[:, None], "scale_b": up_scale[None], "bias": ffn.up.bias}
        first |= {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        matmuls["first matmul, _scaled_mm"] = functools.partial(torch._scaled_mm, x8, up.t(), **first)
        operands = x8, x_scale, up, up_scale, ffn.up.bias, torch.bfloat16
        matmuls["first matmul, packing"] = functools.partial(cuda.linear_relu2_sparsify_fp8, *operands)
        few_rows = x8[:512], x_scale[:512], *operands[2:]
        both = [each.linear_relu2_sparsify_fp8(*few_rows) for each in (cuda, reference)]
        wide = [reference.unpack(each[0].float(), each[1]) for each in both]
        check("linear_relu2_sparsify_fp8", *wide, most=0.03)  # a last bit of h decides between neighbours in e4m3
        theirs: Runs = {}
        if torch.backends.cusparselt.is_available():
            found = cusparselt(pruned.to(w.dtype), w, torch.bfloat16)
            for run in found.values():
                check("cuSPARSELt", run(), pruned @ w.float().t())
            theirs = {f"cuSPARSELt {algorithm}": run for algorithm, run in found.items()}
        in_graphs = {name: repeated(run, 4)[0] for name, run in (matmuls | theirs).items()}
        packing: Runs = {
            "pack": functools.partial(cuda.relu2_sparsify_fp8, h),
            "copy": functools.partial(other.copy_, h),
        }
        del y, want, pruned, dense_scale
        timed = in_turn(in_graphs, 0.4 if quick else 0.75, 5, meter, 4) | in_turn(packing, 0.05, 5, meter)
        sizes = {"pack": sum(t.nbytes for t in (h, packed, metadata, scale)), "copy": 2 * h.nbytes}
        for name, size in sizes.items():
            timed[name]["TB/s"] = size / timed[name]["median"] / 1e9
        yield placed(with_the_faster(timed, theirs), shape, 90)


def fp8_ffn(quick: bool, meter: Meter) -> Iterator[list[Row]]:
    """The whole FFN in fp8 and in bf16, dense and in 2:4, and the errors that fp8 and 2:4 make.

    The errors are those of the second matmul, of up to 8192 tokens, as ``ao_act24.measure`` has them.
    """
    variants: dict[str, dict[str, Any]] = {"dense": {}, "2:4": {"backend": "ao_act24"}, **({} if quick else TUNED)}
    for shape in FFN_SHAPES[:1] if quick else FFN_SHAPES:
        ffn, x = ffn_and_input(shape, 90)
        with FP8_BY_CUBLAS:
            runs: Runs = {f"{name} fp8": run for name, run in compiled(in_fp8(ffn), x, **variants).items()}
        timed = in_turn(runs | compiled(ffn, x, **variants), 1.0, 3, meter)
        (layer,) = ao_act24.measure(ffn, x[:8192], config=ao_act24.Act24Config(dtype="fp8")).layers
        timed["2:4 fp8"] |= {name: getattr(layer, name) for name in ("error", "fp8_error", "fp8_error_in_24")}
        yield placed(timed, shape, 90)


def with_the_faster(timed: dict[str, Row], candidates: Runs) -> dict[str, Row]:
    """Of cuSPARSELt's candidates only that one, with its algorithm."""
    if not candidates:
        return timed
    best = min(candidates, key=lambda name: timed[name]["median"])
    found = {**timed[best], "what": "cuSPARSELt", "algorithm": best.removeprefix("cuSPARSELt ")}
    return {name: row for name, row in timed.items() if name not in candidates} | {"cuSPARSELt": found}


def whole_ffn(quick: bool, meter: Meter) -> Iterator[list[Row]]:
    """The FFN, forward, against ``torch.compile``."""
    for shape, zeros in cases(FFN_SHAPES, quick):
        ffn, x = ffn_and_input(shape, zeros)
        variants: dict[str, dict[str, Any]] = {"dense": {}, "2:4": {"backend": "ao_act24"}}
        runs = compiled(ffn, x, **variants, **({} if quick else TUNED))
        yield placed(in_turn(runs, 1.5 if zeros == 90 and not quick else 1.0, 3, meter), shape, zeros)


def training(quick: bool, meter: Meter) -> Iterator[list[Row]]:
    """The FFN forward and backward, and the backward alone, with both ways to compute the gradients of weights.

    2:4 is forced. The backward alone is what both take beyond the forward, in each
    round: compiled graphs may overwrite what they saved, so that no backward can run twice.
    """
    for shape in TRAINING_SHAPES[:1] if quick else TRAINING_SHAPES:
        yield trained(shape, 0.5 if quick else 1.0, meter, **({} if quick else TUNED))


def rule_training(quick: bool, meter: Meter) -> Iterator[list[Row]]:
    """As ``training``, at sizes where the rule begins or ends, some of which it leaves to dense; dense in its default
    mode."""
    for shape in RULE_TRAINING:
        yield trained(shape, 0.5, meter)


def trained(shape: Shape, seconds: float, meter: Meter, **modes: Any) -> list[Row]:
    ffn, x = ffn_and_input(shape, 90)
    leaves, grad = [x, *ffn.parameters()], torch.randn_like(x)
    variants: dict[str, dict[str, Any]] = {"dense": {}, **modes}
    for name, how in (("2:4 exact", "dense"), ("2:4 sparse", "sparse")):
        config = ao_act24.Act24Config(emulate=True, weight_grads=how)  # type: ignore[arg-type]
        variants[name] = {"backend": ao_act24.Act24Backend(config)}
    with torch.enable_grad(), contextlib.closing(ao_act24.Schedule(0)):
        for leaf in leaves:
            leaf.requires_grad_()
        runs: Runs = {}
        for name, forward in compiled(ffn, x, **variants).items():
            runs[f"forward {name}"] = forward
            runs[name] = functools.partial(step, forward, leaves, grad)
        timed = in_turn(runs, seconds, 3, meter)
        for name in variants:
            timed[name]["kernels"] = kernel_times(runs[name])
    for name in variants:
        samples = zip(timed[name]["samples"], timed[f"forward {name}"]["samples"])
        timed[f"backward {name}"] = row(f"backward {name}", "ms", [both - forward for both, forward in samples])
    return placed(timed, shape, 90)


def step(forward: Callable[[], Any], leaves: list[Tensor], grad: Tensor) -> None:
    forward().backward(grad)
    for leaf in leaves:
        leaf.grad = None


def few_tokens(quick: bool, meter: Meter) -> Iterator[list[Row]]:
    """The FFN by number of tokens: dense, what the rule chooses, and 2:4 always; each also in a CUDA graph.

    Where launching binds, times drift twofold within milliseconds: there bursts are short, and many. And of two
    functions compiled from one code one can be 3 % faster than the other all the time, in another process not: there
    all is compiled three times. Dense in its default mode: ``rule`` has what autotuning gains.
    """
    for begins, *size in STARTS[:1] if quick else STARTS:
        for tokens in sorted({*(TOKENS[::2] if quick else TOKENS), begins}):
            yield few((tokens, *size))
    for shape in [] if quick else UNEVEN:
        yield few(shape)


def few(shape: Shape) -> list[Row]:
    variants: dict[str, dict[str, Any]] = {"dense": {}, "chosen": {"backend": "ao_act24"}, "2:4": {"backend": ALWAYS}}
    ffn, x = ffn_and_input(shape, 90)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ao_act24.Act24Warning)  # that all stays dense is what is measured
        runs = compiled(ffn, x, **variants)
        launching = burst(runs["dense"], 10) < 0.3
        each = [runs, *(compiled(ffn, x, **variants) for _ in range(2 * launching))]
    several: Runs = {f"{name} {number}": made[name] for number, made in enumerate(each) for name in made}
    took = in_turn(several, 0.0005, 41, turns=11) if launching else in_turn(several, 0.005, 21)
    timed = {name: middle(name, [took[f"{name} {number}"] for number in range(len(each))]) for name in runs}
    calls, graphs = in_graphs(runs, timed["dense"]["median"])
    graphs = {f"{name} graph": graph for name, graph in graphs.items()}
    timed |= in_turn(graphs, 0.005, 41 if launching else 21, each=calls)
    if shape == HOST_AT:
        single = {f"host graph {name}": captured(run, 1) for name, run in runs.items()}
        timed |= host_in_turn({f"host {name}": run for name, run in runs.items()} | single)
    return placed(timed, shape, 90)


def rule(quick: bool, meter: Meter) -> Iterator[list[Row]]:
    """The FFN at the sizes that ``ao_act24/when.py`` rests on: in 2:4, taken or not, against both modes, at full power.

    All in CUDA graphs, which favours dense. Two steps: the first matmul does not pack, as after ``sparsify_``.
    """
    for shape in RULE:
        yield ruled(shape, 90, torch.bfloat16, meter, **TUNED)


def outside(quick: bool, meter: Meter) -> Iterator[list[Row]]:
    """As ``rule``: at sizes that it leaves to dense, with more zeros, in fp16. Dense in its default mode: none gained
    more than 4 % by autotuning."""
    for shape in OUTSIDE:
        yield ruled(shape, 90, torch.bfloat16, meter)
    for shape in OUTSIDE_97:
        yield ruled(shape, 97, torch.bfloat16, meter)
    for shape in OUTSIDE_FP16:
        yield ruled(shape, 90, torch.float16, meter)


def rule_fp8(quick: bool, meter: Meter) -> Iterator[list[Row]]:
    """As ``rule``, in fp8, where rounds are uneven or K is short; dense in its default mode."""
    for shape in RULE_FP8:
        with FP8_BY_CUBLAS:
            found = ruled(shape, 90, torch.float8_e4m3fn, meter)
        yield found


def ruled(shape: Shape, zeros: int, dtype: torch.dtype, meter: Meter, **modes: Any) -> list[Row]:
    e4m3 = dtype == torch.float8_e4m3fn
    ffn, x = ffn_and_input(shape, zeros, torch.bfloat16 if e4m3 else dtype)
    ffn = in_fp8(ffn) if e4m3 else ffn
    runs = compiled(ffn, x, dense={}, **{"2:4": {"backend": ALWAYS}}, **modes)
    if (shape in TWO_STEPS or e4m3) and zeros == 90:
        apart = copy.deepcopy(ffn)
        ao_act24.sparsify_(apart, ALWAYS.config)
        runs["2:4 in two steps"] = functools.partial(torch.compile(apart, fullgraph=True, dynamic=False), x)
    calls, graphs = in_graphs(runs, min(burst(run, 10) for run in runs.values()))
    return placed(in_turn(graphs, 0.5, len(graphs), meter, each=calls), shape, zeros, dtype)


PARTS = {"kernels": kernels, "ffn": whole_ffn, "tokens": few_tokens, "rule": rule, "outside": outside}
PARTS |= {"training": training, "rule-training": rule_training, "fp8": fp8, "fp8-ffn": fp8_ffn}
PARTS |= {"rule-fp8": rule_fp8, "decode": decode, "decode-fp8": decode_fp8}


def line(found: Row) -> str:
    joules = f"{found['joules']:8.3f} J" if found.get("joules") else ""
    speed = f"{found['TB/s']:8.3f} TB/s" if "TB/s" in found else ""
    what = f"{found['what']} {found.get('dtype', '')}"
    where = f"{named(shape_of(found)):>22} {found['zeros']} %  {what:20}"
    return f"{where} {found['median']:9.4f} {found['unit']} ({found['min']:.4f}–{found['max']:.4f}) {joules}{speed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    parts = [part for part in arguments.only if not (arguments.quick and part in EDGES)]
    if not parts:
        parser.error(f"--only {' '.join(arguments.only)} has no --quick form")
    if not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog} needs a Hopper GPU, found none\n")
    if reason := cuda.why_not(torch.device("cuda"), torch.bfloat16):
        parser.exit(2, f"{reason}\n")
    torch.set_grad_enabled(False)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"hopper{'-quick' if arguments.quick else ''}.json"
    whole = arguments.only == list(PARTS)
    result = json.loads(path.read_text()) if path.exists() and not whole else {}
    result = {part: result[part] for part in PARTS if part in result}
    command = "python benchmarks/hopper.py" + " --quick" * arguments.quick
    command += "" if whole else f" --only {' '.join(arguments.only)}"
    meter = Meter()
    for part in parts:
        start = time.perf_counter()
        rows: list[Row] = []
        result[part] = {"record": record(command), "rows": rows}
        for found in PARTS[part](arguments.quick, meter):
            rows += found
            print("\n".join(map(line, found)), flush=True)
            result[part]["record"]["took_s"] = round(time.perf_counter() - start)
            result["summary"] = summary(result)
            save(result, path)
    show(result["summary"])
    print(f"written: {path}" + ", torch.compile in its default mode only" * arguments.quick)
    try:
        import plot
    except ImportError as error:
        print(f"no plots: {error}")
    else:
        plot.main(path)


if __name__ == "__main__":
    main()
