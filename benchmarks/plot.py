"""A result of ``hopper.py`` as pictures beside it: ``python benchmarks/plot.py benchmarks/results/hopper.json``."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from summary import AIM, FFN_SHAPES, LEAST_FEW, MATMUL_SHAPES, MOST_TOKENS, REQUIRED, ZEROS, Shape, best, ratio, rows

COLOURS = ("#0b6e4f", "#d0782a", "#1d4e89", "#7a5195")
REQUIRED_COLOUR, AIM_COLOUR = "#c1121f", "#6c757d"
Bars = Mapping[str, Sequence[float | None]]


def speed(result: dict[str, Any]) -> Figure:
    """The second matmul and the whole FFN over their baselines, by shape."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(4, 3))
    matmuls, ffns = rows(result, "kernels"), rows(result, "ffn")
    shapes = [shape for shape in MATMUL_SHAPES if shape in matmuls]
    over = {
        f"over {baseline}": [ratio(matmuls[shape], baseline) for shape in shapes]
        for baseline in ("cuBLAS", "cuSPARSELt")
    }
    bars(left, labels(shapes), over)
    for number, figure_name in enumerate(("matmul over cuBLAS", "matmul over cuSPARSELt")):
        bounds(left, shapes, figure_name, number, len(over))
    finish(left, "Second matmul in 2:4", "times as fast")
    shapes = [shape for shape in FFN_SHAPES if shape in ffns]
    reached = [ratio(ffns[shape], best(ffns[shape])["what"]) for shape in shapes]
    bars(right, labels(shapes), {"over torch.compile": reached})
    bounds(right, shapes, "FFN over torch.compile", 0, 1)
    finish(right, "Whole FFN, forward", "")
    return figure


def tokens(result: dict[str, Any]) -> Figure:
    """The FFN over dense by number of tokens: what the rule chooses, and 2:4 always; as called, and in a CUDA graph."""
    measured = rows(result, "tokens")
    sizes = sorted({shape[1:] for shape in measured if sum(other[1:] == shape[1:] for other in measured) > 2})
    figure, panels = plt.subplots(
        2,
        max(len(sizes), 1),
        figsize=(1 + 2.3 * max(len(sizes), 1), 5),
        squeeze=False,
        sharex=True,
        sharey="row",
        layout="constrained",
    )
    for column, (model_dim, hidden_dim) in enumerate(sizes):
        at = sorted(shape for shape in measured if shape[1:] == (model_dim, hidden_dim))
        for panel, how in zip(panels[:, column], ("", " graph")):
            for colour, what in zip(COLOURS, ("chosen", "2:4")):
                over = [ratio(measured[shape], f"dense{how}", f"{what}{how}") for shape in at]
                label = "what the rule chooses" if what == "chosen" else "2:4 always"
                panel.plot([shape[0] for shape in at], over, marker="o", markersize=4, color=colour, label=label)
            panel.axhline(1, color=AIM_COLOUR, linewidth=0.8)
            panel.hlines(LEAST_FEW, 1, MOST_TOKENS, color=REQUIRED_COLOUR, linewidth=0.8, label="required")
            panel.set_xscale("log", base=2)
            panel.set_xticks([1, 16, 256, 4096])
            panel.xaxis.set_major_formatter("{x:g}")
            finish(panel, "" if how else f"{model_dim} × {hidden_dim}", "")
            panel.get_legend().remove()
    for panel, how in zip(panels[:, 0], ("", "\nin a CUDA graph")):
        panel.set_ylabel(f"times as fast as dense{how}")
    for panel in panels[1]:
        panel.set_xlabel("tokens")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def zeros(result: dict[str, Any]) -> Figure:
    """Matmul and FFN over dense, by share of zeros."""
    shapes = [shape for shape in FFN_SHAPES if shape in rows(result, "kernels", 50)]
    figure, panels = plt.subplots(1, max(len(shapes), 1), figsize=(1 + 4.5 * max(len(shapes), 1), 4), squeeze=False)
    for panel, shape in zip(panels[0], shapes):
        over: dict[str, list[float | None]] = {"matmul over cuBLAS": [], "FFN over torch.compile": []}
        for percent in (50, 90, 97):
            over["matmul over cuBLAS"].append(ratio(rows(result, "kernels", percent).get(shape, {}), "cuBLAS"))
            ffn = rows(result, "ffn", percent).get(shape, {})
            over["FFN over torch.compile"].append(ratio(ffn, best(ffn)["what"]) if ffn else None)
        bars(panel, ["50 % zeros", "90 %", "97 %"], over)
        finish(panel, labels([shape])[0].replace("\n", " × "), "times as fast")
    return figure


