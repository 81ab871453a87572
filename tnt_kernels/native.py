"""Loads the native module ``tnt_kernels._native`` and remembers why it could not be loaded.

Nothing here raises while the package is imported: without the native module every operation runs
on the reference path, and the first one that would have used it says so, once.
"""

from __future__ import annotations

import importlib
import os
import warnings
from types import ModuleType

import torch  # noqa: F401  first: the native module must find torch's OpenMP runtime loaded

__all__ = ["cuda", "cuda_targets", "load", "warn_once", "why_missing", "why_no_cuda"]

_HOW_TO_GET = "build it with `pip install .` in a checkout (a C++17 compiler is needed)"


def _import_native() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("tnt_kernels._native"), None
    except ImportError as error:  # not built, or built for something that this process lacks
        return None, f"the native module tnt_kernels._native cannot be imported ({error})"


def _force_tier(module: ModuleType | None) -> str | None:
    """Applies TNT_CPU_TIER; returns the message of the error when it names no usable tier."""
    wanted = os.environ.get("TNT_CPU_TIER", "auto").strip().lower() or "auto"
    if module is None or wanted == "auto":
        return None
    tiers: list[tuple[str, str]] = module.tiers()
    if (wanted, "") in tiers:
        module.set_tier(wanted)
        return None
    listed = ", ".join(f"{name} ({why})" if why else name for name, why in tiers)
    return f"TNT_CPU_TIER={wanted!r} names no tier usable here; it must be auto or one of: {listed}"


_module, _reason = _import_native()
_tier_error = _force_tier(_module)
_warned = False


def load() -> ModuleType | None:
    """Returns the native module, or None where it is missing (see :func:`why_missing`).

    Raises:
        ValueError: TNT_CPU_TIER names a tier that does not exist or that this processor cannot run.
    """
    if _tier_error is not None:
        raise ValueError(_tier_error)
    return _module


def why_missing() -> str | None:
    """Returns None when the native module is loaded, otherwise the reason why it is not."""
    return _reason


def cuda() -> ModuleType | None:
    """Returns the part of the native module for NVIDIA GPUs, or None where it was built without."""
    return getattr(_module, "cuda", None)


def why_no_cuda() -> str | None:
    """Returns None when the native module has CUDA kernels, otherwise the reason why not."""
    return None if cuda() is not None else _reason or "the native module was built without CUDA kernels"


def cuda_targets() -> str:
    """Returns the architectures that the CUDA kernels were compiled for, or "" where there are none."""
    module = cuda()
    if module is None:
        return ""
    newest = module.architectures[-1]
    return f"{' '.join(f'sm_{number}' for number in module.architectures)}, PTX of sm_{newest} for later ones"


def warn_once() -> None:
    """Warns, once in a process, that the native module is missing and how to get it."""
    global _warned
    if _warned or _reason is None:
        return
    _warned = True
    warnings.warn(
        f"tnt_kernels: {_reason}; CPU operations run on the slower PyTorch path. To get it, {_HOW_TO_GET}.",
        RuntimeWarning,
        stacklevel=3,
    )


# Dynamo runs the function while it traces instead of tracing it. torch.compiler.assume_constant_result
# sets the same mark, but imports Dynamo, which takes longer than all of this package.
warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]
