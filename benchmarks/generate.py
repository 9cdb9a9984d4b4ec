"""How fast does a ReLU² model of 3.5 billion parameters write? A token at a time, by the neurons that fire.

    python benchmarks/generate.py          on one GPU: two and a half minutes
    python benchmarks/generate.py --tiny   the same in small, on a CPU: checks the script, its speeds mean nothing

The model is Hugging Face's Nemotron with eight of Nemotron-4-15B's blocks (6144 x 24576; attention of 48 heads and 8
of keys) and a small vocabulary, its weights random, so the text is noise. Biases of the up projections are such that as
many activations are zero as in a trained model, naturally: how many is measured on the prompts, and stands in the
result. Dense by Inductor, ours by ``backend="ao_act24"``, of the same weights, which for ours have a row for each
neuron; greedily, with a static cache, in two ways: ``step``, one CUDA graph for each token, and ``generate`` as users
call it, which spends some of the time on the host. Tokens a second are of whole calls, prompt included, in turn. How
many tokens are those of dense stands beside them, also for dense without Inductor ("eager"): between random logits the
last bit decides, and after another token comes another text. Writes ``benchmarks/results/generate.json``.
"""

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ffns import SHIFTS
from machine import record, save
from timing import captured
from torch import Tensor, nn
from transformers import CompileConfig, NemotronConfig, NemotronForCausalLM, StaticCache

import ao_act24
from ao_act24.kernels import cuda

BATCHES = [1, 4]  # sequences at a time; `generate` of the first
ROUNDS = 3


@dataclass
class Size:
    dim: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    prompt: int
    tokens: int


SIZE = Size(dim=6144, layers=8, heads=48, kv_heads=8, vocabulary=32000, prompt=32, tokens=256)
TINY = Size(dim=64, layers=2, heads=2, kv_heads=1, vocabulary=256, prompt=8, tokens=8)
ZEROS = [85, 95]  # percent


def model_of(size: Size, device: str) -> NemotronForCausalLM:
    torch.manual_seed(0)
    config = NemotronConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.dim,
        intermediate_size=4 * size.dim,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        mlp_bias=True,
        eos_token_id=None,
        pad_token_id=0,
        torch_dtype=torch.bfloat16,
    )
    with torch.device(device):
        return NemotronForCausalLM(config).to(torch.bfloat16).eval()


def set_zeros(model: nn.Module, percent: int) -> None:
    """The up projections' inputs are normalised, so that their results have the spread of a weight's rows."""
    for layer in model.model.layers:
        up, norm = layer.mlp.up_proj, layer.post_attention_layernorm
        spread = (up.weight.float() * (1 + norm.weight.float())).norm(dim=1)  # its weight counts from one on
        with torch.no_grad():
            up.bias.copy_(SHIFTS[percent] * spread)


def generate(model: NemotronForCausalLM, ids: Tensor, size: Size, backend: str) -> Callable[[], Tensor]:
    """As users call it."""
    how = CompileConfig(backend=backend, mode="reduce-overhead", fullgraph=True, dynamic=False)
    how._compile_all_devices = True  # on a CPU, too, where it would not

    def run() -> Tensor:
        found: Tensor = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=size.tokens,
            do_sample=False,
            cache_implementation="static",
            compile_config=how,
        )
        return found[:, ids.shape[1] :]

    return run


def step(model: NemotronForCausalLM, ids: Tensor, size: Size, backend: str) -> Callable[[], Tensor]:
    """As a server does: the step from a token to the next, compiled, is one CUDA graph; the host waits for the last."""
    cache = StaticCache(config=model.config, max_cache_len=size.prompt + size.tokens)
    last = torch.empty_like(ids[:, :1])

    def advance(last: Tensor) -> Tensor:
        logits: Tensor = model(last, past_key_values=cache, use_cache=True).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def start() -> None:
        cache.reset()
        last.copy_(advance(ids))

    made = torch.compile(advance, backend=backend, fullgraph=True, dynamic=False)
    start()
    made(last)
    next_token: Callable[[], object] = lambda: last.copy_(made(last))  # noqa: E731
    if ids.device.type == "cuda":
        next_token = captured(next_token, 1)

    def run() -> Tensor:
        start()
        found = [last.clone()]
        for _ in range(size.tokens - 1):
            next_token()
            found.append(last.clone())
        return torch.cat(found, 1)

    return run


@torch.no_grad()
def measured(size: Size, device: str) -> Iterator[list[dict[str, Any]]]:
    """The rows of a batch and way at a time."""
    model = model_of(size, device)
    ours = copy.deepcopy(model)
    stored = ao_act24.neuron_major_(ours)
    assert stored == size.layers, stored
    for batch, how in [*((batch, step) for batch in BATCHES), (BATCHES[0], generate)]:
        torch._dynamo.reset()
        rows: list[dict[str, Any]] = []
        ids = torch.randint(1, size.vocabulary, (batch, size.prompt), generator=torch.manual_seed(batch)).to(device)
        models = {"inductor": model, "ao_act24": ours}
        if how is step:
            models["eager"] = model
        runs = {backend: how(each, ids, size, backend) for backend, each in models.items()}
        for percent in ZEROS:
            for each in models.values():
                set_zeros(each, percent)
            zeros = statistics.mean(layer.zeros for layer in ao_act24.measure(model, ids, use_cache=False).layers)
            tokens = {backend: run().cpu() for backend, run in runs.items()}
            seconds: dict[str, list[float]] = {backend: [] for backend in runs}
            for _, (backend, run) in itertools.product(range(ROUNDS), runs.items()):
                start = time.perf_counter()
                run().cpu()
                seconds[backend].append(time.perf_counter() - start)
            if device == "cuda" and not cuda.PLANS.active_ffn.cache_info().currsize:
                raise RuntimeError("no FFN ran by the neurons that fire")
            at = {"how": how.__name__, "batch": batch, "zeros": round(zeros, 4), "shift for": percent}
            dense = statistics.median(seconds["inductor"])
            for backend, took in seconds.items():
                faster, speed = dense / statistics.median(took), batch * size.tokens / statistics.median(took)
                same = (tokens["inductor"] == tokens[backend]).float().mean().item()
                rows.append(at | {"backend": backend, "tokens/s": speed, "seconds": took, "same tokens": same})
                print(
                    f"{how.__name__:8} {batch} × {size.tokens}, {zeros:.1%} zeros: {backend:8} {speed:8.1f} tokens/s, "
                    f"{faster:.3f} times as fast as dense, {same:.1%} of its tokens",
                    flush=True,
                )
        yield rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog} needs a GPU, found none: --tiny runs without\n")
    if arguments.tiny:
        list(measured(TINY, "cpu"))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    path, rows = arguments.out / "generate.json", []
    result = {"record": record("python benchmarks/generate.py"), "size": asdict(SIZE), "rows": rows}
    for found in measured(SIZE, "cuda"):
        rows += found
        save(result, path)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
