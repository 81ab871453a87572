"""Registers, stack, shared memory and instructions of every Triton kernel, and the limits that they keep."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import triton

from tnt_kernels.backends.triton import configs
from tnt_kernels.backends.triton.runtime import Launch
from tnt_kernels.bench import sass
from tnt_kernels.bench.kernel_cases import PRECISIONS, KernelCase, cases, of_model
from tnt_kernels.bench.results import table

# Bytes of shared memory that a program may have, by compute capability (CUDA C++ Programming Guide, technical
# specifications per compute capability).
SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
ARCHITECTURES = tuple(SHARED)
FEWEST = (
    20  # instructions that any kernel has; on sm_100 Triton drops a product that finds no room, in silence
)

# Instructions per sentence that the inner block's forward pass may take on sm_90 in bfloat16, by case.
GOALS = {
    "inner_block c=24 heads=4": 1284,
    "inner_block c=40 heads=4": 2161,
    "inner_block c=48 heads=4": 2258,
}


class Limited(Protocol):
    """A kernel whose figures are held to limits: a line, `name`, in a block of the file, `case`."""

    @property
    def case(self) -> str: ...
    @property
    def name(self) -> str: ...
    def limits(self) -> dict[str, float]: ...


@dataclass(frozen=True)
class Row:
    """A kernel of a case, compiled for an architecture; `problem` is what the compiler said if it failed."""

    case: str
    strict: bool  # a forward pass of TNT's own sizes with 16-bit products, which may have no stack
    precision: str
    architecture: int
    kernel: str  # with "#2" and so on where a case launches it again with other code
    config: tuple[int, ...]  # rows, warps, stages
    resources: sass.Resources | None
    instructions: float | None  # per sentence, of all warps of all programs
    weighed: bool = True  # whether they count as often as they run; otherwise those in loops count once
    problem: str = ""

    @property
    def name(self) -> str:
        return f"{self.precision} sm_{self.architecture} {self.kernel}"

    def limits(self) -> dict[str, float]:
        """The figures that are held to limits."""
        found = self.resources
        if found is None or self.instructions is None:
            return {}
        return {
            "registers": found.registers,
            "stack": found.stack,
            "spilled": found.spilled,
            "shared": found.shared,
            "instructions": self.instructions,
        }


def measure(wanted: Sequence[tuple[KernelCase, str, int]]) -> tuple[Row, ...]:
    """Compiles the kernels of cases, each in a precision for an architecture.

    A precision that a launcher refuses raises its error.
    """
    launched = [
        (case, precision, architecture, launch)
        for case, precision, architecture in wanted
        for launch in case.launches(precision, architecture)
    ]
    compilations = [sass.compilation_of(launch, architecture) for _, _, architecture, launch in launched]
    compiled = sass.compile_all(compilations)
    rows: dict[tuple[str, str], dict[sass.Compilation, Row]] = {}
    for (case, precision, architecture, launch), compilation in zip(launched, compilations, strict=True):
        found = compiled[compilation]
        base = f"{precision} sm_{architecture} {compilation.kernel}"
        same = rows.setdefault((case.title, base), {})
        if compilation in same:
            continue
        kernel = compilation.kernel + (f"#{len(same) + 1}" if same else "")
        strict = not (case.backward or case.odd or precision in ("float32", "widened"))
        begin = (case.title, strict, precision, architecture, kernel, tuple(launch.config))
        if isinstance(found, str):
            same[compilation] = Row(*begin, None, None, problem=found)
        else:
            same[compilation] = Row(*begin, found, *_instructions(found, launch, case.sentences))
    return tuple(row for same in rows.values() for row in same.values())


def _instructions(found: sass.Resources, launch: Launch, sentences: int) -> tuple[float, bool]:
    """Instructions of all warps of all programs, over the sentences, and whether that is all of them.

    A kernel with an argument `tiles` goes through them in one loop. Of other loops the rounds are not known.
    """
    programs, tiles = launch.grid[0], launch.arguments.get("tiles")
    weighed = found.loops == (tiles is not None)
    rounds = tiles / programs if tiles is not None and weighed else 1.0
    once = found.total - found.looped
    taken = (once + found.looped * rounds) * programs * launch.config.warps / sentences
    return round(taken, 1), weighed


def violations(rows: Sequence[Row], limits: Mapping[str, Any]) -> list[str]:
    """What is wrong with compiled kernels, one line for each.

    Rules for any compiler: strict rows have no stack, no program takes more shared memory than the
    architecture has, ptxas has not collapsed, the goals are kept. The committed limits hold for the version
    of Triton that they were written with.
    """
    found = [line for row in rows for line in _violations(row)]
    found += _missed_goals(rows)
    if limits.get("triton") == triton.__version__:
        found += [line for row in rows for line in _over(row, limits["kernels"].get(row.case, {}))]
    return found


def _violations(row: Row) -> Iterator[str]:
    where = f"{row.case}: {row.name}"
    if row.resources is None:
        yield f"{where}: not compiled: {row.problem}"
        return
    if row.resources.total < FEWEST:
        yield f"{where}: {row.resources.total} instructions: the compiler has dropped the work"
    if row.resources.collapsed:
        yield (
            f"{where}: ptxas collapsed: {row.resources.registers} registers, "
            f"{row.resources.stack} bytes of stack"
        )
    elif row.resources.stack and row.strict:
        yield f"{where}: {row.resources.stack} bytes of stack in a forward kernel"
    if row.resources.shared > SHARED[row.architecture]:
        yield (
            f"{where}: {row.resources.shared} bytes of shared memory, sm_{row.architecture} has "
            f"{SHARED[row.architecture]}"
        )


def _missed_goals(rows: Sequence[Row]) -> Iterator[str]:
    for case, goal in GOALS.items():
        of_case = [r for r in rows if (r.case, r.precision, r.architecture) == (case, "bfloat16", 90)]
        taken = sum(row.instructions or 0.0 for row in of_case)
        if taken > goal:
            yield f"{case}: {taken:.0f} instructions per sentence on sm_90, the goal is {goal}"
        longest = max(of_case, key=lambda row: row.instructions or 0.0, default=None)
        if longest is not None and not longest.weighed:
            yield f"{case}: {longest.name} has a loop: it takes more instructions than were counted"


def _over(row: Row, limits: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    where = f"{row.case}: {row.name}"
    if row.resources is None:
        return
    for what, limit in limits.get(row.name, {}).items():
        value = row.limits()[what]
        if value > limit:
            yield f"{where}: {what} {value:g}, the limit is {limit:g}"


def load_limits(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def save_limits(
    rows: Sequence[Limited], path: Path, nvcc: str = "", cuda_rows: Sequence[Limited] = ()
) -> None:
    """Writes the figures of these rows as the limits, one line for each kernel.

    nvcc, cuda_rows: the compiler of the CUDA kernels, and those.
    """
    parts = {"triton": json.dumps(triton.__version__), "kernels": _blocks(rows)}
    if nvcc:
        parts |= {"nvcc": json.dumps(nvcc), "cuda_kernels": _blocks(cuda_rows)}
    text = ",\n".join(f' "{name}": {value}' for name, value in parts.items())
    path.write_text(f"{{\n{text}\n}}\n", "utf-8")


def _blocks(rows: Sequence[Limited]) -> str:
    cases: dict[str, list[str]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(f"   {json.dumps(row.name)}: {json.dumps(row.limits())}")
    blocks = [f"  {json.dumps(case)}: {{\n" + ",\n".join(lines) + "\n  }" for case, lines in cases.items()]
    return "{\n" + ",\n".join(blocks) + "\n }"


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def committed() -> list[tuple[KernelCase, str, int]]:
    """What the tests compile and limits are written for, a part of everything.

    On sm_90 every case in bfloat16, and TNT-S and TNT-B in every precision; on each architecture what it
    takes to have every entry of the table.
    """
    found = []
    ordered = sorted(cases(), key=of_model, reverse=True)
    for architecture in ARCHITECTURES:
        covered: set[tuple[str, str, str]] = set()
        for precision, case in itertools.product(PRECISIONS, ordered):
            model = of_model(case) and precision != "widened"
            taken = entries(case, precision, architecture)
            if (architecture == 90 and (precision == "bfloat16" or model)) or not taken <= covered:
                covered |= taken
                found.append((case, precision, architecture))
    return found


def entries(case: KernelCase, precision: str, architecture: int) -> set[tuple[str, str, str]]:
    """Kernel, architecture and entry of every configuration of the table that a case takes."""
    with configs.wanted() as asked:
        case.launches(precision, architecture)
    return {(one.kernel, *configs.entry_of(one.kernel, architecture, one.dtype, one.width)) for one in asked}


def report(rows: Sequence[Row]) -> str:
    """A markdown table, one line for each kernel. Behind a count that knows not how often loops run: a +."""
    kinds = [*sass.KINDS, "other"]
    headers = [
        "case", "precision", "sm", "kernel", "rows, warps, stages", "registers", "stack", "spilled", "shared",
        "instructions per sentence", "in loops", *kinds,
    ]  # fmt: skip
    lines = []
    for row in rows:
        found = row.resources
        head = [row.case, row.precision, str(row.architecture), row.kernel, ", ".join(map(str, row.config))]
        if found is None:
            lines.append([*head, "not compiled", *[""] * (len(headers) - len(head) - 1)])
            continue
        lines.append(
            [
                *head,
                *map(str, (found.registers, found.stack, found.spilled, found.shared)),
                f"{row.instructions:.0f}{'+' * (not row.weighed)}",
                f"{found.looped} of {found.total}" if found.loops else "",
                *(str(found.instructions[kind]) for kind in kinds),
            ]
        )
    return table(headers, lines, right=range(5, len(headers)))
