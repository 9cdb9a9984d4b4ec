"""Does training in 2:4 end where dense training ends? A ReLU² GPT on this machine's Python sources, in one of six arms.

    python benchmarks/training/study.py full --seed 0         an arm, a seed, on a GPU
    python benchmarks/training/study.py full --seed 0 --tiny  the same in small, on a CPU: checks the script only

    dense           torch.compile, no 2:4
    full            the recipe: dense warm-up, 2:4 forward, 2:4 gradients of weights with permutation and split
    no-warm-up      2:4 from the first step
    no-permutation  groups of four neighbouring tokens
    no-split        the densest features in 2:4, too
    exact           the gradients of weights dense and exact

All arms of a seed start from the same weights and see the same batches. Blocks are compiled one at a time: one graph
for all of them, quickly. Every so many steps: loss on held-out files as the model runs then, and with dense
activations; and of each layer the share of zeros, the share of non-zeros that 2:4 drops, and what 2:4 along tokens
drops of the energy of relu(h)² and of that of the gradient by h, which is the dense model's in all arms. At last, what
a step runs of ours. Writes ``<out>/<arm>-<seed>.json``; ``plot.py`` beside this draws all of them. It shows the speed
of an arm's first seed: that one must have the GPU to itself, others may run side by side. The rule (``ao_act24.when``)
would compute exact gradients at this size, where those in 2:4 are slower; here all arms run as they are called.
"""

import argparse
import copy
import hashlib
import json
import math
import site
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from machine import record

import ao_act24
from ao_act24 import autograd, lowering, ops
from ao_act24.measure import across_tokens

ARMS = ("dense", "full", "no-warm-up", "no-permutation", "no-split", "exact")


@dataclass(frozen=True)
class Size:
    """100 million parameters in 8 layers; 16384 tokens a step."""

    dim: int = 1024
    layers: int = 8
    heads: int = 16
    context: int = 1024
    batch: int = 16
    steps: int = 2000
    warmup: int = 400
    every: int = 200  # steps between two looks
    megabytes: int = 200  # of text at most
    lr: float = 6e-4


TINY = Size(dim=64, layers=2, heads=2, context=32, batch=4, steps=6, warmup=3, every=3, megabytes=1)


class FFN(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        self.heads = size.heads
        self.norm_1, self.norm_2, self.ffn = nn.RMSNorm(size.dim), nn.RMSNorm(size.dim), FFN(size.dim)
        self.qkv, self.proj = (nn.Linear(size.dim, n * size.dim, bias=False) for n in (3, 1))
        nn.init.zeros_(self.proj.weight), nn.init.zeros_(self.ffn.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attention.transpose(1, 2).flatten(-2))
        return x + self.ffn(self.norm_2(x))


class GPT(nn.Module):
    """Over bytes."""

    def __init__(self, size: Size):
        super().__init__()
        self.token, self.position = nn.Embedding(256, size.dim), nn.Embedding(size.context, size.dim)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.layers)))
        self.norm, self.head = nn.RMSNorm(size.dim), nn.Linear(size.dim, 256, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return F.cross_entropy(self.head(self.norm(self.blocks(x))).flatten(0, 1), targets.flatten())


def text(megabytes: int) -> tuple[Tensor, Tensor, str]:
    """Bytes to train on and held-out ones, one file in twenty, by its name; and what identifies them."""
    roots = [Path(sysconfig.get_path("stdlib")), *map(Path, site.getsitepackages())]
    paths = sorted(
        {path for root in roots for ending in ("py", "md", "rst", "txt") for path in root.rglob(f"*.{ending}")}
    )
    parts: tuple[list[bytes], list[bytes]] = [], []
    left, digest = megabytes * 10**6, hashlib.sha256()
    for path in sorted(paths, key=lambda path: hashlib.sha256(path.name.encode()).digest()):
        content = path.read_bytes() if left > 0 else b""
        left -= len(content)
        digest.update(content)
        parts[hashlib.sha256(path.name.encode()).digest()[-1] % 20 == 0].append(content)
    train, held_out = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts)
    return train, held_out, f"{len(train)} and {len(held_out)} bytes, SHA-256 {digest.hexdigest()[:16]}"


def batch(source: Tensor, size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(source) - size.context - 1, (size.batch,), generator=generator)
    windows = source[starts[:, None] + torch.arange(size.context + 1)].long()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return windows[:, :-1].to(device), windows[:, 1:].to(device)


