"""Compiles Triton kernels for a GPU that need not be there, and reads what came out.

ptxas and cuobjdump come with Triton. `compile_all` compiles in processes of their own, each distinct
compilation once; Triton's cache makes repeats cheap.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource

from tnt_kernels.backends.triton.runtime import Launch
from tnt_kernels.bench.environment import usable_cores

# From Triton 3.7 on a launch names the (absent) attributes of constants too, which its cache's key tells.
CONSTANTS_HAVE_ATTRIBUTES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)

# Kinds of instructions, by what their names begin with; the first that fits. GMMA and UTC*MMA are the tensor
# cores' of sm_90 and sm_100.
KINDS: dict[str, str] = {
    "tensor": r"[A-Z]*MMA$",
    "fp32": r"F(FMA|ADD|MUL)\d?$",
    "mufu": r"MUFU",
    "conversion": r"F2|I2|HADD2\.F32",
    "shuffle": r"SHFL|REDUX",
    "shared": r"LD(S|SM|TM)$|ST(S|SM|TM)$|ATOMS",
    "local": r"(LDL|STL)$",
    "global": r"LDG|STG|LDGSTS|LD$|ST$|RED$|REDG|ATOM|UBLK|UTMA",
}
_INSTRUCTION = re.compile(
    r"/\*(?P<at>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][A-Z0-9_]*)(?P<flags>[.\w]*)(?P<rest>[^;]*);"
)
# What a loop does that only waits, and how long the longest of them is in bytes of code.
_WAITS = {"SYNCS", "NANOSLEEP", "UTCATOMSWS"}
_LONGEST_WAIT = 16 * 16
_WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # bytes a thread


@dataclass(frozen=True)
class Compilation:
    """A kernel with all that decides its machine code: equal ones compile to the same."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]  # parameter, type
    constants: tuple[tuple[int, Any], ...]  # position, value
    attributes: tuple[tuple[int, bool], ...]  # position, whether 16 divides the pointer or number
    architecture: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes."""

    registers: int  # a thread
    stack: int  # bytes a thread
    spilled: int  # bytes a thread that its loads and stores of local memory move
    shared: int  # bytes a program
    loops: int  # with none, every instruction runs at most once in a warp
    looped: int  # instructions inside of loops
    instructions: dict[str, int]  # by kind, as they stand in the program

    @property
    def total(self) -> int:
        return sum(self.instructions.values())

    @property
    def collapsed(self) -> bool:
        """Whether ptxas gave up on registers: few of them, and kilobytes of stack."""
        return self.registers <= 40 and self.stack >= 1024


def compilation_of(launch: Launch, architecture: int) -> Compilation:
    """What a launch would have compiled: Triton specialises numbers equal to 1, multiples of 16, None."""
    signature, constants, attributes = [], [], []
    for position, parameter in enumerate(launch.kernel.params):
        if parameter.is_constexpr:
            kind, found, value = "constexpr", "", launch.constants.get(parameter.name, parameter.default)
        else:
            value = launch.arguments[parameter.name]
            kind, found = native_specialize_impl(
                BaseBackend,
                value,
                parameter.is_const,
                not parameter.do_not_specialize,
                not parameter.do_not_specialize_on_alignment,
            )
        signature.append((parameter.name, kind))
        if kind == "constexpr":
            constants.append((position, value))
            if CONSTANTS_HAVE_ATTRIBUTES:
                attributes.append((position, False))
        elif isinstance(found, str):
            attributes.append((position, "D" in found))
    return Compilation(
        launch.kernel.fn.__module__,
        launch.kernel.fn.__name__,
        tuple(signature),
        tuple(constants),
        tuple(attributes),
        architecture,
        launch.config.warps,
        launch.config.stages,
    )


def compile_all(wanted: Sequence[Compilation]) -> dict[Compilation, Resources | str]:
    """Compiles each once; in place of the resources of one that failed stands what the compiler said."""
    distinct = list(dict.fromkeys(wanted))
    workers = min(usable_cores(), len(distinct))
    if workers <= 1:
        return {compilation: _attempt(compilation) for compilation in distinct}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        return dict(zip(distinct, pool.map(_attempt, distinct), strict=True))


def _attempt(compilation: Compilation) -> Resources | str:
    try:
        return compile_one(compilation)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip()}"


def source_of(compilation: Compilation) -> ASTSource:
    """The source as a launch hands it to the compiler, so that both share Triton's cache."""
    divided = [["tt.divisibility", 16]]
    return ASTSource(
        fn=getattr(importlib.import_module(compilation.module), compilation.kernel),
        signature=dict(compilation.signature),
        constexprs={(position,): value for position, value in compilation.constants},
        attrs={(position,): divided if holds else [] for position, holds in compilation.attributes},
    )


