"""What a run reports: one row of figures per epoch as CSV, curves as PNG, the loss of every step."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tnt_programs import checkpoints

Row = Mapping[str, Any]

COLUMNS = ("epoch", "lr", "train_loss", "train_images_per_s", "val_loss", "top1", "top5", "seconds")
STEP_COLUMNS = ("step", "epoch", "lr", "loss")
BLUE, ORANGE, GREY = "#1f77b4", "#e07b39", "#7f8c9b"


def write_csv(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Rows as CSV, floats with all their digits. OSError as `checkpoints.write`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    checkpoints.write(path, lambda file: file.write(text.getvalue().encode()))


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows as `write_csv` wrote them; none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def plot_curves(path: Path, rows: Sequence[Row], title: str) -> None:
    """Loss, accuracy and learning rate over the epochs as PNG. OSError as `checkpoints.write`."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    loss, accuracy = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]

    loss.plot(epochs, [row["train_loss"] for row in rows], color=ORANGE, marker=".", label="training")
    loss.plot(epochs, [row["val_loss"] for row in rows], color=BLUE, marker=".", label="validation")
    loss.set_ylabel("loss")
    loss.set_ylim(bottom=0)
    rate = loss.twinx()
    rate.plot(epochs, [row["lr"] for row in rows], color=GREY, linewidth=0.8, linestyle="--")
    rate.set_ylabel("learning rate (dashed)", color=GREY)
    rate.set_ylim(bottom=0)

    best = max(rows, key=lambda row: row["top1"])
    accuracy.plot(epochs, [row["top1"] for row in rows], color=BLUE, marker=".", label="top-1")
    if best.get("top5") is not None:
        accuracy.plot(epochs, [row["top5"] for row in rows], color=GREY, marker=".", label="top-5")
    accuracy.axhline(best["top1"], color=BLUE, linewidth=0.6, linestyle=":")
    accuracy.set_title(f"best top-1: {best['top1']:.2f} % in epoch {best['epoch']}", fontsize=10)
    accuracy.set_ylabel("validation accuracy, %")
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, loc="best")
        axes.spines["top"].set_visible(False)
    checkpoints.write(path, lambda file: figure.savefig(file, dpi=120, format="png"))