@torch.no_grad()
def look(model: GPT, run: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """The held-out loss as the model runs now, and dense; and what 2:4 drops in each layer of one batch."""
    found: dict[str, Any] = {
        name: sum(float(autocast(each, *pair)) for pair in batches) / len(batches)
        for name, each in (("loss", run), ("dense_loss", model))
    }
    hidden: list[Tensor] = []
    hooks = [block.ffn.up.register_forward_hook(lambda *call: hidden.append(call[2])) for block in model.blocks]
    with torch.enable_grad():
        loss = autocast(model, *batches[0])
    for hook in hooks:
        hook.remove()
    for h, gradient in zip(hidden, torch.autograd.grad(loss, hidden)):
        y, (packed, metadata) = h.relu().square(), ops.relu2_sparsify(h)
        pruned, pruned_gradient = (ops.unpack(p, metadata) for p in (packed, ops.gather(gradient, metadata)))
        energy, dropped = across_tokens(pruned, pruned)
        gradient_energy, dropped_gradient = across_tokens(pruned_gradient, pruned)
        for name, value in {
            "zeros": (y == 0).float().mean(),
            "dropped": 1 - (packed != 0).sum() / (y != 0).sum(),
            "dropped_across_tokens": dropped / energy,
            "dropped_gradient": dropped_gradient / gradient_energy.clamp_min(1e-300),  # there is none at first
        }.items():
            found.setdefault(name, []).append(round(float(value), 6))
    return found


def autocast(run: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    with torch.autocast(tokens.device.type, torch.bfloat16):
        return run(tokens, targets)


def compiled(model: GPT, backend: Any) -> nn.Module:
    """The same model, weights and all, with compiled blocks."""
    run = copy.copy(model)
    run._modules = dict(model._modules)
    run.blocks = nn.Sequential(*(torch.compile(block, backend=backend, fullgraph=True) for block in model.blocks))
    return run


def ours(run: nn.Module, tokens: Tensor, targets: Tensor) -> list[str]:
    """Which of our operators, or kernels, a forward and backward run. Leaves the gradients."""
    with torch.profiler.profile() as profile:
        autocast(run, tokens, targets).backward()
    names = {event.key.removeprefix("ao_act24::") for event in profile.key_averages()}
    return sorted(names & {*lowering.KERNELS, "feature_wise_counts", "feature_wise_sums"})


def now() -> float:
    """Seconds, when the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def train(arm: str, seed: int, size: Size) -> dict[str, Any]:
    torch._dynamo.reset()
    torch.manual_seed(seed)
    source, held_out, data = text(size.megabytes)
    fixed = torch.Generator().manual_seed(1234)
    held = [batch(held_out, size, fixed) for _ in range(8)]
    model = GPT(size).to(held[0][0].device)
    autograd.PERMUTED, autograd.DENSE_SHARE = arm != "no-permutation", 0.0 if arm == "no-split" else 0.05
    config = ao_act24.Act24Config(emulate=True, weight_grads="dense" if arm == "exact" else "sparse")
    backend = "inductor" if arm == "dense" else ao_act24.Act24Backend(config)
    schedule = ao_act24.Schedule(0 if arm in ("dense", "no-warm-up") else size.warmup)
    run = compiled(model, backend)
    optimizer = torch.optim.AdamW(model.parameters(), size.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.1 + 0.9 * (1 + math.cos(math.pi * step / size.steps)) / 2)
    )
    order = torch.Generator().manual_seed(seed)
    looks, losses, speeds = [], [], []
    peak: int | None = None
    start = now()
    for step in range(size.steps + 1):
        if step % size.every == 0:
            if step:
                speeds.append(size.every * size.batch * size.context / (now() - start))
            if torch.cuda.is_available():
                peak = torch.cuda.max_memory_allocated()  # of the steps since the last look
            looks.append({"step": step, "dense": schedule.dense, **look(model, run, held)})
            print(f"{arm} {seed} step {step}: held-out loss {looks[-1]['loss']:.4f}", flush=True)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            start = now()
        if step == size.steps:
            break
        loss = autocast(run, *batch(source, size, order))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        schedule.step()
        losses.append(loss.detach())
    ran = ours(run, *held[0])
    schedule.close()
    return {
        "arm": arm,
        "seed": seed,
        "size": asdict(size),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "data": data,
        "looks": looks,
        "ours": ran,
        "losses": [round(float(loss), 5) for loss in losses],
        "tokens/s": round(speeds[-1]),
        "peak_bytes": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, help="where to write; with --tiny nothing is written without it")
    arguments = parser.parse_args()
    if not (torch.cuda.is_available() or arguments.tiny):
        parser.error("there is no GPU: --tiny runs on a CPU")
    from torch._inductor.utils import fresh_cache

    with fresh_cache():  # arms differ in what torch's caches do not look at
        result = train(arguments.arm, arguments.seed, TINY if arguments.tiny else Size())
    command = (
        f"python benchmarks/training/study.py {arguments.arm} --seed {arguments.seed}" + " --tiny" * arguments.tiny
    )
    result["record"] = record(command) if torch.cuda.is_available() else {"command": command}
    out = arguments.out or Path(__file__).parent.parent / "results" / "training"
    if arguments.tiny and arguments.out is None:
        print("done, nothing written")
        return
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{arguments.arm}-{arguments.seed}.json"
    path.write_text(json.dumps(result, indent=None) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
