"""The parts of the benchmarks that need no GPU: arithmetic on results, pictures, and reading what a sanitizer prints.

Every figure here is made up.
"""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import generate
import hopper
import machine
import plot
import pytest
import sanitize
import summary as summary_of
import timing
import torch
from summary import FFN_SHAPES, MATMUL_SHAPES, named, show, summary
from test_csrc import instructions

from ao_act24.kernels import compile, plans, schedule

HOST = (16, 2048, 8192)


def timed(shape, zeros=90, dtype=torch.bfloat16, **ms):
    """Rows of what took how many ms: a name's underscores are spaces, and ``x24`` is 2:4."""
    names = {name: name.replace("_", " ").replace("x24", "2:4") for name in ms}
    found = {names[name]: timing.row(names[name], "ms", [1.01 * ms[name], ms[name], 0.98 * ms[name]]) for name in ms}
    return hopper.placed(found, shape, zeros, dtype)


@pytest.fixture
def made_up():
    kernels, ffns, tokens = [], [], []
    for zeros in (50, 90, 97):
        for shape in MATMUL_SHAPES if zeros == 90 else FFN_SHAPES[1:]:
            kernels += timed(
                shape, zeros, cuBLAS=1.5, x24=1.0, cuSPARSELt=1.02, cuSPARSELt_compress=3, pack=0.1, copy=0.12
            )
            kernels[-2]["TB/s"], kernels[-1]["TB/s"] = 3.8, 4.0
        for shape in FFN_SHAPES if zeros == 90 else FFN_SHAPES[1:]:
            ffns += timed(shape, zeros, dense=2.5, dense_tuned=2.4, x24=2.0)
            for row, joules in zip(ffns[-3:], (1.7, 1.5, 1.2)):
                row["joules"] = joules
    for shape, chosen in ((HOST, 0.1), ((1024, 4096, 16384), 0.12), ((4096, 4096, 16384), 0.05)):
        tokens += timed(shape, dense=0.1, chosen=chosen, x24=0.2, dense_graph=0.1, chosen_graph=0.1, x24_graph=0.1)
    tokens += timed(HOST, host_dense=50, host_x24=70, host_graph_dense=6, host_graph_x24=7)
    training = timed(FFN_SHAPES[1], dense=6, dense_tuned=5, x24_exact=4.5, x24_sparse=4)
    training += timed(
        FFN_SHAPES[1], backward_dense=4, backward_dense_tuned=4.5, backward_x24_exact=3, backward_x24_sparse=2
    )
    fp8 = timed(FFN_SHAPES[1], _scaled_mm=0.75, x24=0.5, cuSPARSELt=0.55, pack=0.1, copy=0.12)
    for row, speed in zip(fp8[-2:], (3.6, 4.0)):
        row["TB/s"] = speed
    fp8[0]["what"] = "_scaled_mm"
    fp8 += timed(FFN_SHAPES[1], **{"first matmul, _scaled_mm": 0.75, "first matmul, packing": 0.8})
    fp8[-2]["what"] = "first matmul, _scaled_mm"
    fp8_ffn = timed(FFN_SHAPES[1], dense=3.0, dense_tuned=2.5, x24=2.0)
    for row in timed(FFN_SHAPES[1], dense=1.5, dense_tuned=1.6, x24=1.0):
        fp8_ffn.append(row | {"what": f"{row['what']} fp8"})
    fp8_ffn[-1] |= {"error": 0.01, "fp8_error": 0.04}
    parts = {"kernels": kernels, "ffn": ffns, "tokens": tokens, "training": training, "fp8": fp8, "fp8-ffn": fp8_ffn}
    return {part: {"record": {"gpu": "made up"}, "rows": rows} for part, rows in parts.items()}