def few(result: dict[str, Any]) -> Figure:
    """Few tokens over dense, by the share of zeros, each token's its own."""
    measured = {zeros: rows(result, "decode", zeros) for zeros in ZEROS}
    sizes = sorted({shape[1:] for shape in measured[ZEROS[1]]})
    figure, panels = plt.subplots(1, max(len(sizes), 1), figsize=(1 + 4.5 * max(len(sizes), 1), 4), squeeze=False)
    for panel, size in zip(panels[0], sizes):
        for colour, tokens in zip(COLOURS, (1, 2, 4, 8)):
            over = []
            for zeros in ZEROS:
                timed = measured[zeros].get((tokens, *size), {})
                dense = min((timed[name] for name in ("cuBLAS", "dense") if name in timed), key=_median, default=None)
                over.append(dense and ratio(timed, dense["what"], "few"))
            panel.plot(
                ZEROS, over, marker="o", markersize=4, color=colour, label=f"{tokens} token" + "s" * (tokens > 1)
            )
        panel.axhline(1, color=AIM_COLOUR, linewidth=0.8)
        panel.set_xticks(ZEROS)
        panel.set_xlabel("% zeros")
        finish(panel, f"{size[0]} × {size[1]}", "times as fast as dense")
    return figure


def _median(row: Mapping[str, Any]) -> float:
    return float(row["median"])


def labels(shapes: Sequence[Shape]) -> list[str]:
    return [f"{tokens} tokens\n{model_dim} × {hidden_dim}" for tokens, model_dim, hidden_dim in shapes]


def bars(panel: Axes, names: Sequence[str], groups: Bars) -> None:
    """A group of bars a name, each with its height; what was not measured has none."""
    width = 0.8 / len(groups)
    for number, (label, heights) in enumerate(groups.items()):
        at = [place + (number + 0.5) * width - 0.4 for place in range(len(names))]
        drawn = panel.bar(at, [height or 0 for height in heights], 0.92 * width, color=COLOURS[number], label=label)
        texts = [f"{height:.3f}" if height else "" for height in heights]
        panel.bar_label(drawn, texts, label_type="center", color="white", fontsize=9)
    panel.set_xticks(range(len(names)), names, fontsize=8)
    panel.axhline(1, color=AIM_COLOUR, linewidth=0.8)
    panel.set_ylim(0, 1.25 * max([1.0, *(height or 0 for heights in groups.values() for height in heights)]))


def bounds(panel: Axes, shapes: Sequence[Shape], figure: str, number: int, of: int) -> None:
    """What is required of, and aimed at with, bar ``number`` of each group of ``of``."""
    width = 0.8 / of
    for place, shape in enumerate(shapes):
        ends = place + number * width - 0.4, place + (number + 1) * width - 0.4
        if shape in REQUIRED[figure]:
            label = "required" if "required" not in panel.get_legend_handles_labels()[1] else ""
            panel.hlines(REQUIRED[figure][shape], *ends, color=REQUIRED_COLOUR, linewidth=1.5, label=label)
        label = "aim" if "aim" not in panel.get_legend_handles_labels()[1] else ""
        panel.hlines(AIM[figure], *ends, color=AIM_COLOUR, linestyle="dotted", label=label)


def finish(panel: Axes, title: str, y: str) -> None:
    panel.set_title(title, fontsize=10)
    panel.set_ylabel(y)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)
    if panel.get_legend_handles_labels()[1]:
        panel.legend(fontsize=8, frameon=False, loc="upper left", ncols=2 if len(panel.containers) else 1)


def main(path: Path) -> list[Path]:
    """Each picture of which something was measured."""
    result = json.loads(path.read_text())
    needs = {"speed": rows(result, "kernels") and rows(result, "ffn"), "tokens": rows(result, "tokens")}
    needs["zeros"], needs["few"] = rows(result, "kernels", 50), rows(result, "decode", ZEROS[1])
    written = []
    for name, draw in (("speed", speed), ("tokens", tokens), ("zeros", zeros), ("few", few)):
        if needs[name]:
            figure = draw(result)
            if figure.get_layout_engine() is None:
                figure.tight_layout()
            written.append(path.with_name(f"{path.stem}-{name}.png"))
            figure.savefig(written[-1], dpi=150)
            plt.close(figure)
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    print(*main(parser.parse_args().result), sep="\n")
