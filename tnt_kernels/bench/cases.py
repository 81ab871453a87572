"""What the engine runs: cases, the baselines of a case, and what a baseline's set-up returns."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from tnt_kernels.bench.accuracy import Result

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class NotRunError(Exception):
    """A baseline that cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Runner:
    """A baseline that is ready: `call()` runs it once, which is what is timed.

    precision: what it really computes in, where that is not the case's; `note` says so in words.
    result: gives what is checked, where a call returns something else.
    saved_bytes: of a case with a backward pass, how much the forward pass holds for it.
    """

    call: Callable[[], Result]
    precision: torch.dtype
    note: str = ""
    result: Callable[[], Result] | None = None
    saved_bytes: Callable[[], int] | None = None


@dataclass(frozen=True)
class Baseline:
    """One line of a comparison. `build(case, artifacts)` sets up speed, memory and correctness alike.

    family: the network whose exact output it must give ("tnt", "deit"); ours: held to this package's own
    limit of error instead of the wide one. `artifacts` is a directory where exported models are kept, also
    for other processes.
    """

    name: str
    label: str
    build: Callable[[Any, Path], Runner]
    family: str = "tnt"
    ours: bool = False


class Case(Protocol):
    """A workload. Frozen dataclasses implement it: `fields` travel to other processes as JSON."""

    @property
    def kind(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def items(self) -> int: ...
    @property
    def unit(self) -> str: ...
    def fields(self) -> dict[str, Any]: ...
    def baselines(self) -> Mapping[str, Baseline]: ...
    def exact(self, family: str) -> Result: ...
    def eager(self, family: str) -> Result: ...
    def checked(self, result: Any) -> Result: ...


def check_dtype(dtype: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def reason(error: BaseException) -> str:
    """One line that says why a baseline did not run."""
    if isinstance(error, NotRunError):
        return str(error)
    said = " ".join(str(error).split())
    return textwrap.shorten(f"{type(error).__name__}: {said}", 500, placeholder=" ...")


def torch_call(function: Callable[..., Any], args: tuple[Any, ...], dtype: str) -> Callable[[], Any]:
    """`function(*args)` as a user runs it for inference: inference mode, under autocast for bfloat16."""
    autocast = check_dtype(dtype) is torch.bfloat16

    def call() -> Any:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return function(*args)

    return call


def compiled(function: Any, **options: Any) -> Any:
    """torch.compile of a function or module for fixed shapes. Raises NotRunError without a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        raise NotRunError("torch.compile needs a C++ compiler, and none was found") from error
    return torch.compile(function, dynamic=False, options=options or None)