def test_summary(made_up, capsys):
    figures = summary(made_up)
    reached = {(row["figure"], row["at"]): (row["reached"], row["required"], row["met"]) for row in figures}
    middle = "8192 × 4096 × 16384"
    assert len(reached) == len(figures) == 4 * 4 + 2 * 3 + 2 + 2 + 4 + 3 + 6
    assert reached["fp8 matmul over _scaled_mm", middle] == (1.5, 1.38, True)
    assert reached["fp8 matmul over cuSPARSELt", middle] == (pytest.approx(1.1), None, None)
    assert reached["fp8 packing over a copy, bytes/s", middle] == (pytest.approx(0.9), 0.85, True)
    assert reached["first fp8 matmul over _scaled_mm without packing", middle][0] == pytest.approx(0.75 / 0.8)
    assert reached["fp8 FFN over torch.compile in fp8", middle] == (pytest.approx(1.5), 1.22, True)
    assert reached["fp8 FFN over torch.compile in bf16", middle] == (pytest.approx(2.5), 2.0, True)
    assert reached["fp8 FFN over 2:4 in bf16", middle] == (pytest.approx(2.0), None, None)
    assert reached["error that 2:4 adds, of what fp8 adds by itself", middle] == (0.25, 1.0, True)
    both = "FFN forward and backward over torch.compile"
    assert reached[f"{both}, exact gradients of weights", middle] == (pytest.approx(5 / 4.5), None, None)
    assert reached[f"{both}, sparse gradients of weights", middle] == (pytest.approx(5 / 4), 1.12, True)
    backward = "FFN backward over torch.compile, sparse gradients of weights"
    assert reached[backward, middle] == (pytest.approx(2), 1.12, True)
    assert reached["matmul over cuBLAS", middle] == (1.5, 1.42, True)
    assert reached["matmul over cuBLAS", "8192 × 2048 × 8192"] == (1.5, None, None)
    assert reached["matmul over cuSPARSELt", middle] == (1.02, 1.03, False)
    assert reached["packing and matmul over cuSPARSELt's", middle] == (pytest.approx(4.02 / 1.1), None, None)
    assert reached["packing over a copy, bytes/s", middle] == (pytest.approx(0.95), 0.88, True)
    assert reached["FFN over torch.compile", middle] == (pytest.approx(1.2), 1.12, True), "the better mode counts"
    assert reached["FFN energy, dense over 2:4", middle] == (pytest.approx(1.25), None, None)
    few = "FFN of few tokens over dense"
    assert reached[f"{few}: least", "1024 × 4096 × 16384"] == (pytest.approx(0.1 / 0.12), 0.98, False)
    assert reached[f"{few}, in a CUDA graph: least", "16 × 2048 × 8192"] == (1, 0.98, True)
    host = "host time that 2:4 adds, µs"
    assert reached[host, "16 × 2048 × 8192"] == (20, 15, False)
    assert reached[f"{host}, replaying a CUDA graph", "16 × 2048 × 8192"] == (1, 15, True)
    show(figures)
    assert "≥ 1.42" in capsys.readouterr().out
    assert not summary({}), "parts that were not measured are left out"


def test_a_file_of_another_kind(tmp_path):
    path = tmp_path / "limits.json"
    path.write_text('{"rows": []}')
    ran = subprocess.run([sys.executable, summary_of.__file__, path], capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stderr.endswith(f"{path} is no result of hopper.py: it has none of its parts\n")


def test_generating(monkeypatch):
    """In small, on a CPU; zeros come out as they were asked for, and the same tokens in all ways."""
    monkeypatch.setattr(generate, "BATCHES", [2])
    monkeypatch.setattr(generate, "ROUNDS", 1)
    rows = [row for found in generate.measured(generate.TINY, "cpu") for row in found]
    assert [(row["how"], row["batch"], row["shift for"], row["backend"]) for row in rows] == [
        (how, 2, percent, backend)
        for how, backends in (("step", ("inductor", "ao_act24", "eager")), ("generate", ("inductor", "ao_act24")))
        for percent in (85, 95)
        for backend in backends
    ]
    assert all(abs(row["zeros"] - row["shift for"] / 100) < 0.02 and row["tokens/s"] > 0 for row in rows)
    assert all(row["same tokens"] == 1 for row in rows)
    model, ids = generate.model_of(generate.TINY, "cpu"), torch.arange(1, 17).view(2, 8)
    with torch.no_grad():
        ways = [how(model, ids, generate.TINY, "eager")() for how in (generate.step, generate.generate)]
    assert torch.equal(*ways)


def test_few_tokens_by_the_neurons_that_fire():
    shape, other = (1, 8192, 32768), (64, 4096, 16384)
    decode = timed(shape, 95, cuBLAS=0.26, dense=0.25, few=0.125) + timed(shape, 90, cuBLAS=0.25, dense=0.3, few=0.2)
    common = timed(other, 50, cuBLAS=0.09, dense=0.08, few=0.1)
    for row in common:
        row["what"] += " common"
    found = summary({"decode": {"rows": decode + common}})
    assert [(row["figure"], row["at"], row["required"], row["aim"], row["met"]) for row in found] == [
        ("FFN of few tokens, 95 % zeros", named(shape), 1.65, 1.85, True),
        ("FFN of up to 64 tokens over dense: least", f"{named(other)}, 50 % common", 0.98, None, False),
    ]
    assert [row["reached"] for row in found] == [pytest.approx(2.0), pytest.approx(0.8)]


def test_few_tokens_are_drawn_by_zeros():
    decode = []
    for zeros, took in zip(plot.ZEROS, (0.2, 0.16, 0.15, 0.125, 0.12)):
        decode += timed((1, 8192, 32768), zeros, cuBLAS=0.26, dense=0.25, few=took)
        decode += timed((8, 8192, 32768), zeros, cuBLAS=0.25, dense=0.3, few=0.25)
    decode += timed((1, 2048, 8192), 95, cuBLAS=0.26, dense=0.25, few=0.1)  # not measured at all of them
    (panel,) = plot.few({"decode": {"rows": decode}}).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in panel.lines}
    assert panel.get_title() == "8192 × 32768" and drawn["1 token"][3] == pytest.approx(2)
    assert drawn["8 tokens"] == [1] * 5 and drawn["2 tokens"] == [None] * 5


