"""How fast are the Hopper kernels, against what a user can get today?

    python benchmarks/hopper.py            the whole table
    python benchmarks/hopper.py --quick    90 % zeros, three shapes, default torch.compile only: about 2 minutes

Everything is timed in one process, in turn, on the same data, in bursts that are long enough to reach the power limit:
``seconds`` of calls, a third of it again before each as warm-up, ``ROUNDS`` times. A figure is the median of the
rounds. Clocks are as they come. A call reads and writes more than L2 holds, but for the smallest token counts. Zeros
are natural: a bias shifts the first matmul's results. Writes ``benchmarks/results/hopper.json``, or ``hopper-quick``.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ao_act24
from ao_act24.fingerprint import source_digest
from ao_act24.kernels import cuda, reference

ROUNDS = 5
SHAPES = [(8192, 2048, 8192), (8192, 4096, 16384), (32768, 4096, 16384), (8192, 8192, 32768)]
SHIFTS = {50: 0.0, 90: -1.2816, 97: -1.8808}  # of a normal distribution, for that share of zeros in percent
FEW = [(2048, 8192), (1024, 4096), (4096, 16384), (8192, 32768)]
TOKENS = [1, 16, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192]


class FFN(nn.Module):
    def __init__(self, model_dim: int, hidden_dim: int, zeros: int):
        super().__init__()
        self.up, self.down = (
            nn.Linear(a, b, device="cuda") for a, b in ((model_dim, hidden_dim), (hidden_dim, model_dim))
        )
        nn.init.normal_(self.up.weight, std=model_dim**-0.5)
        nn.init.normal_(self.down.weight, std=hidden_dim**-0.5)
        nn.init.constant_(self.up.bias, SHIFTS[zeros])
        self.bfloat16().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


class Energy:
    """The GPU's own count of joules; it moves every 20 to 100 ms."""

    def __init__(self) -> None:
        self.nvml = ctypes.CDLL("libnvidia-ml.so.1")
        self.nvml.nvmlInit_v2()
        self.device = ctypes.c_void_p()
        self.nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self.device))

    def joules(self) -> float:
        millijoules = ctypes.c_ulonglong()
        self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.device, ctypes.byref(millijoules))
        return millijoules.value / 1000

    def clock_mhz(self) -> int:
        clock = ctypes.c_uint()
        self.nvml.nvmlDeviceGetClockInfo(self.device, 1, ctypes.byref(clock))
        return clock.value


