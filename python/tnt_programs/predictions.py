"""Predictions as a table for the terminal, as CSV or as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

from tnt_kernels.bench.results import table


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image, the first first: name, index and probability of each."""

    file: str
    top: list[tuple[str, int, float]]


Damaged = Sequence[tuple[str, str]]  # file and reason


def as_table(predictions: Sequence[Prediction], damaged: Damaged) -> str:
    """A row per image and class; the damaged images are left out."""
    rows = [
        [item.file if rank == 0 else "", name, f"{probability:.2%}"]
        for item in predictions
        for rank, (name, _, probability) in enumerate(item.top)
    ]
    return table(["image", "class", "probability"], rows, right=(2,)) + "\n"


def as_csv(predictions: Sequence[Prediction], damaged: Damaged) -> str:
    """A row per image and class; the damaged images are left out."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "rank", "class", "index", "probability"])
    for item in predictions:
        for rank, (name, index, probability) in enumerate(item.top, start=1):
            writer.writerow([item.file, rank, name, index, probability])
    return text.getvalue()


def as_json(predictions: Sequence[Prediction], damaged: Damaged) -> str:
    """One object: `predictions` [{file, top [{class, index, probability}]}], `damaged` [{file, reason}]."""
    content = {
        "predictions": [
            {
                "file": item.file,
                "top": [
                    {"class": name, "index": index, "probability": probability}
                    for name, index, probability in item.top
                ],
            }
            for item in predictions
        ],
        "damaged": [{"file": file, "reason": reason} for file, reason in damaged],
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


FORMATS = {"table": as_table, "csv": as_csv, "json": as_json}
