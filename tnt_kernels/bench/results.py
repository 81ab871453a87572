"""Result documents: files, ratios and tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Column, and the entries it divides by: the fastest of those that ran.
RATIOS: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "model": [
        ("/ eager TNT", ("timm",)),
        ("/ best other TNT", ("compile", "frozen", "onnxruntime", "openvino")),
        ("/ eager DeiT", ("deit",)),
        ("/ compiled DeiT", ("deit_compile",)),
    ],
    "op": [("/ eager", ("eager",)), ("/ compiled", ("compile",))],
}


def save(document: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


def load(path: Path) -> dict[str, Any]:
    """Read a document. ValueError if the file holds something else."""
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(document, dict) or not {"device", "results", "schema"} <= set(document):
        raise ValueError(f"{path} is no result file of this package: it must hold device, results and schema")
    return document


def wrong(document: dict[str, Any]) -> list[str]:
    """Entries whose check failed, as 'case: entry: why'."""
    return [
        f"{result['title']}: {entry['label']}: {entry['reason']}"
        for result in document["results"]
        for entry in result["entries"]
        if entry["status"] == "wrong"
    ]


def ratios(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Speed of every entry over that of others: {column: {entry: ratio}}. Only columns whose others ran."""
    speed = {e["name"]: e["per_second"] for e in result["entries"] if e["status"] == "ok"}
    found = {}
    for column, names in RATIOS[result["kind"]]:
        base = max((speed[name] for name in names if name in speed), default=None)
        if base is not None and len(speed) > 1:
            found[column] = {name: value / base for name, value in speed.items()}
    return found


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A markdown table whose columns are aligned for a terminal; `right` holds the columns of numbers."""
    widths = [max(3, *(len(row[i]) for row in (headers, *rows))) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            c.rjust(w) if i in right else c.ljust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(aligned)} |"

    rule = [("-" * (w - 1) + ":") if i in right else "-" * w for i, w in enumerate(widths)]
    return "\n".join([line(headers), line(rule), *(line(row) for row in rows)])


def result_table(result: dict[str, Any]) -> str:
    """The entries of one case that were timed."""
    columns = ratios(result)
    headers = ["", result["unit"], "ms", "spread", *columns, "peak MiB", "forward MiB", "error / eager's"]
    rows = []
    for entry in result["entries"]:
        if entry["status"] != "ok":
            continue
        memory, check = entry.get("memory", {}), entry["check"]
        rows.append(
            [
                entry["label"],
                f"{entry['per_second']:.1f}",
                f"{entry['median_ms']:.2f}" if entry["median_ms"] < 100 else f"{entry['median_ms']:.0f}",
                f"{entry['spread']:.1%}",
                *(f"{values[entry['name']]:.2f}" for values in columns.values()),
                _number(memory.get("peak_mib")),
                _number(memory.get("forward_mib")),
                f"{check['error'] / check['eager_error']:.2f}" if check["eager_error"] else "-",
            ]
        )
    return table(headers, rows, right=range(1, len(headers)))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def remarks(result: dict[str, Any]) -> Iterator[str]:
    """What a reader of the table must know about its entries, and why the others are not in it."""
    for entry in result["entries"]:
        if entry["status"] == "ok" and entry["note"]:
            yield f"{entry['label']}: {entry['note']}"
        elif entry["status"] == "wrong":
            yield f"{entry['label']}: WRONG, not timed: {entry['reason']}"
        elif entry["status"] == "not run":
            yield f"{entry['label']}: not run: {entry['reason']}"
        if reason := entry.get("memory", {}).get("reason"):
            yield f"{entry['label']}: memory not measured: {reason}"


def heading(document: dict[str, Any]) -> list[str]:
    """Device, versions and method, one line each."""
    device = document["device"]
    versions = ", ".join(f"{k} {v}" for k, v in device["versions"].items() if v)
    lines = [
        f"{device['processor']['name']}, {device['processor']['cores']} cores, {device['threads']} threads; "
        f"{document['date']}",
        versions,
        f"Medians of {document['rounds']} interleaved rounds; spread: distance of the quartiles over the "
        "median. Every entry was checked against float64 first.",
    ]
    load, cores = device["load_average"], device["processor"]["cores"]
    if load is not None and load > 0.5 * cores:
        lines.append(
            f"The load average was {load:.1f} at the start: others used the cores, the times are unsure."
        )
    return lines


def footing(document: dict[str, Any]) -> list[str]:
    """What the memory columns hold."""
    measures = {
        entry["memory"]["measure"]
        for result in document["results"]
        for entry in result["entries"]
        if "measure" in entry.get("memory", {})
    }
    return [
        f"peak MiB: resident memory, {measure}; forward MiB: the part that is there during a pass alone "
        "(nothing where a runtime keeps its workspace between calls: compare the peaks)."
        for measure in sorted(measures)
    ]


def report(document: dict[str, Any]) -> str:
    """The whole document as text for a terminal, which is markdown too."""
    blocks = ["\n".join(heading(document))]
    for result in document["results"]:
        blocks.append(f"### {result['title']}")
        if any(entry["status"] == "ok" for entry in result["entries"]):
            blocks.append(result_table(result))
        if said := list(remarks(result)):
            blocks.append("\n".join(f"- {line}" for line in said))
    blocks += footing(document)
    return "\n\n".join(blocks)