def compile_one(compilation: Compilation) -> Resources:
    compiled = triton.compile(
        source_of(compilation),
        target=GPUTarget("cuda", compilation.architecture, 32),
        options={"num_warps": compilation.warps, "num_stages": compilation.stages},
    )
    usage, code = _dump(compiled.asm["cubin"])
    return read(usage, code, compiled.metadata.shared)


def cuobjdump() -> str:
    """Path of the disassembler: TRITON_CUOBJDUMP_PATH or the one in Triton's wheel."""
    return str(triton.knobs.nvidia.cuobjdump.path)


def _dump(cubin: bytes) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage, code = (
            subprocess.run(
                [cuobjdump(), option, os.fspath(path)], check=True, capture_output=True, text=True
            ).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    return usage, code


def read(usage: str, code: str, shared: int) -> Resources:
    """Reads cuobjdump's resource usage and machine code. ValueError: they do not look as they should."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    instructions = [i for i in _INSTRUCTION.finditer(code) if i["name"] != "NOP"]
    if found is None or not any(i["name"] == "EXIT" for i in instructions):
        raise ValueError("cuobjdump printed no registers or no program")
    if instructions[-1]["name"] == "BRA":
        instructions.pop()  # to itself, behind the end
    counts: Counter[str] = Counter()
    spilled = 0
    for instruction in instructions:
        kind = kind_of(instruction["name"], instruction["flags"])
        counts[kind] += 1
        if kind == "local":
            flags = instruction["flags"].split(".")
            spilled += next((_WIDTH[flag] for flag in flags if flag in _WIDTH), 4)
    loops = _loops(instructions)
    inside = sum(any(first <= at <= last for first, last in loops) for at in map(_at, instructions))
    kinds = {kind: counts[kind] for kind in (*KINDS, "other")}
    return Resources(int(found[1]), int(found[2]), spilled, shared, len(loops), inside, kinds)


def _at(instruction: re.Match[str]) -> int:
    return int(instruction["at"], 16)


def _loops(instructions: Sequence[re.Match[str]]) -> list[tuple[int, int]]:
    """First and last address of every loop, but for those that wait for a barrier or for memory.

    Code behind the program's end is no loop either: it returns to where the program left for it.
    """
    end = max(_at(i) for i in instructions if i["name"] == "EXIT")
    waits = [_at(i) for i in instructions if i["name"] in _WAITS]
    found = []
    for branch in instructions:
        target = re.search(r"0x([0-9a-f]+)", branch["rest"]) if branch["name"] == "BRA" else None
        if target is None or _at(branch) > end:
            continue
        first, last = int(target[1], 16), _at(branch)
        waiting = last - first < _LONGEST_WAIT and any(first <= at <= last for at in waits)
        if first <= last and not waiting:
            found.append((first, last))
    return found


def kind_of(name: str, flags: str = "") -> str:
    """The kind of an instruction, such as "fp32" for FFMA; `flags` are what follows its name."""
    for kind, pattern in KINDS.items():
        if re.match(pattern, name) or ("\\." in pattern and re.match(pattern, name + flags)):
            return kind
    return "other"
