"""Registers, stack, shared memory and instructions of the native module's CUDA kernels, and their limits.

They are read from the machine code that the module holds, as nvcc built it: nothing is compiled here.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tnt_kernels import native
from tnt_kernels.bench import sass
from tnt_kernels.bench.environment import usable_cores
from tnt_kernels.bench.resources import FEWEST
from tnt_kernels.bench.results import table

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)  # that the committed limits are of
EMPTY = frozenset({"nothing"})  # kernels that are to do nothing
_STATIC_SHARED = 48 << 10  # bytes that a kernel may declare on any architecture


@dataclass(frozen=True)
class Row:
    """A kernel in the native module; `problem` says what keeps it from being read."""

    architecture: int
    kernel: str  # with its template arguments: "pixel_embed_kernel<BFloat16, 3>"
    calls: tuple[str, ...]  # functions that were not inlined, but for the compiler's own
    resources: sass.Resources | None
    problem: str = ""

    @property
    def case(self) -> str:
        """The part of the limits that it is in."""
        return f"sm_{self.architecture}"

    @property
    def name(self) -> str:
        return self.kernel

    def limits(self) -> dict[str, float]:
        """The figures that are held to limits."""
        found = self.resources
        if found is None:
            return {}
        return {
            "registers": found.registers,
            "stack": found.stack,
            "spilled": found.spilled,
            "shared": found.shared,
            "instructions": found.total,
        }


@dataclass(frozen=True)
class Module:
    """What a file holds for GPUs: nvcc's version, such as "13.0.88", and all kernels."""

    nvcc: str
    rows: tuple[Row, ...]


def built_for() -> list[int]:
    """The architectures whose machine code the native module says that it has."""
    cuda = native.cuda()
    return [] if cuda is None else list(cuda.architectures)


def measure() -> Module:
    """The kernels of the native module. Raises RuntimeError where it has none."""
    module, cuda = native.load(), native.cuda()
    if module is None or cuda is None:
        raise RuntimeError(native.why_no_cuda())
    return read(Path(str(module.__file__)), cuda.version)


def read(path: Path, version: str = "") -> Module:
    """The kernels in a cubin, or in those that a shared object holds.

    version: nvcc's, where the code does not tell; compilers before CUDA 12.9 do not write it there.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubins = [path.resolve()] if path.suffix == ".cubin" else _extract(path.resolve(), folder)
        with ThreadPoolExecutor(usable_cores()) as pool:
            rows = list(pool.map(_read_cubin, cubins))
        told = {found for cubin in cubins for found in _compilers(cubin.read_bytes())}
    return Module(
        ", ".join(sorted(told)) or version,
        tuple(sorted((row for of_cubin in rows for row in of_cubin), key=_order)),
    )


def _order(row: Row) -> tuple[int, str]:
    return row.architecture, row.kernel


def _compilers(cubin: bytes) -> Iterator[str]:
    for found in re.findall(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", cubin):
        yield found.decode()


@functools.cache
def _cuobjdump() -> str:
    """The disassembler beside nvcc, which knows what nvcc writes; where there is none, Triton's."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    beside = shutil.which("cuobjdump", path=os.path.join(home, "bin")) if home else None
    return beside or shutil.which("cuobjdump") or sass.cuobjdump()


