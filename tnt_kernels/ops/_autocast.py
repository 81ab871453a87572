"""What the active torch.autocast means for an operation."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype_of(x: Tensor) -> torch.dtype | None:
    """Returns the dtype in which autocast wants matrix products held, None without autocast.

    float64 is never touched by autocast.
    """
    device = x.device.type
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
