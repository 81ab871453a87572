"""Tests that need a GPU: collected where torch sees one.

Kernels are compiled one after the other in a process: `--shard 1/8` and so on share the tests among eight.
Without CUDA kernels in the native module the tests of those are left out, and the summary says so.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tnt_kernels import native

_left_out: list[pytest.Item] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="I/N", help="every N-th test, from the I-th on")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if native.cuda() is None:
        _left_out[:] = [item for item in items if _backend(item) == "cuda"]
        config.hook.pytest_deselected(items=_left_out)
        items[:] = [item for item in items if item not in _left_out]
    shard = config.getoption("--shard")
    if shard:
        first, every = map(int, shard.split("/"))
        kept = items[first - 1 :: every]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def _backend(item: pytest.Item) -> str | None:
    """The backend that a test is to run on, where it is one of its parameters."""
    return item.callspec.params.get("backend") if hasattr(item, "callspec") else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _left_out:
        why = native.why_no_cuda()
        terminalreporter.write_line(
            f"tnt_kernels: {len(_left_out)} tests of the cuda backend: NOT RUN, {why}"
        )


@pytest.fixture(autouse=True)
def _exact_eager() -> Iterator[None]:
    """Eager convolutions in float32, not TF32; and memory given back, for some tests need most of it."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
    torch.cuda.empty_cache()
