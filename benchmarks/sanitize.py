"""Every kernel under compute-sanitizer's memcheck, racecheck and initcheck: ``python benchmarks/sanitize.py``.

A small workload, checked against the reference, runs once for each tool and case, each in a process of its own: a
crash ends one of them. Memory comes from cudaMalloc directly, so that memcheck knows where each tensor ends, and data
from the CPU, so that only our kernels are looked at. Waits in kernels have no bound, since the tools slow them down:
processes have one. The case ``planted`` has a fault for each tool: it reads beyond its tensor, and what nobody wrote,
and shared memory that other threads write, without a barrier. A tool that does not see its fault sees nothing.

racecheck looks at what threads load from shared memory and store there. It does not see what the copy engine writes
and ``wgmma`` reads: of the stages of the matmuls it says nothing.

Prints a table, writes ``benchmarks/results/sanitizer.json``, and fails unless all is clean and the faults are caught.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from machine import ROOT, output, record

from ao_act24.kernels import compile, cuda, plans, reference

TOOLS = ("memcheck", "racecheck", "initcheck")
LIMIT_S = 170  # a run; those of one tool run side by side, so all end within 10 minutes
DONE = "the workload is done"
PACKING = [(65, 4112), (33, 100), (3, 12)]  # tokens, hidden_dim: of whole sixteens, and not
MATMULS = {  # tokens, model_dim, hidden_dim
    "sparse_mm in rounds": [(3840, 2056, 704), (250, 8712, 64)],  # tiles of 192 rows, then of 128; of 128
    "sparse_mm of few tiles": [(1279, 3592, 704), (200, 264, 192), (1, 8, 64)],  # of 192 beside some of 64; of 64
}
FIRST = {"linear_relu2_sparsify": [(3840, 584, 2112), (250, 64, 8768), (1279, 72, 3584), (200, 328, 320), (1, 8, 64)]}
UNBOUNDED = {"WAIT_TRIES": "0xFFFFFFFFu"}  # see ptx.cuh
FP8 = {"fp8": [(1279, 592, 4672), (33, 136, 100), (250, 64, 8768), (3, 64, 64)]}  # tokens, model_dim, hidden_dim
ACTIVE = {  # tokens, D, H, and D of the result
    "few tokens": [(1, 192, 4160, 320), (9, 64, 64, 64), (16, 128, 1024, 576)],
    "few tokens in fp8": [(1, 384, 4160, 640), (9, 128, 64, 128), (16, 256, 1024, 1152)],
}
GRADIENTS = {
    "gradients": [(1, 1283, 576, 2112), (1, 131, 584, 192), (8, 64, 128, 192)]
}  # the first two leave three tokens
PLANTED = "planted"
CASES = ("relu2_sparsify", *MATMULS, *FIRST, *GRADIENTS, *FP8, *ACTIVE, PLANTED)
KERNELS = (
    "relu2_sparsify",
    "relu2_sparsify_any",
    "linear_relu2_sparsify",
    "sparse_mm",
    "grad_hidden",
    "feature_wise_counts",
    "feature_wise_sums",
    "densest",
    "unpack",
    "columns",
    "relu2_sparsify_fp8",
    "relu2_sparsify_fp8_any",
    "sparse_mm_fp8",
    "linear_relu2_sparsify_fp8",
    "square_to_fp8",
    "active_relu2",
    "active_mm",
)
OURS = re.compile(rf"\b({'|'.join(KERNELS)}|planted_race)\b")
RACE = """
extern "C" __global__ void planted_race(int* out) {
  __shared__ int shared[256];
  shared[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = shared[(threadIdx.x + 32) % 256];  // another warp's, which may not have written it yet
}
"""


def workload(case: str) -> None:
    cubin = compile.cubin
    with mock.patch.object(compile, "cubin", lambda name, defines: cubin(name, {**defines, **UNBOUNDED})):
        for dtype in plans.ELEMENTS:
            if case == PLANTED:
                planted(dtype)
            for tokens, hidden_dim in PACKING if case == "relu2_sparsify" else ():
                packing(tokens, hidden_dim, dtype)
            for tokens, model_dim, hidden_dim in MATMULS.get(case, ()):
                matmul(tokens, model_dim, hidden_dim, dtype)
            for tokens, model_dim, hidden_dim in FIRST.get(case, ()):
                first_matmul(tokens, model_dim, hidden_dim, dtype)
            for sequences, tokens, model_dim, hidden_dim in GRADIENTS.get(case, ()):
                gradients((sequences, tokens), model_dim, hidden_dim, dtype)
            for tokens, model_dim, hidden_dim in FP8.get(case, ()):
                fp8(tokens, model_dim, hidden_dim, dtype)
            for tokens, *sizes in ACTIVE.get(case, ()):
                (few_tokens_fp8 if case.endswith("fp8") else few_tokens)(tokens, *sizes, dtype)
    torch.cuda.synchronize()
    print(DONE)


def packing(tokens: int, hidden_dim: int, dtype: torch.dtype) -> None:
    wide = torch.randn(tokens + 1, hidden_dim + 16).to(dtype)
    for rows in (slice(tokens), slice(1, None)):
        strided = wide[rows, 16:]
        for h, on_gpu in ((strided, wide.cuda()[rows, 16:]), (strided, strided.contiguous().cuda())):
            got, want = cuda.relu2_sparsify(on_gpu), reference.relu2_sparsify(h)
            assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want))


def matmul(tokens: int, model_dim: int, hidden_dim: int, dtype: torch.dtype) -> None:
    h, weight = torch.randn(tokens, hidden_dim).to(dtype), torch.randn(model_dim, hidden_dim).to(dtype)
    bias = torch.randn(model_dim).to(dtype)
    got = cuda.sparse_mm(*cuda.relu2_sparsify(h.cuda()), weight.cuda(), bias.cuda()).cpu().float()
    want = reference.sparse_mm(*reference.relu2_sparsify(h), weight, bias).float()
    assert (got - want).norm() < 0.01 * want.norm()


def first_matmul(tokens: int, model_dim: int, hidden_dim: int, dtype: torch.dtype) -> None:
    """Of small integers, so that nothing is rounded."""
    x, weight = (
        torch.randint(-2, 3, (tokens, model_dim)).to(dtype),
        torch.randint(-1, 2, (hidden_dim, model_dim)).to(dtype),
    )
    bias = torch.randint(-3, 4, (hidden_dim,)).to(dtype)
    got = cuda.linear_relu2_sparsify(x.cuda(), weight.cuda(), bias.cuda())
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, reference.linear_relu2_sparsify(x, weight, bias)))


def gradients(tokens: tuple[int, int], model_dim: int, hidden_dim: int, dtype: torch.dtype) -> None:
    """What the gradient of an FFN calls, of small integers."""
    packed, metadata = reference.relu2_sparsify(torch.randint(-2, 3, (*tokens, hidden_dim)).to(dtype))
    grad, weight = (torch.randint(-1, 2, (*n, model_dim)).to(dtype) for n in (tokens, (hidden_dim,)))
    down, chosen = weight.t().contiguous(), torch.tensor([hidden_dim - 1, 0, 5])
    wise, codes, counts, left = reference.feature_wise(packed, metadata, True, True)
    exact, (_, slots) = weight[:5], reference.densest(counts, 5)
    for name, arguments in {
        "grad_hidden": (grad, down, packed, metadata),
        "sparse_mm": (packed, metadata, down),
        "unpack": (packed, metadata),
        "columns": (packed, metadata, chosen),
        "feature_wise": (packed, metadata, True, True),
        "feature_wise of a gradient": (packed, metadata, True, False),
        "densest": (counts, 5),
        "feature_wise_mm": (wise, codes, left * 0, grad, exact, slots, True, False),
        "feature_wise_mm transposed": (wise, codes, left * 0, grad, exact, slots, True, True),
    }.items():
        on_gpu = [each.cuda() if isinstance(each, torch.Tensor) else each for each in arguments]
        if name == "sparse_mm":
            on_gpu[2] = weight.cuda().t()
        function = name.split()[0]
        got, want = getattr(cuda, function)(*on_gpu), getattr(reference, function)(*arguments)
        pairs = zip(got, want) if isinstance(got, tuple) else [(got, want)]
        assert all(torch.equal(a.cpu(), b) for a, b in pairs), name


def fp8(tokens: int, model_dim: int, hidden_dim: int, dtype: torch.dtype) -> None:
    """Products of small integers, so that nothing is rounded."""
    h = torch.randn(tokens, hidden_dim).to(dtype)
    got, want = cuda.relu2_sparsify_fp8(h.cuda()), reference.relu2_sparsify_fp8(h)
    assert all(torch.equal(a.cpu().view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, want))
    _, metadata, scale = want
    packed, weight = (
        torch.randint(-1, 2, size).to(reference.E4M3) for size in ((tokens, hidden_dim // 2), (model_dim, hidden_dim))
    )
    others = metadata, torch.ones_like(scale), weight, torch.ones(model_dim), torch.ones(model_dim, dtype=dtype)
    out = cuda.sparse_mm_fp8(packed.cuda(), *(each.cuda() for each in others), dtype)
    assert torch.equal(out.cpu(), reference.sparse_mm_fp8(packed, *others, dtype))
    x, up = (torch.randint(-1, 2, (n, model_dim)).to(reference.E4M3) for n in (tokens, hidden_dim))
    operands = x, torch.ones(tokens), up, torch.ones(hidden_dim), torch.ones(hidden_dim, dtype=dtype)
    got = cuda.linear_relu2_sparsify_fp8(*(each.cuda() for each in operands), dtype)
    want = reference.linear_relu2_sparsify_fp8(*operands, dtype)
    assert all(torch.equal(a.cpu().view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, want))


def few_tokens(tokens: int, model_dim: int, hidden_dim: int, out_dim: int, dtype: torch.dtype) -> None:
    x, up, down = (
        torch.randn(*size).to(dtype) for size in ((tokens, model_dim), (hidden_dim, model_dim), (hidden_dim, out_dim))
    )
    biases = torch.full((hidden_dim,), -(model_dim**0.5)).to(dtype), torch.randn(out_dim).to(dtype)
    got = cuda.active_ffn(x.cuda(), up.cuda(), biases[0].cuda(), down.cuda().t(), biases[1].cuda()).cpu().float()
    want = reference.active_ffn(x, up, biases[0], down.t(), biases[1]).float()
    assert (got - want).norm() < 0.01 * want.norm()


def few_tokens_fp8(tokens: int, model_dim: int, hidden_dim: int, out_dim: int, dtype: torch.dtype) -> None:
    x, up, down = (
        torch.randint(-1, 2, size).to(reference.E4M3)
        for size in ((tokens, model_dim), (hidden_dim, model_dim), (hidden_dim, out_dim))
    )
    scales = [torch.ones(n) for n in (tokens, hidden_dim, out_dim)]
    biases = torch.full((hidden_dim,), -(model_dim**0.5)).to(dtype), torch.randn(out_dim).to(dtype)
    first, down_too = (x, scales[0], up, scales[1], biases[0]), (scales[2], biases[1])
    on_gpu = [[tensor.cuda() for tensor in each] for each in (first, down_too)]
    got = cuda.active_ffn_fp8(*on_gpu[0], down.cuda().t(), *on_gpu[1], dtype).cpu().float()
    want = reference.active_ffn_fp8(*first, down.t(), *down_too, dtype).float()
    assert (got - want).norm() < 0.01 * want.norm()


def planted(dtype: torch.dtype) -> None:
    race()
    h = torch.empty(64, 4096, dtype=dtype, device="cuda")
    cuda.relu2_sparsify(h)
    h.untyped_storage().resize_(h.nbytes // 2)
    cuda.relu2_sparsify(h)


def race() -> None:
    from cuda.core import Device, LaunchConfig, launch

    out = torch.empty(256, dtype=torch.int32, device="cuda")
    device = Device()
    device.set_current()
    kernel = compiled_race().get_kernel("planted_race")
    launch(device.create_stream(), LaunchConfig(grid=1, block=256), kernel, out.data_ptr())
    torch.cuda.synchronize()


def compiled_race() -> Any:
    from cuda.core import Program, ProgramOptions

    return Program(RACE, "c++", ProgramOptions(arch=compile.ARCH)).compile("cubin")


def run(sanitizer: str, tool: str, case: str) -> dict[str, Any]:
    """One case under one tool, in its own process group, which is killed after ``LIMIT_S``."""
    options = "--target-processes application-only --report-api-errors no --show-backtrace no --print-limit 20"
    options += " --launch-timeout 120"  # several start at once: 10 seconds were too few for one of them
    command = [sanitizer, "--tool", tool, *options.split(), sys.executable, __file__, "--workload", case]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        text, ended = process.communicate(timeout=LIMIT_S)[0], True
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, ended = process.communicate()[0], False
    found = {"tool": tool, "case": case, "seconds": round(time.perf_counter() - start)}
    return found | judged(text.replace(str(ROOT), "."), ended, case == PLANTED)


def judged(text: str, ended: bool = True, planted: bool = False) -> dict[str, Any]:
    """What a tool's output says. Clean is only what ran to its end and counted no error."""
    counts = [int(n) for n in re.findall(r"ERROR SUMMARY: (\d+) errors?\b(?! were)", text)]
    races = re.findall(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)", text)
    counts += [int(errors) for errors, _ in races]
    reports = re.findall(r"^========= (?!COMPUTE-SANITIZER|.*SUMMARY)(\S.*(?:\n=========  .*)*)", text, re.MULTILINE)
    ours = [re.sub(r"\n=========\s*", "; ", report) for report in reports if OURS.search(report)]
    errors = sum(counts) if counts else None
    if planted:
        state = "caught" if ours and errors else "missed"
    elif not ended:
        state = f"not done after {LIMIT_S} s"
    elif errors:
        state = f"{errors} errors"
    else:
        state = "clean" if errors == 0 and DONE in text else "broke off"
    found = {"state": state, "errors": errors, "warnings": sum(int(n) for _, n in races), "ours": ours[:3]}
    return found if state in ("clean", "caught") else {**found, "output": text.splitlines()[-40:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--workload", choices=CASES, help="run this case, as each tool does")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog} needs a Hopper GPU, found none\n")
    if reason := cuda.why_not(torch.device("cuda"), torch.bfloat16):
        parser.exit(2, f"{reason}\n")
    if arguments.workload:
        return workload(arguments.workload)
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not (version := re.search(r"[Vv]ersion (\S+)", output(sanitizer, "--version"))):
        parser.exit(2, "compute-sanitizer must be on the PATH (it comes with the CUDA toolkit), found none\n")
    result: dict[str, Any] = {"record": record("python benchmarks/sanitize.py"), "sanitizer": version[1], "runs": []}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for tool in TOOLS:
        with ThreadPoolExecutor(len(CASES)) as pool:
            result["runs"] += pool.map(run, [sanitizer] * len(CASES), [tool] * len(CASES), CASES)
        text = json.dumps(result, indent=1, ensure_ascii=False)
        (arguments.out / "sanitizer.json").write_text(text + "\n")
    show(result["runs"])
    sys.exit(any(found["state"] not in ("clean", "caught") for found in result["runs"]))


def show(runs: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("tool", "case", "result", "warnings", "seconds", "first report of ours")
    for found in runs:
        cells = (found["tool"], found["case"], found["state"], found["warnings"], found["seconds"])
        table.add_row(*map(str, cells), found["ours"][0] if found["ours"] else "")
    Console(width=140).print(table)
    for found in runs:
        if "output" in found:
            print(f"\n--- {found['tool']}, {found['case']}", *found["output"], sep="\n")


if __name__ == "__main__":
    main()
