"""What the engine runs: cases, the baselines of a case, and what a baseline's set-up returns."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tnt_kernels.bench.accuracy import Result

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEVICES = ("cpu", "cuda")


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
    def device(self) -> str: ...
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


def check_device(device: str) -> None:
    """Raises ValueError for a device that is unknown or not there."""
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, and torch sees no GPU")


def device_type(values: Sequence[Any]) -> str:
    """Type of the device of the first tensor among values, "cpu" where there is none."""
    return next((value.device.type for value in values if isinstance(value, Tensor)), "cpu")


def reason(error: BaseException) -> str:
    """One line that says why a baseline did not run."""
    if isinstance(error, NotRunError):
        return str(error)
    said = " ".join(str(error).split())
    return textwrap.shorten(f"{type(error).__name__}: {said}", 500, placeholder=" ...")


def torch_call(function: Callable[..., Any], args: tuple[Any, ...], dtype: str) -> Callable[[], Any]:
    """`function(*args)` as a user runs it for inference: inference mode, under autocast for bfloat16."""
    autocast, device = check_dtype(dtype) is torch.bfloat16, device_type(args)

    def call() -> Any:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=autocast):
            return function(*args)

    return call


def compiled(function: Any, mode: str | None = None, **options: Any) -> Any:
    """torch.compile of a function or module for fixed shapes, in a mode or with options of Inductor.

    Raises NotRunError without a C++ compiler.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        raise NotRunError("torch.compile needs a C++ compiler, and none was found") from error
    return torch.compile(function, dynamic=False, mode=mode, options=options or None)


def graphed(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Captures a call in a CUDA graph; calling the result replays it and returns the one output tensor."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
