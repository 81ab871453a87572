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
        (
            "/ best other TNT",
            ("compile", "frozen", "reduce_overhead", "max_autotune", "onnxruntime", "openvino"),
        ),
        ("/ eager DeiT", ("deit",)),
        ("/ compiled DeiT", ("deit_compile",)),
    ],
    "training": [
        ("/ eager TNT", ("timm",)),
        ("/ compiled TNT", ("compile",)),
        ("/ eager DeiT", ("deit",)),
    ],
    "op": [("/ eager", ("eager",)), ("/ compiled", ("compile",))],
}


# Column of every measure of memory.
MEMORY = {"saved_mib": "held MiB", "call_mib": "call MiB", "peak_mib": "peak MiB"}

Column = tuple[str, dict[str, str]]  # header, and the cells of the entries that have one


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
    speed = {e["name"]: e["per_second"] for e in result["entries"] if "per_second" in e}
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
    """The entries of one case that passed their check."""
    entries = [entry for entry in result["entries"] if entry["status"] == "ok"]
    columns = [*_time_columns(result), *_memory_columns(result), _error_column(entries)]
    rows = [[e["label"], *(cells.get(e["name"], "-") for _, cells in columns)] for e in entries]
    return table(["", *(header for header, _ in columns)], rows, right=range(1, len(columns) + 1))


def _time_columns(result: dict[str, Any]) -> list[Column]:
    timed = [entry for entry in result["entries"] if "median_ms" in entry]
    if not timed:
        return []
    return [
        (result["unit"], {e["name"]: f"{e['per_second']:.1f}" for e in timed}),
        ("ms", {e["name"]: f"{e['median_ms']:.{2 if e['median_ms'] < 100 else 0}f}" for e in timed}),
        ("spread", {e["name"]: f"{e['spread']:.1%}" for e in timed}),
        *((header, _numbers(values, 2)) for header, values in ratios(result).items()),
    ]


def _memory_columns(result: dict[str, Any]) -> list[Column]:
    _, (eager, *_) = RATIOS[result["kind"]][0]
    columns: list[Column] = []
    for key, header in MEMORY.items():
        found = {e["name"]: e.get("memory", {}).get(key) for e in result["entries"]}
        values = {name: value for name, value in found.items() if value is not None}
        if not values:
            continue
        columns.append((header, _numbers(values, 0)))
        if key != "peak_mib" and values.get(eager):
            columns.append(("/ eager", _numbers({n: v / values[eager] for n, v in values.items()}, 2)))
    return columns


def _error_column(entries: Sequence[dict[str, Any]]) -> Column:
    checks = {e["name"]: e["check"] for e in entries}
    ratio = {name: c["error"] / c["eager_error"] for name, c in checks.items() if c["eager_error"]}
    return "error / eager's", _numbers(ratio, 2)


def _numbers(values: dict[str, float], digits: int) -> dict[str, str]:
    return {name: f"{value:.{digits}f}" for name, value in values.items()}


def overview(document: dict[str, Any]) -> list[str]:
    """Tables with one line per case of a model: speed, and what training holds for backward."""
    results = [result for result in document["results"] if result["kind"] != "op"]
    if len(results) < 2:
        return []
    labels = {e["name"]: e["label"] for result in results for e in result["entries"]}
    blocks = []
    for title, pick in ((results[0]["unit"], _time_columns), ("held MiB", _memory_columns)):
        cells = [dict(pick(result)).get(title, {}) for result in results]
        if any(cells):
            rows = [
                [result["title"], *(of.get(name, "-") for name in labels)]
                for result, of in zip(results, cells, strict=True)
            ]
            blocks.append(f"### {title}")
            blocks.append(table(["", *labels.values()], rows, right=range(1, len(labels) + 1)))
    return blocks


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
        f"{_gpu_name(device)}{device['processor']['name']}, {device['processor']['cores']} cores, "
        f"{device['threads']} threads; {document['date']}",
        versions,
        "Every entry was checked against float64 first.",
    ]
    if document["rounds"]:
        lines[-1] = (
            f"Medians of {document['rounds']} interleaved rounds; spread: distance of the quartiles over the "
            f"median. {lines[-1]}"
        )
    load, cores = device["load_average"], device["processor"]["cores"]
    if document["rounds"] and load is not None and load > 0.5 * cores:
        lines.append(
            f"The load average was {load:.1f} at the start: others used the cores, the times are unsure."
        )
    return lines


def _gpu_name(device: dict[str, Any]) -> str:
    gpu = device.get("gpu")
    if gpu is None:
        return ""
    return f"{gpu['name']} (driver {gpu['driver'] or 'unknown'}, CUDA {gpu['cuda']}); "


def footing(document: dict[str, Any]) -> list[str]:
    """What the memory columns hold."""
    memory = [entry.get("memory", {}) for result in document["results"] for entry in result["entries"]]
    lines = []
    if any("saved_mib" in found for found in memory):
        lines.append(
            "held MiB: tensors that the forward pass saves for backward (storages, each once, without the "
            "parameters)."
        )
    for measure in sorted({found["measure"] for found in memory if "measure" in found}):
        what = "memory of PyTorch's allocator" if "GPU" in measure else "resident memory"
        lines.append(
            f"peak MiB: {what}, {measure}; call MiB: the part that is there during a call alone "
            "(nothing where a runtime keeps its workspace between calls: compare the peaks)."
        )
    return lines


def report(document: dict[str, Any]) -> str:
    """The whole document as text for a terminal, which is markdown too."""
    blocks = ["\n".join(heading(document)), *overview(document)]
    for result in document["results"]:
        blocks.append(f"### {result['title']}")
        if any(entry["status"] == "ok" for entry in result["entries"]):
            blocks.append(result_table(result))
        if said := list(remarks(result)):
            blocks.append("\n".join(f"- {line}" for line in said))
    blocks += footing(document)
    return "\n\n".join(blocks)
