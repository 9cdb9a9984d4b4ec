"""How fast does a ReLU² model of six billion parameters generate? A token at a time, by the neurons that fire.

    python benchmarks/generate.py          on one GPU: some two minutes (estimated)
    python benchmarks/generate.py --tiny   the same in small, on a CPU: checks the script, its speeds mean nothing

The model is Hugging Face's Nemotron with the blocks of Minitron-8B (4096 x 16384; attention of 32 heads and 8 of keys,
and a small vocabulary), its weights random, so the text is noise. Biases of the up projections are such
that as many activations are zero as in a trained model, naturally: how many is measured on the prompts, and stands in
the result. ``generate`` is called as users call it, greedily, with a static cache, for which it compiles the model's
forward with CUDA graphs; dense by Inductor, ours by ``backend="ao_act24"``, of the same weights, which for ours have a
row for each neuron. Tokens a second are of whole calls, prompt included, in turn; whether both gave the same tokens
stands beside them. Writes ``benchmarks/results/generate.json``.
"""

import argparse
import copy
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hopper import SHIFTS
from machine import record, save
from torch import Tensor, nn
from transformers import CompileConfig, NemotronConfig, NemotronForCausalLM

import ao_act24
from ao_act24.kernels import cuda

BATCHES = [1, 4]  # sequences at a time
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


SIZE = Size(dim=4096, layers=32, heads=32, kv_heads=8, vocabulary=32000, prompt=32, tokens=256)
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


def generate(model: NemotronForCausalLM, ids: Tensor, size: Size, backend: str) -> Tensor:
    how = CompileConfig(backend=backend, mode="reduce-overhead", fullgraph=True, dynamic=False)
    how._compile_all_devices = True  # on a CPU, too, where it would not
    found: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=size.tokens,
        do_sample=False,
        cache_implementation="static",
        compile_config=how,
    )
    return found[:, ids.shape[1] :]


def measured(size: Size, device: str) -> list[dict[str, Any]]:
    model = model_of(size, device)
    ours = copy.deepcopy(model)
    stored = ao_act24.neuron_major_(ours)
    assert stored == size.layers, stored
    rows: list[dict[str, Any]] = []
    for batch in BATCHES:
        ids = torch.randint(1, size.vocabulary, (batch, size.prompt), device=device)
        for percent in ZEROS:
            for each in (model, ours):
                set_zeros(each, percent)
            zeros = statistics.mean(layer.zeros for layer in ao_act24.measure(model, ids, use_cache=False).layers)
            seconds: dict[str, list[float]] = {}
            tokens: dict[str, Tensor] = {}
            for each, backend in ((model, "inductor"), (ours, "ao_act24")):
                torch._dynamo.reset()
                generate(each, ids, size, backend)
                seconds[backend] = []
                for _ in range(ROUNDS):
                    start = time.perf_counter()
                    tokens[backend] = generate(each, ids, size, backend).cpu()
                    seconds[backend].append(time.perf_counter() - start)
            if device == "cuda" and not cuda.PLANS.active_ffn.cache_info().currsize:
                raise RuntimeError("no FFN ran by the neurons that fire")
            same = (tokens["inductor"] == tokens["ao_act24"]).float().mean().item()
            for backend, took in seconds.items():
                speed = batch * size.tokens / statistics.median(took)
                rows.append(
                    {
                        **{"backend": backend, "batch": batch, "zeros": round(zeros, 4), "shift for": percent},
                        **{"tokens/s": speed, "seconds": took, "same tokens": same},
                    }
                )
                print(f"{batch} × {size.tokens}, {zeros:.1%} zeros, {backend:9} {speed:8.1f} tokens/s, same {same:.1%}")
            faster = rows[-1]["tokens/s"] / rows[-2]["tokens/s"]
            print(f"{'':30} {faster:.3f} times as fast", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog} needs a GPU, found none: --tiny runs without\n")
    if arguments.tiny:
        measured(TINY, "cpu")
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = measured(SIZE, "cuda")
    path = arguments.out / "generate.json"
    save({"record": record("python benchmarks/generate.py"), "size": asdict(SIZE), "rows": rows}, path)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
