"""Markdown tables and plots of result files.

    python benchmarks/report.py                          # every file of benchmarks/results
    python benchmarks/report.py FILE.json --output DIR   # tables and plots of one file

Beside each FILE.json go FILE.md (tables) and FILE.png (images per second of every case; of one that was not
timed, the memory held for backward).
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from tnt_kernels.bench import results

RESULTS = Path(__file__).parent / "results"
OURS, OTHERS = "#1f77b4", "#a9b4c0"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--output", type=Path, help="directory (default: beside each file)")
    arguments = parser.parse_args()
    files = arguments.files or sorted(RESULTS.glob("*.json"))
    if not files:
        parser.error(f"no result file in {RESULTS}; benchmarks/models.py and benchmarks/ops.py write them")
    for file in files:
        try:
            document = results.load(file)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        folder = arguments.output or file.parent
        folder.mkdir(parents=True, exist_ok=True)
        written = folder / f"{file.stem}.md"
        written.write_text(f"# {file.stem}\n\n{results.report(document)}\n")
        print(written)
        plot(document, folder / f"{file.stem}.png")
    return 0


def plot(document: dict[str, Any], path: Path) -> None:
    """One panel per case: a bar per entry that was measured."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path.name}: no plot, matplotlib is not installed", file=sys.stderr)
        return
    cases = [result for result in document["results"] if measured(result)]
    if not cases:
        return
    columns = min(2, len(cases))
    rows = math.ceil(len(cases) / columns)
    bars = max(len(measured(case)) for case in cases)
    figure = Figure(figsize=(7.5 * columns, rows * (0.9 + 0.32 * bars)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, case in zip(panels, cases, strict=False):
        panel(axes, case)
    for axes in list(panels)[len(cases) :]:
        axes.axis("off")
    device = document["device"]
    name = device.get("gpu", device["processor"])["name"]
    figure.suptitle(f"{name}, {device['threads']} threads, {document['date'][:10]}", fontsize=12)
    figure.savefig(path, dpi=110)
    print(path)


def measured(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries that were timed; where none was, those whose memory is known."""
    timed = [e for e in case["entries"] if "per_second" in e]
    return timed or [e for e in case["entries"] if "saved_mib" in e.get("memory", {})]


def panel(axes: Any, case: dict[str, Any]) -> None:
    entries = measured(case)
    high = [0.0] * len(entries)
    if "per_second" in entries[0]:
        unit, values = case["unit"], [e["per_second"] for e in entries]
        low = [e["per_second"] - 1e3 * case["items"] / e["high_ms"] for e in entries]
        high = [1e3 * case["items"] / e["low_ms"] - e["per_second"] for e in entries]
        axes.errorbar(
            values, range(len(entries)), xerr=(low, high), fmt="none", ecolor="#333333", elinewidth=1
        )
    else:
        unit, values = "MiB held for backward", [e["memory"]["saved_mib"] for e in entries]
    ours = {"fast", "fast_compile", "accelerate"}
    colours = [OURS if e["name"] in ours or e["name"].startswith("tier_") else OTHERS for e in entries]
    axes.barh(range(len(entries)), values, color=colours)
    for i, (value, above) in enumerate(zip(values, high, strict=True)):
        text = f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
        axes.annotate(text, (value + above, i), xytext=(5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(entries)), [e["label"] for e in entries])
    axes.invert_yaxis()
    axes.set_xlim(0, max(map(sum, zip(values, high, strict=True))) * 1.15)
    axes.set_xlabel(unit)
    axes.set_title(case["title"], fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