def test_few_tokens_over_the_faster_dense_mode():
    """In fp16 apart."""
    start = (1024, 4096, 16384)
    bf16 = timed(start, dense=1.3, dense_tuned=1.1, chosen=1, dense_graph=1.2, dense_tuned_graph=1.3, chosen_graph=1)
    fp16 = timed(start, dtype=torch.float16, dense=1, chosen=2, dense_graph=1, chosen_graph=4)
    reached = {row["figure"]: row["reached"] for row in summary({"tokens": {"rows": bf16 + fp16}})}
    few = "FFN of few tokens over dense"
    assert reached == {
        f"{few}: least": pytest.approx(1.1),
        f"{few}, in a CUDA graph: least": pytest.approx(1.2),
        f"{few}, fp16: least": 0.5,
        f"{few}, fp16, in a CUDA graph: least": 0.25,
    }
    assert "chosen float16" in hopper.line(fp16[1])


def test_the_least_of_what_the_rule_takes(monkeypatch):
    """Taken or not, in one step or two, at any share of zeros and in any dtype."""
    even = timed(FFN_SHAPES[0], dense=1.3, dense_tuned=1.2, x24=1, x24_in_two_steps=1.25)
    uneven = timed(FFN_SHAPES[1], 97, dense=1.1, dense_tuned=1.2, x24=1)
    half = timed(FFN_SHAPES[2], dtype=torch.float16, dense=0.9, x24=1)
    fp8 = timed(FFN_SHAPES[2], dtype=torch.float8_e4m3fn, dense=0.8, x24=1)

    def least(*taken, in_fp8=False):
        def why_slower(*shape, in_rows, training, packs):
            return "" if (shape, packs) in taken and in_rows and not training else "slower"

        monkeypatch.setattr(summary_of, "why_slower", why_slower)
        parts = {"rule": {"rows": even}, "outside": {"rows": uneven + half}, "rule-fp8": {"rows": fp8 * in_fp8}}
        return [(row["at"], row["reached"], row["met"]) for row in summary(parts)]

    at = [named(shape) for shape in FFN_SHAPES]
    one, two, three = ((shape, True) for shape in FFN_SHAPES)
    assert least(one) == [(f"{at[0]}, 90 %", pytest.approx(1.2), True)]
    assert least(one, two, (FFN_SHAPES[0], False)) == [(f"{at[0]}, 90 %, two steps", pytest.approx(0.96), False)]
    assert least(one, two) == [(f"{at[1]}, 97 %", pytest.approx(1.1), True)]
    assert least(one, two, three) == [(f"{at[2]}, 90 %, fp16", pytest.approx(0.9), False)]
    assert least(one, two, three, in_fp8=True) == [(f"{at[2]}, 90 %, fp8", pytest.approx(0.8), False)]
    assert least() == []


def test_the_least_of_what_the_rule_takes_in_training(monkeypatch):
    """Sparse gradients of weights where the rule takes them, too."""
    measured = timed(FFN_SHAPES[0], dense=1.3, dense_tuned=1.2, x24_exact=1, x24_sparse=0.8)
    edge = timed(FFN_SHAPES[1], dense=1.1, x24_exact=1, x24_sparse=2)

    def least(*taken, sparse=()):
        monkeypatch.setattr(summary_of, "why_slower", lambda *shape, training, **_: "" if shape in taken else "slower")
        monkeypatch.setattr(summary_of, "why_exact_grads", lambda _, *at: "" if at[:3] in sparse else "slower")
        found = summary({"rule-training": {"rows": measured + edge}})
        return [(row["at"], row["reached"], row["met"]) for row in found]

    one, two = FFN_SHAPES[:2]
    assert least(one) == [(f"{named(one)}, exact", pytest.approx(1.2), True)]
    assert least(one, two, sparse=(one,)) == [(f"{named(two)}, exact", pytest.approx(1.1), True)]
    assert least(two, sparse=(one, two)) == [(f"{named(two)}, sparse", pytest.approx(0.55), False)]
    assert least(sparse=(one, two)) == []


