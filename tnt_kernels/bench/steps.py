"""Runs commands, each in a process with a time limit, so that one that fails or hangs leaves the others."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OK, FAILED, TIMED_OUT, NOT_RUN = "ok", "failed", "timed out", "not run"
SHOWN = 12  # lines of a failed step's output
_ERRORS = ("E  ", "FAILED", "ERROR", "=========")  # of pytest and compute-sanitizer


@dataclass(frozen=True)
class Step:
    """A command. `why_not` says why it cannot run here; `variables` are added to the environment."""

    name: str
    command: tuple[str, ...]
    limit: float  # seconds
    why_not: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a step; `said` are the lines that tell why it is not ok, or the last one."""

    name: str
    command: tuple[str, ...]
    status: str
    seconds: float = 0.0
    said: tuple[str, ...] = ()


def run(step: Step, log: Path, limit: float) -> Outcome:
    """Runs a step for at most `limit` seconds and its own limit; its output goes to `log`."""
    if step.why_not:
        return Outcome(step.name, step.command, NOT_RUN, said=(step.why_not,))
    limit = min(limit, step.limit)
    if limit < 1:
        return Outcome(step.name, step.command, NOT_RUN, said=("no time is left",))
    begin = time.monotonic()
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                step.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **step.variables},
                start_new_session=True,
            )
            try:
                status = OK if process.wait(limit) == 0 else FAILED
            except subprocess.TimeoutExpired:
                status = TIMED_OUT
            finally:
                _stop(process)
    except OSError as error:
        return Outcome(step.name, step.command, FAILED, said=(str(error),))
    seconds = round(time.monotonic() - begin, 1)
    said = excerpt(log.read_text(errors="replace"), status)
    if status == TIMED_OUT:
        said = (f"stopped after {limit:.0f} s", *said)
    return Outcome(step.name, step.command, status, seconds, said)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the step's process group: also the children of one that has ended."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def excerpt(text: str, status: str) -> tuple[str, ...]:
    """The last line of a step that is ok; of another one the first errors, or its last lines."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    if status == OK:
        return tuple(lines[-1:])
    errors = [line for line in lines if line.startswith(_ERRORS) or "Error: " in line]
    return tuple((errors or lines[-SHOWN:])[:SHOWN])


def run_all(
    stages: Sequence[Sequence[Step]],
    logs: Path,
    seconds: float,
    done: Callable[[Outcome], Any],
) -> list[Outcome]:
    """Runs stage after stage, the steps of a stage at once; calls `done` after each step.

    seconds: for everything; a step that has no time left is not run.
    """
    end, outcomes = time.monotonic() + seconds, []
    for stage in stages:
        with ThreadPoolExecutor(max(len(stage), 1)) as pool:
            running = [
                pool.submit(run, step, logs / f"{step.name}.txt", end - time.monotonic()) for step in stage
            ]
            for future in running:
                outcomes.append(future.result())
                done(outcomes[-1])
    return outcomes
