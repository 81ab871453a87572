"""Import timm, also beside a torchvision whose compiled operators do not fit this torch."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from types import ModuleType

import torch

# torchvision registers shape functions for these at import, and fails if its library did not declare them.
_TORCHVISION_OPERATORS = ("nms", "qnms")
_declared: list[torch.library.Library] = []


def import_timm() -> ModuleType:
    """The timm package. Raises ImportError, in one line, where it is missing or cannot be imported."""
    timm = sys.modules.get("timm")
    if timm is not None:
        return timm
    if importlib.util.find_spec("timm") is None:
        raise ImportError("timm is not installed: pip install 'tnt_kernels[timm]'")
    _declare_torchvision_operators()
    try:
        return importlib.import_module("timm")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ImportError(f"timm is installed but cannot be imported: {reason}") from error


def _declare_torchvision_operators() -> None:
    """Declare what torchvision's own library would have, if that cannot be loaded. TNT uses none of it."""
    spec = importlib.util.find_spec("torchvision") if "torchvision" not in sys.modules else None
    if spec is None or _declared:
        return
    library = importlib.machinery.PathFinder.find_spec("_C", list(spec.submodule_search_locations or ()))
    if library is not None and library.origin is not None:
        try:
            torch.ops.load_library(library.origin)
        except (ImportError, OSError):
            pass
    missing = [name for name in _TORCHVISION_OPERATORS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        # A fragment: another package may have declared the rest of the namespace.
        fragment = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            fragment.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(fragment)