def measure(runs: dict[str, Callable[[], object]], seconds: float, energy: Energy) -> dict[str, dict[str, object]]:
    """Each of ``runs`` in turn: median and all samples in ms a call, joules a call, SM clock while it ran."""
    calls = {}
    for name, run in runs.items():
        for _ in range(3):
            run()
        calls[name] = max(3, int(seconds * 1000 / _burst(run, 5)))
    samples: dict[str, list[tuple[float, float, int]]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            _burst(run, calls[name] // 3)
            before = energy.joules()
            ms = _burst(run, calls[name])
            samples[name].append((ms, (energy.joules() - before) / calls[name], energy.clock_mhz()))
    result: dict[str, dict[str, object]] = {}
    for name, all_of in samples.items():
        ms, joules, clocks = (list(column) for column in zip(*all_of))
        result[name] = {
            "ms": statistics.median(ms),
            "samples_ms": ms,
            "joules": statistics.median(joules),
            "mhz": clocks,
        }
    return result


def _burst(run: Callable[[], object], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls


def compiled(ffn: FFN, x: Tensor, **how: object) -> Callable[[], Tensor]:
    torch._dynamo.reset()
    model = torch.compile(ffn, fullgraph=True, dynamic=False, **how)
    model(x)
    return lambda: model(x)


def host_us(run: Callable[[], object], calls: int = 200) -> float:
    """Host time of a call: how long it takes to hand it to the GPU."""
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        best = min(best, (time.perf_counter() - start) / calls * 1e6)
    return best


def kernels(ffn: FFN, h: Tensor, seconds: float, energy: Energy) -> dict[str, dict[str, object]]:
    """Packing against a copy; the second matmul against cuBLAS and cuSPARSELt."""
    y, w, b = F.relu(h).square(), ffn.down.weight, ffn.down.bias
    packed, metadata = cuda.relu2_sparsify(h)
    pruned, copy = reference.unpack(packed, metadata), torch.empty_like(h)
    runs: dict[str, Callable[[], object]] = {
        "matmul dense": lambda: F.linear(y, w, b),
        "matmul 2:4": lambda: cuda.sparse_mm(packed, metadata, w, b),
        "sparsify": lambda: cuda.relu2_sparsify(h),
        "copy": lambda: copy.copy_(h),
    }
    try:
        compressed = torch._cslt_compress(pruned)
        algorithm = torch._cslt_sparse_mm_search(compressed, w.t())
        runs["matmul cusparselt"] = lambda: torch._cslt_sparse_mm(compressed, w.t(), alg_id=algorithm)
        runs["compress cusparselt"] = lambda: torch._cslt_compress(pruned)
    except RuntimeError as error:
        print("cuSPARSELt:", error)
    table = measure(runs, seconds, energy)
    for name, size in (("sparsify", 3.125), ("copy", 4.0)):
        table[name]["TB/s"] = size * h.numel() / table[name]["ms"] / 1e9  # type: ignore[operator]
    return table


def whole_ffn(ffn: FFN, x: Tensor, seconds: float, energy: Energy, tuned: bool) -> dict[str, dict[str, object]]:
    runs = {"ffn dense": compiled(ffn, x), "ffn 2:4": compiled(ffn, x, backend="ao_act24")}
    if tuned:
        runs["ffn dense tuned"] = compiled(ffn, x, mode="max-autotune-no-cudagraphs")
    return measure(runs, seconds, energy)


def few_tokens(model_dim: int, hidden_dim: int, seconds: float, energy: Energy) -> dict[str, object]:
    """The FFN by number of tokens: what the rule chooses, and 2:4 always."""
    ffn = FFN(model_dim, hidden_dim, 90)
    always = ao_act24.Act24Backend(ao_act24.Act24Config(emulate=True))
    table: dict[str, object] = {}
    for tokens in TOKENS:
        x = torch.randn(tokens, model_dim, device="cuda").bfloat16()
        runs = {"dense": compiled(ffn, x), "chosen": compiled(ffn, x, backend="ao_act24")}
        runs["2:4"] = compiled(ffn, x, backend=always)
        table[str(tokens)] = measure(runs, seconds, energy)
        if tokens == 16:
            table["host_us"] = {name: host_us(run) for name, run in runs.items()}
    return table


def output(*command: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return run.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if reason := cuda.why_not(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16):
        parser.error(reason)
    energy, seconds = Energy(), 0.15 if arguments.quick else 0.4
    query = "name,driver_version,power.limit,clocks.max.sm"
    gpu = output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    result: dict[str, object] = {
        "command": " ".join(sys.argv),
        "gpu": gpu,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": output("git", "rev-parse", "HEAD"),
        "sources": source_digest(),
        "seconds": seconds,
        "rounds": ROUNDS,
    }
    torch.set_grad_enabled(False)
    for zeros in (90,) if arguments.quick else SHIFTS:
        for tokens, model_dim, hidden_dim in SHAPES[:3] if arguments.quick or zeros != 90 else SHAPES:
            ffn, x = FFN(model_dim, hidden_dim, zeros), torch.randn(tokens, model_dim, device="cuda").bfloat16()
            table = kernels(ffn, ffn.up(x), seconds, energy)
            table |= whole_ffn(ffn, x, 2 * seconds, energy, tuned=zeros == 90 and not arguments.quick)
            result[f"{tokens}x{model_dim}x{hidden_dim} {zeros}% zeros"] = table
            print(f"\nT x D x H = {tokens} x {model_dim} x {hidden_dim}, {zeros} % zeros")
            for name, row in table.items():
                speed = f"{row['TB/s']:.3f} TB/s" if "TB/s" in row else ""
                print(f"  {name:20s} {row['ms']:9.4f} ms  {row['joules']:7.3f} J  {speed}", flush=True)
    for model_dim, hidden_dim in FEW[:1] if arguments.quick else FEW:
        table = few_tokens(model_dim, hidden_dim, seconds / 4, energy)
        result[f"few tokens {model_dim}x{hidden_dim}"] = table
        print(f"\nFFN {model_dim} x {hidden_dim} by tokens; host time {table['host_us']} us")
        for tokens in map(str, TOKENS):
            row = table[tokens]
            print(
                f"  {tokens:>6s}  " + "  ".join(f"{name} {timing['ms']:8.4f}" for name, timing in row.items()),
                flush=True,
            )
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"hopper{'-quick' if arguments.quick else ''}.json").write_text(
        json.dumps(result, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
