"""Markdown tables and plots of result files.

    python benchmarks/report.py                          # every file of benchmarks/results
    python benchmarks/report.py FILE.json --output DIR   # tables and plots of one file

Beside each FILE.json go FILE.md (tables) and FILE.png (images per second of every case).
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
    """One panel per case: a bar per entry that was timed, with its quartiles."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path.name}: no plot, matplotlib is not installed", file=sys.stderr)
        return
    cases = [r for r in document["results"] if any(e["status"] == "ok" for e in r["entries"])]
    if not cases:
        return
    columns = min(2, len(cases))
    rows = math.ceil(len(cases) / columns)
    bars = max(sum(e["status"] == "ok" for e in r["entries"]) for r in cases)
    figure = Figure(figsize=(7.5 * columns, rows * (0.9 + 0.32 * bars)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, case in zip(panels, cases, strict=False):
        panel(axes, case)
    for axes in list(panels)[len(cases) :]:
        axes.axis("off")
    device = document["device"]
    figure.suptitle(
        f"{device['processor']['name']}, {device['threads']} threads, {document['date'][:10]}", fontsize=12
    )
    figure.savefig(path, dpi=110)
    print(path)


def panel(axes: Any, case: dict[str, Any]) -> None:
    entries = [e for e in case["entries"] if e["status"] == "ok"]
    speeds = [e["per_second"] for e in entries]
    low = [e["per_second"] - 1e3 * case["items"] / e["high_ms"] for e in entries]
    high = [1e3 * case["items"] / e["low_ms"] - e["per_second"] for e in entries]
    ours = {"fast", "fast_compile", "accelerate"}
    colours = [OURS if e["name"] in ours or e["name"].startswith("tier_") else OTHERS for e in entries]
    axes.barh(range(len(entries)), speeds, color=colours)
    axes.errorbar(speeds, range(len(entries)), xerr=(low, high), fmt="none", ecolor="#333333", elinewidth=1)
    for i, (speed, above) in enumerate(zip(speeds, high, strict=True)):
        text = f"{speed:,.1f}" if speed < 1000 else f"{speed:,.0f}"
        axes.annotate(text, (speed + above, i), xytext=(5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(entries)), [e["label"] for e in entries])
    axes.invert_yaxis()
    axes.set_xlim(0, max(map(sum, zip(speeds, high, strict=True))) * 1.15)
    axes.set_xlabel(case["unit"])
    axes.set_title(case["title"], fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
