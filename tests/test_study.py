"""The study of training in small: it runs, and its results become a table and a picture."""

import json
import subprocess
import sys
from pathlib import Path

STUDY = Path(__file__).parent.parent / "benchmarks" / "training"


def run(script, *arguments):
    done = subprocess.run([sys.executable, STUDY / script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_study(tmp_path):
    run("study.py", "full", "--tiny", "--seed", "3", "--out", str(tmp_path))
    result = json.loads((tmp_path / "full-3.json").read_text())
    assert [(look["step"], look["dense"]) for look in result["looks"]] == [(0, True), (3, False), (6, False)]
    assert result["losses"][-1] < result["losses"][0] and len(result["losses"]) == 6
    last = result["looks"][-1]
    assert all(len(last[share]) == 2 for share in ("zeros", "dropped", "dropped_across_tokens"))
    assert all(0.4 < zeros < 0.6 for zeros in last["zeros"]) and all(0.1 < dropped < 0.3 for dropped in last["dropped"])
    assert all(0 < dropped < 0.2 for dropped in last["dropped_across_tokens"])
    for arm, seed in (("dense", 0), ("full", 4)):
        (tmp_path / f"{arm}-{seed}.json").write_text(json.dumps({**result, "arm": arm, "seed": seed}))
    out = run("plot.py", str(tmp_path))
    assert "dense" in out and "no-split" not in out and (tmp_path / "study.png").stat().st_size > 10_000
