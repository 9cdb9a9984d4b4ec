"""How fast is a whole training step in 2:4? A ReLU² GPT of 1.2 billion parameters, attention and optimiser included.

    python benchmarks/training/step.py          on one GPU with 80 GB: two minutes
    python benchmarks/training/step.py --tuned  also against mode="max-autotune-no-cudagraphs"
    python benchmarks/training/step.py --tiny   the same in small, on a CPU: checks the script only, times nothing

    dense       torch.compile
    2:4 exact   the forward in 2:4, the gradients of weights exact
    2:4 sparse  these in 2:4 along tokens, too

A step is forward, backward and fused AdamW, with weights in fp32 and autocast to bf16, all activations kept. All arms
are steps of one model and one optimiser on the same batches of text, timed in turn as ``hopper.py`` does. Blocks are
compiled one at a time, as torch advises for models of many equal ones: there is one graph of all layers, and not
minutes of compiling for each arm. Embedding, last norm, head and loss run eagerly, in all arms alike.

Zeros are natural: the model trains for some steps first. They grow from 50 % and are far from where long training
ends; how many there are when timing begins, and what 2:4 drops of the rest, is in the result. Dense matmuls draw less
power, and run faster where power is short, the more zeros there are.
"""

import argparse
import contextlib
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from machine import Meter, record, save
from study import GPT, TINY, Size, autocast, batch, look, text
from summary import Row, best, ratio
from timing import in_turn, kernel_times

import ao_act24

SIZE = Size(dim=2048, layers=24, heads=16, context=2048, batch=8, steps=200, warmup=100, megabytes=50, lr=2e-4)


def arms(tuned: bool) -> dict[str, dict[str, Any]]:
    """How each is compiled."""
    found: dict[str, dict[str, Any]] = {"dense": {}}
    if tuned:
        found["dense tuned"] = {"mode": "max-autotune-no-cudagraphs"}
    for name, how in (("2:4 exact", "dense"), ("2:4 sparse", "sparse")):
        config = ao_act24.Act24Config(emulate=True, weight_grads=how)  # type: ignore[arg-type]
        found[name] = {"backend": ao_act24.Act24Backend(config)}
    return found


def compiled(blocks: nn.Sequential, how: dict[str, Any]) -> nn.Sequential:
    return nn.Sequential(*(torch.compile(block, fullgraph=True, dynamic=False, **how) for block in blocks))


def step(
    model: GPT, blocks: nn.Sequential, optimizer: torch.optim.Optimizer, batches: Iterator[tuple[Tensor, Tensor]]
) -> Tensor:
    model.blocks = blocks
    loss = autocast(model, *next(batches))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def peak_bytes(run: Callable[[], object]) -> int | None:
    """GPU memory that a step takes, model and optimiser included, after a step that compiles."""
    run()
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()


def measured(size: Size, tuned: bool) -> dict[str, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    source, held_out, data = text(size.megabytes)
    order = torch.Generator().manual_seed(0)
    batches = [batch(source, size, order) for _ in range(size.steps)]
    with batches[0][0].device:
        model = GPT(size)
    parameters, blocks = sum(parameter.numel() for parameter in model.parameters()), model.blocks
    optimizer = torch.optim.AdamW(model.parameters(), size.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    runs: dict[str, Callable[[], Tensor]] = {
        name: functools.partial(step, model, compiled(blocks, how), optimizer, itertools.cycle(batches))
        for name, how in arms(tuned).items()
    }
    losses = []
    for number in range(size.steps):
        optimizer.param_groups[0]["lr"] = size.lr * min(1, (number + 1) / size.warmup)
        losses.append(round(float(runs["dense"]()), 5))
    model.blocks = blocks
    tokens, targets = batch(held_out, size, order)
    looked = look(model, model, [(tokens[:1], targets[:1])])
    rows: dict[str, Row] = {name: {"what": name, "peak_bytes": peak_bytes(run)} for name, run in runs.items()}
    if torch.cuda.is_available():
        timed = in_turn(runs, 2.0, 5, Meter())
        for name, row in rows.items():
            row |= timed[name]
            row["tokens/s"] = round(tokens.numel() / row["median"] * 1000)
            row["over dense"] = ratio(timed, best(timed)["what"], name)
            row["kernels"] = kernel_times(runs[name], 2)
    result = {"size": asdict(size), "parameters": parameters, "data": data, "losses": losses, "looked": looked}
    return {**result, "rows": list(rows.values())}


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("arm", "ms a step", "tokens/s", "over dense", "joules a step", "peak GB")
    for row in result["rows"]:
        cells = []
        if "median" in row:
            joules = "" if row["joules"] is None else f"{row['joules']:.0f}"
            cells = [f"{row['median']:.1f}", f"{row['tokens/s']:,}", f"{row['over dense']:.3f}", joules]
            cells.append(f"{row['peak_bytes'] / 1e9:.1f}")
        table.add_row(row["what"], *cells)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuned", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, help="where to write; with --tiny nothing is written without it")
    arguments = parser.parse_args()
    if not (torch.cuda.is_available() or arguments.tiny):
        parser.error("there is no GPU: --tiny runs on a CPU")
    start = time.perf_counter()
    with contextlib.closing(ao_act24.Schedule(0)):  # what is timed is 2:4 from the first step on
        result = measured(TINY if arguments.tiny else SIZE, arguments.tuned)
    command = "python benchmarks/training/step.py" + " --tuned" * arguments.tuned + " --tiny" * arguments.tiny
    made = record(command) if torch.cuda.is_available() else {"command": command}
    result["record"] = {**made, "took_s": round(time.perf_counter() - start)}
    show(result)
    out = arguments.out or Path(__file__).parent.parent / "results" / "training"
    if arguments.tiny and arguments.out is None:
        print("done, nothing written")
        return
    out.mkdir(parents=True, exist_ok=True)
    path = out / "step.json"
    save(result, path)
    print(f"written: {path}" + ", nothing timed" * arguments.tiny)


if __name__ == "__main__":
    main()