def test_the_committed_results_meet_all_that_is_required():
    """Nothing that the rule takes, as it is now, was measured slower than dense, inference and training."""
    figures = summary(json.loads((Path(hopper.__file__).parent / "results" / "hopper.json").read_text()))
    assert sum("the rule takes" in row["figure"] for row in figures) == 2
    assert not [row for row in figures if row["met"] is False]


def test_what_disturbs_a_round_disturbs_both(made_up):
    """Ratios are medians over rounds, not of medians; in pictures, too."""
    rows = [row for row in made_up["ffn"]["rows"] if row["zeros"] == 90]
    shape = rows[0]["tokens"], rows[0]["model_dim"], rows[0]["hidden_dim"]
    for row, samples in zip(rows, ([2.0, 20.0, 2.4], [2.1, 21.0, 2.5], [2.0, 20.0, 2.0])):
        row.update(samples=samples, median=sorted(samples)[1])
    (found,) = (r for r in summary(made_up) if r["figure"] == "FFN over torch.compile" and r["at"] == named(shape))
    assert found["reached"] == 1.0
    assert plot.speed(made_up).axes[1].containers[0].datavalues[0] == 1.0


def test_pictures(made_up, tmp_path):
    path = tmp_path / "made-up.json"
    machine.save(made_up, path)
    written = plot.main(path)
    assert [picture.name for picture in written] == [f"made-up-{name}.png" for name in ("speed", "tokens", "zeros")]
    assert all(picture.stat().st_size > 10_000 for picture in written)
    machine.save({"tokens": made_up["tokens"]}, path)
    assert len(plot.main(path)) == 1


def test_results_are_short_and_the_same_when_read_again(made_up, tmp_path):
    made_up["ffn"]["rows"][0]["watts"] = [700.123456789, None, 1.23456789e-05]
    machine.save(made_up, tmp_path / "made-up.json")
    text = (tmp_path / "made-up.json").read_text()
    assert "[ 700.123, null, 1.23457e-05 ]" in text
    assert [row["what"] for row in json.loads(text)["ffn"]["rows"]] == [row["what"] for row in made_up["ffn"]["rows"]]


