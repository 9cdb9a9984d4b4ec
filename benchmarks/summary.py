"""The figures that were asked for, from a result of ``hopper.py``: ``python benchmarks/summary.py RESULT.json``.

A result has parts, ``hopper.PARTS``, each with the ``record`` of its run and its ``rows``. A row is one thing timed:
``what``, ``tokens``, ``model_dim``, ``hidden_dim``, ``zeros`` (percent), ``dtype`` where it is not bfloat16,
``samples`` (one a round), their ``median``, ``min`` and ``max`` in ``unit``, and clock, power and energy where they
could be measured.
"""

import argparse
import itertools
import json
import operator
import statistics
from pathlib import Path
from typing import Any

import torch

from ao_act24 import Act24Config
from ao_act24.when import most_few_tokens, why_exact_grads, why_slower

Row = dict[str, Any]
Shape = tuple[int, int, int]  # tokens, model_dim, hidden_dim

FFN_SHAPES: list[Shape] = [(8192, 2048, 8192), (8192, 4096, 16384), (32768, 4096, 16384)]
MATMUL_SHAPES: list[Shape] = [*FFN_SHAPES, (8192, 8192, 32768)]
TRAINING_SHAPES: list[Shape] = [(16384, 2048, 8192), (8192, 4096, 16384), (32768, 4096, 16384)]
REQUIRED: dict[str, dict[Shape, float]] = {
    "matmul over cuBLAS": {(8192, 4096, 16384): 1.42, (32768, 4096, 16384): 1.52},
    "matmul over cuSPARSELt": dict.fromkeys(MATMUL_SHAPES, 1.03),
    "packing over a copy, bytes/s": dict.fromkeys(MATMUL_SHAPES, 0.88),
    "FFN over torch.compile": dict(zip(FFN_SHAPES, (1.12, 1.12, 1.18))),
    "FFN forward and backward over torch.compile, sparse gradients of weights": dict.fromkeys(TRAINING_SHAPES, 1.12),
    "FFN backward over torch.compile, sparse gradients of weights": dict.fromkeys(TRAINING_SHAPES, 1.12),
    "fp8 matmul over _scaled_mm": {(8192, 4096, 16384): 1.38, (32768, 4096, 16384): 1.36},
    "fp8 packing over a copy, bytes/s": dict.fromkeys(FFN_SHAPES, 0.85),
    "fp8 FFN over torch.compile in fp8": dict.fromkeys(FFN_SHAPES[1:], 1.22),
    "fp8 FFN over torch.compile in bf16": dict.fromkeys(FFN_SHAPES[1:], 2.0),
}
AIM = {
    "matmul over cuBLAS": 1.60,
    "matmul over cuSPARSELt": 1.15,
    "packing over a copy, bytes/s": 0.93,
    "FFN over torch.compile": 1.25,
    "FFN energy, dense over 2:4": 1.25,
    "FFN forward and backward over torch.compile, sparse gradients of weights": 1.25,
    "FFN backward over torch.compile, sparse gradients of weights": 1.28,
    "fp8 matmul over _scaled_mm": 1.50,
    "fp8 packing over a copy, bytes/s": 0.92,
    "fp8 FFN over torch.compile in fp8": 1.38,
    "fp8 FFN over torch.compile in bf16": 2.3,
}
ZEROS = [50, 85, 90, 95, 97]  # percent, of few tokens
DECODE: dict[tuple[Shape, int], tuple[float, float | None]] = {  # required and aim, by shape and percent of zeros
    ((1, 8192, 32768), 95): (1.65, 1.85),
    ((4, 8192, 32768), 95): (1.45, 1.6),
    ((1, 8192, 32768), 85): (1.5, None),
}
DTYPES = {"bfloat16": "", "float16": ", fp16", "float8_e4m3fn": ", fp8"}
MOST_TOKENS = 2048  # up to which few tokens must not be slower than dense
LEAST_FEW, MOST_HOST_US = 0.98, 15.0


def shape_of(row: Row) -> Shape:
    return row["tokens"], row["model_dim"], row["hidden_dim"]


def named(shape: Shape) -> str:
    return " × ".join(map(str, shape))


def rows(result: dict[str, Any], part: str, zeros: int = 90, dtype: str = "bfloat16") -> dict[Shape, dict[str, Row]]:
    """The part's rows by shape and by what was timed; none if it was not measured."""
    found: dict[Shape, dict[str, Row]] = {}
    for row in result.get(part, {}).get("rows", ()):
        if row["zeros"] == zeros and row.get("dtype", "bfloat16") == dtype:
            found.setdefault(shape_of(row), {})[row["what"]] = row
    return found


