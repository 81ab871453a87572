"""Rows per program, warps and pipeline stages of every kernel: a table made by benchmarks/tune.py."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["PATH", "Config", "Wanted", "config_of", "entry_of", "forced", "table", "wanted"]

PATH = Path(__file__).with_name("configs.json")


class Config(NamedTuple):
    """How a kernel is compiled and how much of the problem one of its programs takes."""

    rows: int  # of words or sentences in a program, a power of two
    warps: int
    stages: int = 1


class Wanted(NamedTuple):
    """What a configuration is asked for by."""

    kernel: str
    dtype: torch.dtype
    width: int


_forced: dict[str, Config] = {}
_wanted: list[Wanted] | None = None


class forced:
    """Context manager that makes a kernel take a configuration, whatever the table says; for the tuner."""

    def __init__(self, kernel: str, config: Config) -> None:
        self.kernel, self.config = kernel, config

    def __enter__(self) -> None:
        _forced[self.kernel] = self.config

    def __exit__(self, *_: object) -> None:
        del _forced[self.kernel]


@contextlib.contextmanager
def wanted() -> Iterator[list[Wanted]]:
    """Notes down the configurations asked for inside it; for the tuner."""
    global _wanted
    before, _wanted = _wanted, []
    try:
        yield _wanted
    finally:
        _wanted = before


@functools.cache
def table() -> dict[str, dict[str, dict[str, list[int]]]]:
    """Returns kernel -> architecture ("sm_90", "other") -> "dtype width" -> [rows, warps, stages]."""
    found: dict[str, dict[str, dict[str, list[int]]]] = json.loads(PATH.read_text("utf-8"))
    return found


def entry_of(kernel: str, architecture: int, dtype: torch.dtype, width: int) -> tuple[str, str]:
    """Returns where in a kernel's part of the table its configuration stands: ("sm_90", "16bit 64")."""
    architectures = table()[kernel]
    known = sorted(int(name.removeprefix("sm_")) for name in architectures if name != "other")
    # The newest architecture not newer than this one; shared memory differs between 80 and 86.
    at_most = [number for number in known if number <= architecture]
    name = f"sm_{at_most[-1]}" if at_most else "other"
    size = "float32" if dtype == torch.float32 else "16bit"
    if not any(key.startswith(size) for key in architectures[name]):  # launchers call it with the other alone
        size = "16bit" if size == "float32" else "float32"
    widths = sorted(int(key.split()[1]) for key in architectures[name] if key.split()[0] == size)
    chosen = next((w for w in widths if w >= width), widths[-1])
    return name, f"{size} {chosen}"


@functools.cache
def _from_table(kernel: str, architecture: int, dtype: torch.dtype, width: int) -> Config:
    name, entry = entry_of(kernel, architecture, dtype, width)
    return Config(*table()[kernel][name][entry])


def config_of(kernel: str, architecture: int, dtype: torch.dtype, width: int) -> Config:
    """Returns how to run a kernel.

    Args:
        kernel: its name in the table.
        architecture: 90 for sm_90 and so on, 0 for a GPU that is not NVIDIA's.
        dtype: that of the operands of matrix products.
        width: what the kernel's cost depends on (channels); the table's next larger entry is taken.
    """
    if _wanted is not None:
        _wanted.append(Wanted(kernel, dtype, width))
    return _forced.get(kernel) or _from_table(kernel, architecture, dtype, width)
