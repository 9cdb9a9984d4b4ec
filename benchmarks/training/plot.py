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
SHARES = ("zeros", "dropped", "dropped_across_tokens", "dropped_gradient")
TITLES = ("zeros in relu(h)²", "non-zeros dropped, forward", "energy dropped across tokens", "of the gradient's energy")
COLOURS = ("#343a40", "#0b6e4f", "#d0782a", "#7b2cbf", "#c1121f", "#1d7fb8")


def read(directory: Path) -> Runs:
    """Of one size and one text: others can't be compared."""
    from study import ARMS

    found = [json.loads(path.read_text()) for path in sorted(directory.glob("*-*.json"))]
    for what in ("data", "size"):
        if len({json.dumps(run[what]) for run in found}) > 1:
            values = ", ".join(f"{run['arm']}-{run['seed']}: {run[what]}" for run in found)
            raise ValueError(f"results in {directory} must be of the same {what}, got {values}")
    return {arm: runs for arm in ARMS if (runs := [run for run in found if run["arm"] == arm])}


def table(runs: Runs) -> list[dict[str, Any]]:
    """Of each arm: seeds, the last held-out loss, how far that of its seeds lies from dense, and the last shares.

    An arm ends where dense ends ("within") if the mean over its seeds of what it is over dense of the same seed is no
    more than the largest difference between two seeds of dense. Of one seed nothing is said. Speed and memory are of
    the first seed: others may have run side by side.
    """
    dense = {run["seed"]: run["looks"][-1]["loss"] for run in runs.get("dense", ())}
    rows = []
    for arm, of_arm in runs.items():
        last = [run["looks"][-1] for run in of_arm]
        losses = [look["loss"] for look in last]
        row: dict[str, Any] = {"arm": arm, "seeds": [run["seed"] for run in of_arm], "loss": statistics.mean(losses)}
        row["spread"] = max(losses) - min(losses) if len(losses) > 1 else None
        row["over dense"] = [
            run["looks"][-1]["loss"] - dense[run["seed"]] for run in of_arm if arm != "dense" and run["seed"] in dense
        ]
        compared = len(row["over dense"]) > 1
        apart = max(dense.values()) - min(dense.values()) if compared else None
        row["within"] = None if apart is None else abs(statistics.mean(row["over dense"])) <= apart
        row["run dense"] = statistics.mean(look["dense_loss"] for look in last)
        row |= {"tokens/s": of_arm[0]["tokens/s"], "bytes": of_arm[0]["peak_bytes"]}
        row["gpus"] = sorted({run["record"].get("gpu", "CPU") for run in of_arm})
        for share in SHARES:
            row[share] = statistics.mean(value for look in last for value in look[share])
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table("arm", "seeds", "held-out loss", "spread", "over dense, by seed", "run dense", "tokens/s", "peak GB")
    for name in ("zeros", "dropped", "across tokens", "of gradient"):
        shown.add_column(name)
    for row in rows:
        memory = f"{row['bytes'] / 1e9:.1f}" if row["bytes"] else ""
        spread = "–" if row["spread"] is None else f"{row['spread']:.4f}"
        over = ", ".join(f"{change:+.4f}" for change in row["over dense"])
        over += "" if row["within"] is None else f": {'within' if row['within'] else 'beyond'} dense's spread"
        numbers = f"{row['loss']:.4f}", spread, over, f"{row['run dense']:.4f}", f"{row['tokens/s']:,}", memory
        shares = (f"{row[share]:.2%}" for share in SHARES)
        shown.add_row(row["arm"], ", ".join(map(str, row["seeds"])), *numbers, *shares)
    console = Console(width=160)
    console.print(shown)
    console.print("on " + ", ".join(sorted({gpu for row in rows for gpu in row["gpus"]})))


def draw(runs: Runs, path: Path) -> None:
    """Held-out loss over that of dense with the same seed, a line a seed; and shares, by step and at last by layer.

    By step, means over layers.
    """
    figure, panels = plt.subplots(2, 5, figsize=(22, 8))
    dense = {run["seed"]: [look["loss"] for look in run["looks"]] for run in runs.get("dense", ())}
    loss, over = panels[:, 0]
    for colour, (arm, of_arm) in zip(COLOURS, runs.items()):
        for number, run in enumerate(of_arm):
            looks, like = run["looks"], {"color": colour, "linewidth": 1, "label": arm if number == 0 else None}
            steps, losses = [look["step"] for look in looks], [look["loss"] for look in looks]
            loss.plot(steps, losses, **like)
            if run["seed"] in dense:
                over.plot(steps, [ours - theirs for ours, theirs in zip(losses, dense[run["seed"]])], **like)
            for share, (by_step, by_layer) in zip(SHARES, panels[:, 1:].T):
                by_step.plot(steps, [statistics.mean(look[share]) for look in looks], **like)
                by_layer.plot(range(len(looks[-1][share])), looks[-1][share], marker="o", markersize=3, **like)
    loss.set(title="held-out loss, nats a byte", xlabel="step", yscale="log")
    over.set(title="the same over dense, of one seed", xlabel="step")
    over.set_yscale("symlog", linthresh=0.01)
    for title, (by_step, by_layer) in zip(TITLES, panels[:, 1:].T):
        by_step.set(title=title, xlabel="step")
        by_layer.set(title="at the end", xlabel="layer")
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
    loss.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
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