def _run(*arguments: str | Path, folder: str | None = None) -> str:
    done = subprocess.run([_cuobjdump(), *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{_cuobjdump()} {' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done.stdout


def _extract(path: Path, folder: str) -> list[Path]:
    _run("-xelf", "all", path, folder=folder)
    return sorted(Path(folder).glob("*.cubin"))


def _read_cubin(path: Path) -> list[Row]:
    code = _run("-sass", path)
    architecture = re.search(r"code for sm_(\d+)", code)
    if architecture is None:
        raise RuntimeError(f"{path.name}: cuobjdump names no architecture")
    usages = re.findall(r"Function (\w+):\s*(REG:.*)", _run("-res-usage", path))
    programs = dict(_programs(code))
    calls = _not_inlined(path.read_bytes())
    rows = []
    for symbol, usage in usages:
        begin = (int(architecture[1]), short_name(demangle(symbol)), calls.get(symbol, ()))
        program, shared = programs.get(symbol, ""), re.search(r"SHARED:(\d+)", usage)
        if shared is None or "EXIT" not in program:
            rows.append(Row(*begin, None, "its program has no end: it can only trap"))
        else:
            rows.append(Row(*begin, sass.read(usage, program, int(shared[1]))))
    return rows


def _programs(code: str) -> Iterator[tuple[str, str]]:
    """Symbol and machine code of each kernel."""
    for part in re.split(r"^\s*Function : ", code, flags=re.MULTILINE)[1:]:
        symbol, _, text = part.partition("\n")
        yield symbol.strip(), text


def _not_inlined(cubin: bytes) -> dict[str, tuple[str, ...]]:
    """Functions that kernels call, by the kernel's symbol: theirs are named $kernel$function.

    The compiler's own, such as a division of 64-bit numbers, are called $__internal_0_$__cuda_...
    """
    found: dict[str, list[str]] = {}
    for kernel, function in re.findall(rb"\x00\$(_Z\w+)\$(_Z\w+)(?=\x00)", cubin):
        found.setdefault(kernel.decode(), []).append(short_name(demangle(function.decode())))
    return {kernel: tuple(functions) for kernel, functions in found.items()}


@functools.cache
def _demangler() -> Any:
    library = ctypes.CDLL("libstdc++.so.6")
    function = library.__cxa_demangle
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)]
    return function


def demangle(symbol: str) -> str:
    """The C++ name of a symbol, or the symbol where it is none, by the native module's own C++ runtime."""
    status = ctypes.c_int()
    found = _demangler()(symbol.encode(), None, None, ctypes.byref(status))
    if not found:
        return symbol
    try:
        return ctypes.string_at(found).decode()
    finally:
        ctypes.CDLL(None).free(ctypes.c_void_p(found))


def short_name(name: str) -> str:
    """A function's name with its template arguments, without namespaces, parameters and result."""
    bare = re.sub(r"\(anonymous namespace\)::|\b\w+::", "", name)
    found = re.search(r"(\w+(?:<[^()]*>)?)\(", bare)
    return found[1] if found else bare


def violations(module: Module, limits: Mapping[str, Any]) -> list[str]:
    """What is wrong with the kernels, one line for each.

    Rules for any compiler: no stack and no spills, nothing but the compiler's own functions called, the work
    still there, and a limit for every kernel. The figures hold for the nvcc that they were written with.
    """
    figures = limits.get("nvcc") == module.nvcc
    found: list[str] = []
    for row in module.rows:
        found += _violations(row)
        limit = limits.get("cuda_kernels", {}).get(row.case, {}).get(row.name)
        if limit is None:
            found.append(f"{row.case} {row.name}: no limits; run benchmarks/resources.py --write-limits")
        elif figures and row.resources is not None:
            found += _over(row, limit)
    return found


def _violations(row: Row) -> Iterator[str]:
    where = f"{row.case} {row.name}"
    for function in row.calls:
        yield f"{where}: calls {function}, which was not inlined"
    resources = row.resources
    if resources is None:
        yield f"{where}: {row.problem}"
        return
    if resources.total < FEWEST and row.kernel not in EMPTY:
        yield f"{where}: {resources.total} instructions: the compiler has dropped the work"
    if resources.stack or resources.spilled:
        yield f"{where}: {resources.stack} bytes of stack, {resources.spilled} spilled"
    if resources.shared > _STATIC_SHARED:
        yield f"{where}: {resources.shared} bytes of static shared memory, {_STATIC_SHARED} at most"


def _over(row: Row, limits: Mapping[str, float]) -> Iterator[str]:
    for what, value in row.limits().items():
        if value > limits[what]:
            yield f"{row.case} {row.name}: {what} {value:g}, the limit is {limits[what]:g}"


def as_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def report(rows: Sequence[Row]) -> str:
    """A markdown table, one line for each kernel. Shared memory is what the kernel declares; launches add
    what they need."""
    kinds = [*sass.KINDS, "other"]
    headers = ["sm", "kernel", "registers", "stack", "spilled", "shared", "instructions", "in loops", *kinds]
    lines = []
    for row in rows:
        found = row.resources
        if found is None:
            lines.append([str(row.architecture), row.kernel, row.problem, *[""] * (len(headers) - 3)])
            continue
        figures = (found.registers, found.stack, found.spilled, found.shared, found.total)
        looped = str(found.looped) if found.loops else ""
        counts = (str(found.instructions[kind]) for kind in kinds)
        lines.append([str(row.architecture), row.kernel, *map(str, figures), looped, *counts])
    return table(headers, lines, right=range(2, len(headers)))
