"""Finds the fastest configuration of every Triton kernel on the present GPU.

What to tune is what the launchers ask for: each configuration that a case wants is varied while the other
kernels keep theirs. A candidate must compile and be right before it is timed.
"""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tnt_kernels._autograd import COMPOSITES
from tnt_kernels.backends import reference
from tnt_kernels.backends.triton import configs, runtime
from tnt_kernels.backends.triton.configs import Config, Wanted
from tnt_kernels.bench import sass
from tnt_kernels.bench.accuracy import max_error
from tnt_kernels.bench.cases import reason
from tnt_kernels.bench.kernel_cases import KernelCase

ROWS, WARPS, STAGES = (16, 32, 64, 128, 256), (1, 2, 4, 8), (1, 2, 3)
# A candidate that is less than 2% faster is no better: the next measurement may say otherwise.
WORTHWHILE = 0.98
# Largest error, as a share of the largest value, against plain PyTorch in the same precision.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}

Table = dict[str, dict[str, dict[str, list[int]]]]


@dataclass(frozen=True)
class Trial:
    """A candidate and what became of it: milliseconds of the whole operator, or why it has none."""

    case: str
    precision: str
    wanted: Wanted
    config: Config
    milliseconds: float | None = None
    problem: str = ""

    @property
    def entry(self) -> str:
        """Its key in the table."""
        return f"{'float32' if self.wanted.dtype == torch.float32 else '16bit'} {self.wanted.width}"


