"""What bounds the kernels: hardware counters of one launch of each; and the matmul's time and energy, data taken away.

    python benchmarks/limits.py     one minute; needs Nsight Compute (``ncu``), which comes with the CUDA toolkit

At 8192 tokens of 4096 x 16384, 90 % zeros, bf16. Counters are of single launches, whose clock is higher than in the
long bursts of ``hopper.py``; times and energy are of such bursts. Writes ``benchmarks/results/limits.json``.
"""

import argparse
import csv
import functools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from ffns import ffn_and_input
from machine import Meter, record, save
from timing import Runs, captured, in_turn

from ao_act24.kernels import cuda

SHAPE = (8192, 4096, 16384)
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "MemoryWorkloadAnalysis_Tables")
KEPT = (
    "gpu__time_duration.sum",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",  # shared memory's pipe
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "lts__t_sectors.sum",  # of L2, 32 bytes each
)


def launches() -> Runs:
    """One of each kernel."""
    ffn, x = ffn_and_input(SHAPE, 90)
    h = ffn.up(x)
    packed, metadata = cuda.relu2_sparsify(h)
    y = h.relu().square()
    return {
        "sparse_mm": functools.partial(cuda.sparse_mm, packed, metadata, ffn.down.weight, ffn.down.bias),
        "cuBLAS": functools.partial(ffn.down, y),
        "linear_relu2_sparsify": functools.partial(cuda.linear_relu2_sparsify, x, ffn.up.weight, ffn.up.bias),
        "relu2_sparsify": functools.partial(cuda.relu2_sparsify, h),
    }


def workload() -> None:
    for run in launches().values():
        run()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        run()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def counters(ncu: str) -> dict[str, dict[str, str]]:
    options = ["--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    options += [word for section in SECTIONS for word in ("--section", section)]
    command = [ncu, *options, sys.executable, __file__, "--workload"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ncu must return 0, got {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return dict(zip(launches(), parsed(done.stdout), strict=True))


def parsed(text: str) -> list[dict[str, str]]:
    """Of each kernel, in order, the counters in ``KEPT``, with their units."""
    table = [line for line in csv.reader(text.splitlines()) if len(line) > 10]  # others are the program's own
    names, units, *kernels = table
    return [
        {name: f"{value} {unit}".strip() for name, unit, value in zip(names, units, kernel) if name in KEPT}
        for kernel in kernels
    ]


def without_data() -> dict[str, Any]:
    """``sparse_mm`` in bursts: on its data, and with values, weights or both all zero."""
    ffn, x = ffn_and_input(SHAPE, 90)
    packed, metadata = cuda.relu2_sparsify(ffn.up(x))
    weight, bias = ffn.down.weight, ffn.down.bias
    runs: Runs = {}
    for name, (a, b) in {
        "real data": (packed, weight),
        "values zero": (packed * 0, weight),
        "weights zero": (packed, weight * 0),
        "both zero": (packed * 0, weight * 0),
    }.items():
        runs[name] = captured(functools.partial(cuda.sparse_mm, a, metadata, b, bias), 4)
    return in_turn(runs, 0.75, 4, Meter(), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--workload", action="store_true", help="launch each kernel once, as Nsight Compute watches")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog} needs a Hopper GPU, found none\n")
    torch.set_grad_enabled(False)
    if arguments.workload:
        return workload()
    ncu = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    result = {"record": record("python benchmarks/limits.py"), "shape": SHAPE, "without_data": without_data()}
    for name, row in result["without_data"].items():
        print(f"{name:14} {row['median']:8.4f} ms {row['joules']:8.4f} J")
    result["counters"] = counters(ncu)
    for name, found in result["counters"].items():
        print(name, *(f"  {counter} {value}" for counter, value in found.items()), sep="\n")
    arguments.out.mkdir(parents=True, exist_ok=True)
    save(result, arguments.out / "limits.json")


if __name__ == "__main__":
    main()