def test_power_is_taken_between_steps_of_the_counter():
    # it stands at what was drawn up to its last step: of 700 W, every 0.1 s
    samples = [(at / 200, 70.0 * (at // 20), 1500) for at in range(7, 300)]
    assert machine.mean_watts(samples) == pytest.approx(700)
    assert machine.mean_watts(samples[:100]) is None, "two far steps are needed"
    assert machine.mean_watts([]) is None


def test_a_commit_is_a_checkouts_own(tmp_path):
    assert machine.commit(tmp_path) == "unknown"

    def git(*command):
        who = ("-c", "user.name=a", "-c", "user.email=a")
        subprocess.run(("git", "-C", tmp_path, *who, *command), check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-q", "-m", "1")
    commit = machine.commit(tmp_path)
    assert len(commit) == 40
    assert machine.commit(tmp_path / "kernels") == "unknown", "inside of another repository"
    (tmp_path / "result.json").write_text("")
    assert machine.commit(tmp_path) == commit
    (tmp_path / "kernels" / "a.py").write_text("2")
    assert machine.commit(tmp_path) == f"{commit}-changed"


def test_the_short_run_measures_host_time():
    assert hopper.HOST_AT[0] in hopper.TOKENS[::2] and hopper.HOST_AT[1:] == hopper.FEW_SIZES[0]


CLEAN = f"========= COMPUTE-SANITIZER\n{sanitize.DONE}\n========= ERROR SUMMARY: 0 errors\n"
INVALID = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at relu2_sparsify+0x110
=========     by thread (0,0,0) in block (3,0,0)
=========     Address 0x7f0000 is out of bounds
=========
========= Error: Target application returned an error
========= ERROR SUMMARY: 256 errors
========= ERROR SUMMARY: 236 errors were not printed. Use --print-limit option to adjust the number of printed errors
"""
RACE = f"""========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at sparse_mm+0x140
=========     and Read access at sparse_mm+0xe0 [4 hazards]
{sanitize.DONE}
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""


@pytest.mark.parametrize(
    ("text", "more", "state", "errors", "ours"),
    [
        (CLEAN, {}, "clean", 0, 0),
        (CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"), {},
         "clean", 0, 0),
        (CLEAN.replace(sanitize.DONE, "Traceback"), {}, "broke off", 0, 0),
        (f"{sanitize.DONE}\n", {}, "broke off", None, 0),
        (CLEAN, {"ended": False}, f"not done after {sanitize.LIMIT_S} s", 0, 0),
        (INVALID, {}, "256 errors", 256, 1),
        (RACE, {}, "1 errors", 1, 1),
        (INVALID, {"planted": True}, "caught", 256, 1),
        (INVALID.replace("relu2_sparsify", "fill_kernel"), {"planted": True}, "missed", 256, 0),
        (RACE.replace("sparse_mm", "planted_race"), {"planted": True}, "caught", 1, 1),
        (CLEAN, {"planted": True}, "missed", 0, 0),
    ],
)  # fmt: skip
def test_sanitizer_output(text, more, state, errors, ours):
    found = sanitize.judged(text, **more)
    assert (found["state"], found["errors"], len(found["ours"])) == (state, errors, ours)
    assert ("output" in found) == (state not in ("clean", "caught"))
    if text == RACE:
        assert found["warnings"] == 1
        assert found["ours"][0].endswith("sparse_mm+0x140; and Read access at sparse_mm+0xe0 [4 hazards]")
    sanitize.show([{"tool": "memcheck", "case": "x", "seconds": 1, **found}])


def test_a_sanitizer_that_hangs_is_ended(tmp_path, monkeypatch):
    (tmp_path / "sanitizer").write_text("#!/bin/sh\necho $2 $*\nsleep 60\n")
    (tmp_path / "sanitizer").chmod(0o700)
    monkeypatch.setattr(sanitize, "LIMIT_S", 0.3)
    found = sanitize.run(str(tmp_path / "sanitizer"), "racecheck", "relu2_sparsify")
    assert (found["state"], found["seconds"]) == ("not done after 0.3 s", 0)
    assert (
        found["output"][0].startswith("racecheck --tool racecheck")
        and "--workload relu2_sparsify" in found["output"][0]
    )


def test_the_sanitizers_see_every_kernel():
    (first,) = sanitize.FIRST.values()
    second = [size for sizes in sanitize.MATMULS.values() for size in sizes]
    for sizes in (second, [(tokens, hidden_dim, model_dim) for tokens, model_dim, hidden_dim in first]):
        shapes = [schedule.share_out(*size, 66) for size in sizes]
        assert any(shape.rounds and clusters > 50 for shape, clusters in shapes) and any(s.late for s, _ in shapes)
        assert {(shape.whole > 0, shape.lower_height) for shape, _ in shapes} == set(itertools.product((0, 1), (1, 2)))
    source = "".join(path.read_text() for path in compile.CSRC.glob("*.cu"))
    entries = re.findall(r"^MATMUL (\w+)|__launch_bounds__\([^)]*\)\s+(\w+)\(", source, re.MULTILINE)
    assert {matmul or other for matmul, other in entries} == set(sanitize.KERNELS) and len(entries) == 17


def test_the_planted_race(tmp_path):
    sass = " ".join(instructions(bytes(sanitize.compiled_race().code), tmp_path))
    assert re.search(r"\bSTS\b.*\bLDS\b", sass) and "BAR" not in sass


def test_a_wait_without_a_bound(tmp_path, monkeypatch):
    """The macro reaches the kernel: without the bound there is nothing to trap."""
    monkeypatch.setenv("AO_ACT24_CACHE_DIR", str(tmp_path))
    defines = plans.matmul_defines("sparse_mm", torch.bfloat16)
    bounded, unbounded = (compile.cubin("sparse_mm", {**defines, **more}) for more in ({}, sanitize.UNBOUNDED))
    assert bounded != unbounded


@pytest.mark.parametrize("script", [hopper, sanitize, generate])
def test_without_a_gpu(script, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["it.py"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("it.py needs a") and "GPU, found none" in said


@pytest.mark.parametrize("names", ["ab", "abc", "abcd"])
def test_each_variant_comes_first_and_last_as_often(names, monkeypatch):
    started = []
    monkeypatch.setattr(timing, "burst", lambda run, calls: started.append(run) or 1.0)
    timing.in_turn({name: name for name in names}, 0.003, 2 * len(names))
    orders = [started[i + 1 : i + 2 * len(names) : 2] for i in range(2 * len(names), len(started), 2 * len(names))]
    assert len(orders) == 2 * len(names) and all(sorted(order) == list(names) for order in orders)
    assert all([order[at] for order in orders].count(name) == 2 for name in names for at in (0, -1))