def best(timed: dict[str, Row], dense: str = "dense", how: str = "") -> Row:
    """Of ``torch.compile``'s modes the faster one."""
    modes = (f"{dense}{how}", f"{dense} tuned{how}")
    return min((timed[mode] for mode in modes if mode in timed), key=lambda row: row["median"])


def ratio(timed: dict[str, Row], baseline: str, ours: str = "2:4") -> float | None:
    """How many times as fast ``ours`` is, the median over rounds: noise disturbs both of one. None: not measured."""
    if baseline not in timed or ours not in timed:
        return None
    return statistics.median(map(operator.truediv, timed[baseline]["samples"], timed[ours]["samples"]))


def summary(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each figure: ``required`` (None: to be reported), ``reached``, and whether more or less is better."""
    figures = []

    def add(
        figure: str,
        at: Shape | str,
        reached: float | None,
        required: float | None,
        at_least: bool = True,
        aim: float | None = None,
    ) -> None:
        if reached is not None:
            met = None if required is None else reached >= required if at_least else reached <= required
            size = at if isinstance(at, str) else named(at)
            row = {"figure": figure, "at": size, "required": required, "aim": AIM.get(figure, aim), "reached": reached}
            figures.append({**row, "better": "more" if at_least else "less", "met": met})

    def add_ratio(figure: str, at: Shape, reached: float | None) -> None:
        add(figure, at, reached, REQUIRED.get(figure, {}).get(at))

    matmuls = rows(result, "kernels")
    for baseline in ("cuBLAS", "cuSPARSELt"):
        for shape, timed in matmuls.items():
            add_ratio(f"matmul over {baseline}", shape, ratio(timed, baseline))
    for shape, timed in matmuls.items():
        if "cuSPARSELt" in timed:
            theirs = timed["cuSPARSELt"]["median"] + timed["cuSPARSELt compress"]["median"]
            ours = timed["2:4"]["median"] + timed["pack"]["median"]
            add_ratio("packing and matmul over cuSPARSELt's", shape, theirs / ours)
    for shape, timed in matmuls.items():
        add_ratio(
            "first matmul over cuBLAS's without packing",
            shape,
            ratio(timed, "first matmul, cuBLAS", "first matmul, packing"),
        )
    for shape, timed in matmuls.items():
        add_ratio("packing over a copy, bytes/s", shape, timed["pack"]["TB/s"] / timed["copy"]["TB/s"])
    ffns = rows(result, "ffn")
    for shape, timed in ffns.items():
        add_ratio("FFN over torch.compile", shape, ratio(timed, best(timed)["what"]))
    for shape, timed in ffns.items():
        dense, sparse = best(timed)["joules"], timed["2:4"]["joules"]
        if dense is not None and sparse is not None:
            add_ratio("FFN energy, dense over 2:4", shape, dense / sparse)
    for shape, timed in rows(result, "training").items():
        for prefix, part in (("", "forward and backward"), ("backward ", "backward")):
            dense = best(timed, f"{prefix}dense")["what"]
            for how in ("exact", "sparse"):
                figure = f"FFN {part} over torch.compile, {how} gradients of weights"
                add_ratio(figure, shape, ratio(timed, dense, f"{prefix}2:4 {how}"))
    for shape, timed in rows(result, "fp8").items():
        for baseline in ("_scaled_mm", "cuSPARSELt"):
            add_ratio(f"fp8 matmul over {baseline}", shape, ratio(timed, baseline))
        first = ratio(timed, "first matmul, _scaled_mm", "first matmul, packing")
        add_ratio("first fp8 matmul over _scaled_mm without packing", shape, first)
        add_ratio("fp8 packing over a copy, bytes/s", shape, timed["pack"]["TB/s"] / timed["copy"]["TB/s"])
    for shape, timed in rows(result, "fp8-ffn").items():
        for suffix, dtype in ((" fp8", "fp8"), ("", "bf16")):
            dense = best(timed, how=suffix)["what"]
            add_ratio(f"fp8 FFN over torch.compile in {dtype}", shape, ratio(timed, dense, "2:4 fp8"))
        add_ratio("fp8 FFN over 2:4 in bf16", shape, ratio(timed, "2:4", "2:4 fp8"))
        errors = timed["2:4 fp8"]
        add("error that 2:4 adds, of what fp8 adds by itself", shape, errors["error"] / errors["fp8_error"], 1.0, False)
    least_of_all = []
    for zeros, common in itertools.product(ZEROS, ("", " common")):
        for shape, timed in rows(result, "decode", zeros).items():
            if f"few{common}" not in timed:
                continue
            baseline = min((timed[f"{name}{common}"] for name in ("cuBLAS", "dense")), key=lambda row: row["median"])
            reached = ratio(timed, baseline["what"], f"few{common}")
            least_of_all.append((reached, f"{named(shape)}, {zeros} %{common}"))
            if "few called" in timed and not common and shape[0] <= most_few_tokens(*shape[1:], shape[1], False):
                as_called = ratio(timed, "dense called", "few called")
                least_of_all.append((as_called, f"{named(shape)}, {zeros} %, without a graph"))
            if (figure := (shape, zeros)) in DECODE and not common:
                required, aim = DECODE[figure]
                add(f"FFN of few tokens, {zeros} % zeros", shape, reached, required, aim=aim)
    if least_of_all:
        slowest, where = min(least_of_all)
        add("FFN of up to 64 tokens over dense: least", where, slowest, LEAST_FEW)
    for zeros in ZEROS:
        for shape, timed in rows(result, "decode-fp8", zeros).items():
            for name, dtype in (("dense fp8", "fp8"), ("dense", "bf16")):
                figure = f"FFN of few tokens in fp8 over dense {dtype}, {zeros} % zeros"
                add_ratio(figure, shape, ratio(timed, name, "few fp8"))
    for dtype, how in itertools.product(("bfloat16", "float16"), ("", " graph")):
        few = [
            (ratio(timed, best(timed, how=how)["what"], f"chosen{how}"), at)
            for at, timed in rows(result, "tokens", dtype=dtype).items()
            if at[0] <= MOST_TOKENS
        ]
        if few:
            slowest, shape = min(few)
            figure = "FFN of few tokens over dense" + (", fp16" if dtype == "float16" else "")
            add(f"{figure}{', in a CUDA graph' if how else ''}: least", shape, slowest, LEAST_FEW)
    taken = [
        (ratio(timed, best(timed)["what"], ours), f"{named(at)}, {zeros} %{DTYPES[dtype]}{steps}")
        for part, zeros, dtype in itertools.product(("rule", "outside", "rule-fp8"), (90, 97), DTYPES)
        for at, timed in rows(result, part, zeros, dtype).items()
        for ours, packs, steps in (("2:4", True, ""), ("2:4 in two steps", False, ", two steps"))
        if ours in timed and not why_slower(*at, in_rows=True, training=False, packs=packs)
    ]
    if taken:
        slowest, where = min(taken)
        add("FFN over dense where the rule takes 2:4, in a CUDA graph: least", where, slowest, LEAST_FEW)
    trained = [
        (ratio(timed, best(timed)["what"], f"2:4 {how}"), f"{named(at)}, {how}")
        for part in ("training", "rule-training")
        for at, timed in rows(result, part).items()
        for how in ("exact", "sparse")
        if not why_slower(*at, in_rows=True, training=True, packs=True)
        and (how == "exact" or not why_exact_grads(torch.device("cuda"), *at, Act24Config()))
    ]
    if trained:
        slowest, where = min(trained)
        add("FFN forward and backward over dense where the rule takes 2:4: least", where, slowest, LEAST_FEW)
    for how in ("host", "host graph"):
        for shape, timed in rows(result, "tokens").items():
            if f"{how} 2:4" in timed:
                added = timed[f"{how} 2:4"]["median"] - timed[f"{how} dense"]["median"]
                figure = "host time that 2:4 adds, µs" + (", replaying a CUDA graph" if "graph" in how else "")
                add(figure, shape, added, MOST_HOST_US, at_least=False)
    return figures


def show(figures: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "T × D × H", "required", "aim", "reached", "")
    for row in figures:
        sign = "≥" if row["better"] == "more" else "≤"
        bounds = [f"{sign} {row[bound]:g}" if row[bound] is not None else "" for bound in ("required", "aim")]
        verdict = {None: "", True: "[green]yes", False: "[red]no"}[row["met"]]
        table.add_row(row["figure"], row["at"], *bounds, f"{row['reached']:.3f}", verdict)
    Console(width=120).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    path = parser.parse_args().result
    figures = summary(json.loads(path.read_text()))
    if not figures:
        parser.exit(2, f"{path} is no result of hopper.py: it has none of its parts\n")
    show(figures)
