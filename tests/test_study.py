"""The study of training in small: it runs, and its results become a table and a picture."""

import importlib.util
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from ao_act24 import autograd

STUDY = Path(__file__).parent.parent / "benchmarks" / "training"


def run(script, *arguments):
    done = subprocess.run([sys.executable, STUDY / script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_study(tmp_path):
    run("study.py", "full", "--tiny", "--seed", "3", "--out", str(tmp_path))
    result = json.loads((tmp_path / "full-3.json").read_text())
    assert [(look["step"], look["dense"]) for look in result["looks"]] == [(0, True), (3, False), (6, False)]
    assert result["looks"][-1]["loss"] < result["looks"][0]["loss"] and len(result["losses"]) == 6
    last = result["looks"][-1]
    assert "relu2_ffn" in result["ours"] and "feature_wise_mm" in result["ours"]
    assert abs(last["dense_loss"] - last["loss"]) < 0.1 and last["dense_loss"] != last["loss"]
    shares = ("zeros", "dropped", "dropped_across_tokens", "dropped_gradient")
    assert all(len(last[share]) == 2 for share in shares) and result["looks"][0]["dropped_gradient"] == [0, 0]
    assert all(0.4 < zeros < 0.6 for zeros in last["zeros"]) and all(0.1 < dropped < 0.3 for dropped in last["dropped"])
    assert all(0 < dropped < 0.2 for dropped in last["dropped_across_tokens"] + last["dropped_gradient"])
    for arm, seed in (("dense", 3), ("full", 4)):
        (tmp_path / f"{arm}-{seed}.json").write_text(json.dumps({**result, "arm": arm, "seed": seed}))
    out = run("plot.py", str(tmp_path))
    assert "dense" in out and "no-split" not in out and (tmp_path / "study.png").stat().st_size > 10_000
    assert "+0.0000" in out and "–" in out and "on CPU" in out, "seed 3 over dense; a single seed has no spread"
    (tmp_path / "full-5.json").write_text(json.dumps({**result, "seed": 5, "data": "other files"}))
    done = subprocess.run([sys.executable, STUDY / "plot.py", tmp_path], capture_output=True, text=True)
    assert "must be of the same data, got" in done.stderr and "full-5: other files" in done.stderr


SPLIT, EXACT = 0.05, "exact"
ARMS = {  # dense looks before, between and after two steps; gradients of weights: permuted and split, if not exact
    "dense": ((False, False, False), set()),
    "full": ((True, False, False), {(True, SPLIT)}),
    "no-warm-up": ((False, False, False), {(True, SPLIT)}),
    "no-permutation": ((True, False, False), {(False, SPLIT)}),
    "no-split": ((True, False, False), {(True, 0.0)}),
    "exact": ((True, False, False), {EXACT}),
}


@pytest.mark.parametrize("arm", ARMS)
def test_a_step_of_each_arm_is_what_the_arm_is_called(arm, monkeypatch):
    """One before the warm-up ends and one after it."""
    monkeypatch.syspath_prepend(STUDY)
    import study

    assert set(study.ARMS) == set(ARMS)
    source = torch.randint(256, (2, 1000), dtype=torch.uint8)
    monkeypatch.setattr(study, "text", lambda megabytes: (*source, "random"))
    for name in ("PERMUTED", "DENSE_SHARE"):  # which an arm sets
        monkeypatch.setattr(autograd, name, getattr(autograd, name))
    traced, how = (
        set(),
        {
            "_feature_wise_grads": lambda: (autograd.PERMUTED, autograd.DENSE_SHARE),
            "_exact_grads": lambda: EXACT,
        },
    )

    def spied(run, noted):
        def spy(*arguments):
            traced.add(noted())
            return run(*arguments)

        return spy

    for name, noted in how.items():
        monkeypatch.setattr(autograd, name, spied(getattr(autograd, name), noted))
    with torch._functorch.config.patch(enable_autograd_cache=False):  # all is traced; what is the same is compiled once
        result = study.train(arm, 3, replace(study.TINY, layers=1, steps=2, warmup=1, every=1))
    dense, gradients = ARMS[arm]
    assert tuple(look["dense"] for look in result["looks"]) == dense and traced == gradients
    assert len(result["losses"]) == 2 and all(5 < loss < 7 for loss in result["losses"]), "about log 256, untrained"
    assert (result["looks"][0]["loss"] != result["looks"][2]["loss"]) and result["arm"] == arm
    ran = {"dense": [], "exact": ["relu2_ffn", "grad_hidden", "unpack"]}.get(arm, ["relu2_ffn", "feature_wise_mm"])
    assert set(ran) <= set(result["ours"]) and bool(ran) == bool(result["ours"])


def test_step(tmp_path):
    out = run("step.py", "--tiny", "--tuned", "--out", str(tmp_path))
    result = json.loads((tmp_path / "step.json").read_text())
    assert [row["what"] for row in result["rows"]] == ["dense", "dense tuned", "2:4 exact", "2:4 sparse"]
    assert all(row["what"] in out for row in result["rows"]) and len(result["losses"]) == result["size"]["steps"]
    assert result["parameters"] == 2 * 12 * 64**2 + (256 + 32 + 256 + 5) * 64
    assert all(0.4 < zeros < 0.6 for zeros in result["looked"]["zeros"])


def test_a_step_of_each_arm_runs_what_the_arm_is_called(monkeypatch):
    """All share modules, of which Dynamo keeps one graph for each way to compile them."""
    monkeypatch.syspath_prepend(STUDY)
    import step
    from study import GPT, TINY, batch

    model = GPT(TINY)
    blocks, optimizer = model.blocks, torch.optim.AdamW(model.parameters())
    pair = batch(torch.randint(256, (1000,), dtype=torch.uint8), TINY, torch.Generator())
    arms = {name: step.compiled(blocks, how) for name, how in step.arms(tuned=False).items()}
    counters.clear()
    for _ in range(2):
        ran = {}
        for name, compiled in arms.items():
            with torch.profiler.profile() as profile:
                step.step(model, compiled, optimizer, itertools.repeat(pair))
            ran[name] = {event.key for event in profile.key_averages() if event.key.startswith("ao_act24::")}
        assert not ran["dense"] and "ao_act24::relu2_ffn" in ran["2:4 exact"] & ran["2:4 sparse"]
        assert "ao_act24::feature_wise" in ran["2:4 sparse"] - ran["2:4 exact"]
    assert counters["stats"]["unique_graphs"] == len(arms)


@pytest.mark.parametrize(("over", "within"), [([0.01, 0.02, 0.03], True), ([0.02, 0.03, 0.05], False), ([0.01], None)])
def test_within_the_spread_of_dense(over, within):
    """Of the same seeds, on average, against the largest difference between dense ones, 0.03 here."""
    spec = importlib.util.spec_from_file_location("of_study", STUDY / "plot.py")  # there is another plot.py
    plot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plot)

    def run(seed, loss):
        look = {"loss": loss, "dense_loss": loss, **{share: [0.0] for share in plot.SHARES}}
        return {"seed": seed, "looks": [look], "tokens/s": 1, "peak_bytes": None, "record": {}}

    dense = [1.0, 1.01, 1.03]
    runs = {"dense": [run(*each) for each in enumerate(dense)]}
    runs["full"] = [run(seed, loss + more) for seed, (loss, more) in enumerate(zip(dense, over))]
    assert [row["within"] for row in plot.table(runs)] == [None, within]
