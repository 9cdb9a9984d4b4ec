"""All results of ``study.py`` as a table and a picture: ``python benchmarks/training/plot.py [DIRECTORY]``."""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Runs = dict[str, list[dict[str, Any]]]  # by arm
SHARES = [(1, "zeros", "solid"), (2, "dropped_across_tokens", "solid"), (2, "dropped", "dotted")]  # by panel
COLOURS = ("#343a40", "#0b6e4f", "#d0782a", "#7b2cbf", "#c1121f", "#1d7fb8")


def read(directory: Path) -> Runs:
    from study import ARMS

    found = [json.loads(path.read_text()) for path in sorted(directory.glob("*-*.json"))]
    return {arm: runs for arm in ARMS if (runs := [run for run in found if run["arm"] == arm])}


def table(runs: Runs) -> list[dict[str, Any]]:
    """Of each arm: seeds, the last held-out loss with its spread over seeds, speed, memory, and the last shares."""
    rows = []
    for arm, of_arm in runs.items():
        last = [run["looks"][-1] for run in of_arm]
        losses = [look["loss"] for look in last]
        row = {"arm": arm, "seeds": len(of_arm), "loss": statistics.mean(losses), "spread": max(losses) - min(losses)}
        row |= {"tokens/s": statistics.median(run["tokens/s"] for run in of_arm), "bytes": of_arm[0]["peak_bytes"]}
        for share in ("zeros", "dropped", "dropped_across_tokens"):
            row[share] = statistics.mean(value for look in last for value in look[share])
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table("arm", "seeds", "held-out loss", "spread", "tokens/s", "peak GB", "zeros", "dropped", "across tokens")
    for row in rows:
        memory = f"{row['bytes'] / 1e9:.1f}" if row["bytes"] else ""
        shares = (f"{row[share]:.2%}" for share in ("zeros", "dropped", "dropped_across_tokens"))
        numbers = f"{row['loss']:.4f}", f"{row['spread']:.4f}", f"{row['tokens/s']:,}"
        shown.add_row(row["arm"], str(row["seeds"]), *numbers, memory, *shares)
    Console(width=120).print(shown)


def draw(runs: Runs, path: Path) -> None:
    """Held-out loss, zeros, and what is dropped, by step, means over layers; a line a seed."""
    figure, panels = plt.subplots(1, 3, figsize=(15, 4))
    loss, zeros, dropped = panels
    for colour, (arm, of_arm) in zip(COLOURS, runs.items()):
        for number, run in enumerate(of_arm):
            steps = [look["step"] for look in run["looks"]]
            label = arm if number == 0 else None
            loss.plot(steps, [look["loss"] for look in run["looks"]], color=colour, label=label, linewidth=1)
            for panel, share, style in SHARES:
                means = [statistics.mean(look[share]) for look in run["looks"]]
                panels[panel].plot(steps, means, color=colour, label=label, linestyle=style, linewidth=1)
    loss.set(title="held-out loss, nats a byte", xlabel="step")
    zeros.set(title="zeros in relu(h)²", xlabel="step")
    dropped.set(title="dropped: energy across tokens; dotted: non-zeros, forward", xlabel="step")
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    loss.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "directory", type=Path, nargs="?", default=Path(__file__).parent.parent / "results" / "training"
    )
    directory = parser.parse_args().directory
    if not (runs := read(directory)):
        parser.error(f"directory must hold results of study.py, found none in {directory}")
    show(table(runs))
    draw(runs, directory / "study.png")
    print(f"written: {directory / 'study.png'}")


if __name__ == "__main__":
    main()
