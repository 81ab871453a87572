"""How a launcher runs a kernel: on its tensors' device, with errors that say what was launched.

Under :func:`recording` kernels are not run but noted down, with the arguments they would have had: so the
programs that compile them without a GPU compile what a user's call would.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from tnt_kernels.backends.triton.configs import Config

__all__ = [
    "Launch",
    "architecture",
    "contiguous",
    "dot_precision",
    "in_interpreter",
    "launch",
    "on_device",
    "recording",
]


class Launch(NamedTuple):
    """A kernel and what it is launched with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # tensors (None for absent ones) and numbers, by parameter name
    constants: dict[str, Any]  # values of its constexpr parameters
    config: Config


class _Recording(NamedTuple):
    architecture: int
    launches: list[Launch]


_recording: _Recording | None = None


@contextlib.contextmanager
def recording(architecture: int) -> Iterator[list[Launch]]:
    """Notes down the launches made inside it, as they would be on an architecture such as 90 for sm_90.

    Nothing runs, so tensors may be on the device "meta". For tools: it holds for every thread.
    """
    global _recording
    before, _recording = _recording, _Recording(architecture, [])
    try:
        yield _recording.launches
    finally:
        _recording = before


def in_interpreter() -> bool:
    """Returns whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _architecture(index: int) -> int:
    if torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


def architecture(device: torch.device) -> int:
    """Returns 90 for a GPU of compute capability 9.0, and so on; 0 for one that is not NVIDIA's."""
    if _recording is not None:
        return _recording.architecture
    if device.type != "cuda":
        return 90  # the interpreter
    return _architecture(device.index or 0)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes the device current, so that kernels go to its current stream."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def dot_precision(dtype: torch.dtype) -> str:
    """Returns `input_precision` of tl.dot for operands of this dtype: float32 to the last bits, or TF32 where
    torch is allowed to use it in matrix products."""
    # Not allow_tf32, which raises once a program has set this one.
    allowed = torch.backends.cuda.matmul.fp32_precision
    return "tf32" if dtype == torch.float32 and allowed == "tf32" else "tf32x3"


def launch(
    kernel: Any,
    grid: Sequence[int],
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    config: Config,
) -> None:
    """Launches a kernel on the device and current stream of its first tensor.

    Raises:
        RuntimeError: the kernel could not be compiled or launched; says which, with what, and where.
    """
    if _recording is not None:
        _recording.launches.append(Launch(kernel, tuple(grid), dict(arguments), dict(constants), config))
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    try:
        with on_device(device):
            kernel[tuple(grid)](**arguments, **constants, num_warps=config.warps, num_stages=config.stages)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        shapes = ", ".join(
            f"{name} {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
            for name, value in arguments.items()
            if isinstance(value, Tensor)
        )
        name = getattr(kernel, "__name__", str(kernel))
        raise RuntimeError(f"Triton kernel {name} failed on {device} with {shapes}: {error}") from error