@dataclass(frozen=True)
class Subject:
    """A configuration to choose, and the call that shows how fast it is."""

    case: KernelCase
    precision: str
    wanted: Wanted
    current: Config

    def candidates(self, quick: bool) -> list[Config]:
        """The current configuration first; quick: then its neighbours alone."""
        rows, warps, stages = self.current
        found = [Config(*values) for values in itertools.product(ROWS, WARPS, STAGES)]
        if quick:
            near_rows, near_warps = (rows // 2, rows, 2 * rows), (warps // 2, warps, 2 * warps)
            found = [c for c in found if c.rows in near_rows and c.warps in near_warps and c.stages == stages]
        return list(dict.fromkeys([self.current, *found]))


def subjects(cases: Sequence[KernelCase], precisions: Sequence[str], architecture: int) -> list[Subject]:
    """Every configuration that the cases ask for, each once, with the first case that does.

    Forward passes of training are left out: plain PyTorch has no counterpart, and others run their kernels.
    """
    cases = [case for case in cases if not case.op.endswith("_train")]
    found: dict[Wanted, Subject] = {}
    for case, precision in itertools.product(cases, precisions):
        with configs.wanted() as asked:
            case.launches(precision, architecture)
        for wanted in dict.fromkeys(asked):
            if wanted not in found:
                current = configs.config_of(wanted.kernel, architecture, wanted.dtype, wanted.width)
                found[wanted] = Subject(case, precision, wanted, current)
    return list(found.values())


def refused(wanted: Sequence[Subject], quick: bool, architecture: int) -> dict[tuple[Subject, Config], str]:
    """Why candidates cannot be taken: what the launcher or the compiler says.

    It compiles all candidates, many at a time, and so fills Triton's cache for the launches that follow.
    """
    problems: dict[tuple[Subject, Config], str] = {}
    compilations: dict[tuple[Subject, Config], list[sass.Compilation]] = {}
    for subject in wanted:
        for config in subject.candidates(quick):
            try:
                with configs.forced(subject.wanted.kernel, config):
                    launches = subject.case.launches(subject.precision, architecture)
            except Exception as error:
                problems[subject, config] = reason(error)
                continue
            compilations[subject, config] = [sass.compilation_of(one, architecture) for one in launches]
    compiled = sass.compile_all([one for found in compilations.values() for one in found])
    for (subject, config), found in compilations.items():
        for resources in map(compiled.__getitem__, found):
            if isinstance(resources, str):
                problems[subject, config] = resources.splitlines()[-1]
            elif resources.collapsed:
                problems[subject, config] = "ptxas collapsed"
            elif resources.stack and not subject.case.backward:
                problems[subject, config] = f"{resources.stack} bytes of stack"
    return problems


def plain(subject: Subject, arguments: Sequence[Any]) -> Any:
    """What plain PyTorch computes for the case."""
    op = subject.case.op
    if subject.case.backward:
        return COMPOSITES[f"{op}_backward"](*arguments)
    return getattr(reference, f"{'inner_block' if op == 'outer_block' else op}_in")(*arguments)


def why_wrong(found: Any, expected: Any) -> str:
    """Empty where a result is right."""
    pairs = zip(_tensors(found), _tensors(expected), strict=True)
    for ours, eager in pairs:
        scale = eager.abs().max().item() if eager.numel() else 0.0
        error = max_error(ours, eager.double())
        if not error <= TOLERANCE[eager.dtype] * scale:
            return f"wrong: error {error:.3g} at values up to {scale:.3g}"
    return ""


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def try_all(
    subject: Subject,
    candidates: Sequence[Config],
    problems: Mapping[tuple[Subject, Config], str],
    clock: Callable[[Callable[[], Any]], float],
) -> Iterator[Trial]:
    """Checks and times the candidates that have no problem; `clock` gives the milliseconds of a call."""
    call, arguments = subject.case.call(subject.precision, "cuda")
    expected = plain(subject, arguments)
    for config in candidates:
        milliseconds, problem = None, problems.get((subject, config), "")
        if not problem:
            try:
                with configs.forced(subject.wanted.kernel, config):
                    problem = why_wrong(call(*arguments), expected)
                    milliseconds = None if problem else clock(lambda: call(*arguments))
            except RuntimeError as error:  # of the launch, or memory that is not there
                problem = reason(error)
        yield Trial(subject.case.title, subject.precision, subject.wanted, config, milliseconds, problem)


def best(trials: Sequence[Trial]) -> Trial | None:
    """The fastest; the first, which is the present configuration, where none is clearly faster."""
    timed = [(trial.milliseconds, trial) for trial in trials if trial.milliseconds is not None]
    if not timed:
        return None
    first, fastest = timed[0], min(timed, key=lambda pair: pair[0])
    keep = trials[0] is first[1] and fastest[0] > WORTHWHILE * first[0]
    return (first if keep else fastest)[1]


def tune(
    wanted: Sequence[Subject],
    quick: bool,
    clock: Callable[[Callable[[], Any]], float],
    seconds: float,
    say: Callable[[str], None],
) -> list[list[Trial]]:
    """Trials of every subject; after so many `seconds` no further subject is begun."""
    end, found = time.monotonic() + seconds, []
    problems = refused(wanted, quick, runtime.architecture(torch.device("cuda")))
    for subject in wanted:
        name = f"{subject.wanted.kernel}, {subject.case.title}, {subject.precision}"
        if time.monotonic() > end:
            say(f"{name}: not tuned, out of time")
            continue
        trials = []
        for trial in try_all(subject, subject.candidates(quick), problems, clock):
            trials.append(trial)
            result = trial.problem or f"{trial.milliseconds:.4f} ms"
            say(f"{name}: {', '.join(map(str, trial.config))}: {result}")
        found.append(trials)
    return found


def updated(table: Table, architecture: int, trials: Sequence[Sequence[Trial]]) -> Table:
    """The table with the best of each subject under the architecture's name.

    An architecture that had no entries gets those of the one that it used so far.
    """
    new, name = copy.deepcopy(table), f"sm_{architecture}" if architecture else "other"
    for of_subject in trials:
        chosen = best(of_subject)
        if chosen is None:
            continue
        entries = new[chosen.wanted.kernel]
        if name not in entries:
            entries[name] = dict(entries[_stand_in(entries, architecture)])
        entries[name][chosen.entry] = list(chosen.config)
    return new


def _stand_in(entries: dict[str, Any], architecture: int) -> str:
    known = [int(name.removeprefix("sm_")) for name in entries if name != "other"]
    older = [number for number in known if number <= architecture]
    return f"sm_{max(older)}" if older else "other"


def save(table: Table, path: Path) -> None:
    """Writes a table, one line for each architecture."""
    kernels = []
    for kernel, architectures in table.items():
        lines = [f"  {json.dumps(name)}: {json.dumps(entries)}" for name, entries in architectures.items()]
        kernels.append(f" {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n }")
    path.write_text("{\n" + ",\n".join(kernels) + "\n}\n", "utf-8")
