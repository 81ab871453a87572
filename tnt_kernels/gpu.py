"""Whether the kernels of Triton, and those of CUDA in the native module, can run on a GPU, and why not.

Nothing here imports Triton or touches a GPU before a tensor on one arrives. Without it every operation on
the GPU runs on the reference path, and the first one that would have used a kernel says so, once.
"""

from __future__ import annotations

import functools
import importlib
import warnings

import torch

from tnt_kernels import native

__all__ = ["OLDEST", "warn_once", "why_no_cuda", "why_unusable"]

OLDEST = (7, 5)  # compute capability of the oldest NVIDIA GPU that Triton supports


def why_unusable(device: int) -> str | None:
    """Returns None when the Triton backend can run on GPU number `device`, otherwise the reason."""
    return _why_unusable(device)


# The cache stands behind a function of its own: Dynamo looks for its mark on a plain function.
@functools.cache
def _why_unusable(device: int) -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST:
        major, minor = torch.cuda.get_device_capability(device)
        oldest = ".".join(map(str, OLDEST))
        return f"GPU {device} is of compute capability {major}.{minor}; {oldest} is the oldest supported"
    try:
        # Triton builds its launcher with a C compiler at the first launch: only a launch tells.
        importlib.import_module("tnt_kernels.backends.triton.probe").run(device)
    except torch.OutOfMemoryError:
        raise
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"Triton cannot run a kernel on GPU {device} ({first_line})"
    return None


def why_no_cuda(device: int) -> str | None:
    """Returns None when the native CUDA kernels can run on GPU number `device`, otherwise the reason."""
    return _why_no_cuda(device)


@functools.cache
def _why_no_cuda(device: int) -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    cuda = native.cuda()
    if cuda is None:
        return native.why_no_cuda()
    if torch.version.hip is not None:
        return f"GPU {device} is not NVIDIA's"
    major, minor = torch.cuda.get_device_capability(device)
    if not _has_code(cuda.architectures, major, minor):
        return (
            f"GPU {device} is of compute capability {major}.{minor}; the native module was built for "
            f"{native.cuda_targets()}"
        )
    try:
        with torch.cuda.device(device):
            cuda.probe()
    except RuntimeError as error:
        return f"CUDA kernels cannot run on GPU {device} ({error})"
    return None


def _has_code(architectures: list[int], major: int, minor: int) -> bool:
    """Whether kernels of these architectures, and of the last one's PTX, run on a compute capability."""
    same = any(number // 10 == major and number % 10 <= minor for number in architectures)
    return same or architectures[-1] <= major * 10 + minor


_warned: set[str] = set()


def warn_once(reason: str) -> None:
    """Warns, once in a process for each reason, that GPU operations run on the reference path."""
    if reason in _warned:
        return
    _warned.add(reason)
    warnings.warn(
        f"tnt_kernels: {reason}; GPU operations run on the slower PyTorch path.", RuntimeWarning, stacklevel=3
    )


# Dynamo runs these while it traces, as it does native.warn_once.
why_unusable._dynamo_marked_constant = True  # type: ignore[attr-defined]
why_no_cuda._dynamo_marked_constant = True  # type: ignore[attr-defined]
warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]
