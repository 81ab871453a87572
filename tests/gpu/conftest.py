"""Tests that need a GPU: collected where torch sees one.

Kernels are compiled one after the other in a process: `--shard 1/8` and so on share the tests among eight.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="I/N", help="every N-th test, from the I-th on")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shard = config.getoption("--shard")
    if shard:
        first, every = map(int, shard.split("/"))
        kept = items[first - 1 :: every]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.fixture(autouse=True)
def _exact_eager() -> Iterator[None]:
    """Eager convolutions in float32, not TF32; and memory given back, for some tests need most of it."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
    torch.cuda.empty_cache()
