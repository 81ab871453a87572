"""Tests that need a GPU: collected where torch sees one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _exact_eager() -> Iterator[None]:
    """Eager convolutions in float32, not TF32; and memory given back, for some tests need most of it."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
    torch.cuda.empty_cache()
