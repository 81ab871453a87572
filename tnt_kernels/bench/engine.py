"""Runs a case: set up every baseline, check it, time it interleaved with the others, measure its memory."""

from __future__ import annotations

import contextlib
import datetime
import gc
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tnt_kernels.bench import accuracy, memory, timing
from tnt_kernels.bench.cases import Baseline, Case, Runner, reason
from tnt_kernels.bench.environment import describe
from tnt_kernels.bench.models import ModelCase
from tnt_kernels.bench.ops import OpCase
from tnt_kernels.bench.progress import Progress
from tnt_kernels.bench.training import TrainingCase

SCHEMA = 1
KINDS: dict[str, Callable[..., Any]] = {"model": ModelCase, "training": TrainingCase, "op": OpCase}

Entries = dict[str, dict[str, Any]]  # by name, as they stand in the document


def case_of(kind: str, fields: dict[str, Any]) -> Case:
    return KINDS[kind](**fields)


@contextlib.contextmanager
def using_threads(threads: int | None) -> Iterator[int]:
    """Set torch's thread count inside, give it back afterwards. None leaves it."""
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def run(
    cases: Sequence[Case],
    names: Sequence[str],
    *,
    rounds: int = 10,
    threads: int | None = None,
    with_memory: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run `names` of every case and return one document, ready for JSON.

    names: baselines; the ones that a case does not know raise ValueError before anything runs.
    rounds: 0 leaves out the timing; checks and memory remain.
    """
    if rounds < 0:
        raise ValueError(f"rounds must be at least 0, got {rounds}")
    for case in cases:
        if unknown := [name for name in names if name not in case.baselines()]:
            raise ValueError(f"baselines must be of {', '.join(case.baselines())}; got {', '.join(unknown)}")
    progress = progress or Progress()
    with using_threads(threads), tempfile.TemporaryDirectory(prefix="tnt_bench_") as artifacts:
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "rounds": rounds,
            "device": describe(gpu=any(case.device == "cuda" for case in cases)),
            "results": [],
        }
        for case in cases:
            result = run_case(case, names, rounds, with_memory, Path(artifacts), progress)
            document["results"].append(result)
    return document


def run_case(
    case: Case, names: Sequence[str], rounds: int, with_memory: bool, artifacts: Path, progress: Progress
) -> dict[str, Any]:
    """One case: a dict of its fields and of `entries`, one per name, in the order given."""
    torch._dynamo.reset()
    entries = {name: _entry(case.baselines()[name]) for name in names}
    runners: dict[str, Runner] = {}
    progress.start(f"{case.title}: set-up and checks", len(names))
    for name, entry in entries.items():
        progress.step(entry["label"])
        baseline = case.baselines()[name]
        try:
            runner = baseline.build(case, artifacts)
            entry["note"] = runner.note
            check = _check(case, baseline, runner)
        except Exception as error:
            entry.update(status="not run", reason=reason(error))
            continue
        entry["check"] = {
            "error": check.error if math.isfinite(check.error) else None,
            "eager_error": check.eager_error,
            "scale": check.scale,
            "limit": check.limit,
            "passed": check.passed,
            "group": check.group,
        }
        if check.passed:
            entry["status"] = "ok"
            runners[name] = runner
        else:
            of = f" of {check.group}" if check.group else ""
            said = f"error{of} {check.error:.3g} against float64, the limit is {check.limit:.3g}"
            entry.update(status="wrong", reason=said)
    progress.finish()

    if rounds:
        _time(case, runners, entries, rounds, progress)
    passed = list(runners)
    runners.clear()
    gc.collect()
    if case.device == "cuda":
        torch.cuda.empty_cache()
    if with_memory:
        _measure_memory(case, passed, entries, artifacts, progress)
    return {
        "kind": case.kind,
        **case.fields(),
        "title": case.title,
        "unit": case.unit,
        "items": case.items,
        "threads": torch.get_num_threads(),
        "entries": list(entries.values()),
    }


def _time(case: Case, runners: dict[str, Runner], entries: Entries, rounds: int, progress: Progress) -> None:
    progress.start(f"{case.title}: {rounds} rounds", rounds * len(runners))
    calls = {name: runner.call for name, runner in runners.items()}
    clock = timing.GpuClock(cold=case.kind == "op") if case.device == "cuda" else None
    found = timing.interleave(calls, rounds, on_step=progress.step, measure=clock)
    for name, measured in found.items():
        low, high = measured.quartiles
        entries[name].update(
            median_ms=measured.median * 1e3,
            low_ms=low * 1e3,
            high_ms=high * 1e3,
            spread=measured.spread,
            per_second=case.items / measured.median,
            samples_ms=[round(s * 1e3, 4) for s in measured.samples],
        )
    progress.finish()


def _measure_memory(
    case: Case, names: Sequence[str], entries: Entries, artifacts: Path, progress: Progress
) -> None:
    progress.start(f"{case.title}: memory", len(names))
    for name in names:
        progress.step(entries[name]["label"])
        try:
            entries[name]["memory"] = memory.measure(case, name, artifacts, torch.get_num_threads())
        except RuntimeError as error:
            entries[name]["memory"] = {"reason": reason(error)}
    progress.finish()


def _entry(baseline: Baseline) -> dict[str, Any]:
    return {
        "name": baseline.name,
        "label": baseline.label,
        "family": baseline.family,
        "status": "not run",
        "reason": "",
        "note": "",
    }


def _check(case: Case, baseline: Baseline, runner: Runner) -> accuracy.Accuracy:
    result = case.checked((runner.result or runner.call)())
    if isinstance(result, Tensor):
        result = result.clone()  # a runtime may own the memory of its outputs
    exact, eager = case.exact(baseline.family), case.eager(baseline.family)
    if baseline.ours:
        return accuracy.as_accurate_as_eager(result, eager, exact)
    return accuracy.close_enough(result, eager, exact, runner.precision)
