"""Autocast by name."""

from __future__ import annotations

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = ("none", *DTYPES)


def autocast(device: torch.device, name: str) -> torch.autocast:
    """Context in which operations run in the precision named; in the tensors' own for "none"."""
    return torch.autocast(device.type, DTYPES.get(name), enabled=name in DTYPES)
