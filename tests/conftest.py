"""What every test gets: fixed seeds, torch.empty filled with NaN, and global settings put back.

Tests that need another process or machine are left out where they cannot run, and the summary says so: they
do not count as skipped.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import build_cuda
from tnt_kernels import native
from tnt_kernels.models import fused

# Kernels are fast but the first call of a size is not; timing is the benchmarks' business.
settings.register_profile(
    "tnt_kernels", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("tnt_kernels")


def _tiers() -> list[tuple[str, str]]:
    module = native.load()
    return module.tiers() if module is not None else []


def _why_no_nvcc() -> str | None:
    try:
        build_cuda.find_nvcc()
    except build_cuda.Unusable as error:
        return str(error)
    return None


USABLE_TIERS = [name for name, why in _tiers() if not why]

TESTS = Path(__file__).resolve().parent
NEED_NVCC = (TESTS / "test_nvcc.py", TESTS / "compile/test_cuda_resources.py")
WHY_NO_NVCC = _why_no_nvcc()
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
_left_out: dict[str, str] = {}  # what was met and not collected, and why


def _why_left_out(path: Path) -> str | None:
    """Why a file or folder of tests cannot run in this process, or None."""
    if path in NEED_NVCC and WHY_NO_NVCC is not None and not INTERPRETING:
        return WHY_NO_NVCC
    if path.parent != TESTS:
        return None
    if path.name == "interpreter":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        return None if INTERPRETING else "run them with TRITON_INTERPRET=1 pytest tests/interpreter"
    if path.is_dir() and not any(path.glob("test_*.py")):
        return None  # what tests need, and none of them
    if INTERPRETING:
        return "every kernel is interpreted, under TRITON_INTERPRET=1"
    if path.name == "compile" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if path.name == "gpu" and not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    why = _why_left_out(collection_path)
    if why is None:
        return None
    every_file = INTERPRETING and collection_path.is_file()
    _left_out["*.py" if every_file else str(collection_path.relative_to(TESTS))] = why
    return True


def pytest_deselected(items: list[pytest.Item]) -> None:
    left = sum(item.get_closest_marker("network") is not None for item in items)
    if left:
        _left_out[f"*.py, {left} that download"] = "run them with -m network"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="fail the run if a test was skipped")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = len(reporter.stats.get("skipped", [])) if reporter is not None else 0
    if skipped and session.config.getoption("--no-skips") and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter.write_line(f"\n--no-skips: {skipped} tests did not run", red=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, why in _left_out.items():
        terminalreporter.write_line(f"tnt_kernels: tests/{name}: NOT RUN, {why}")
    missing = native.why_missing()
    if missing is not None:
        terminalreporter.write_line(f"tnt_kernels: CPU kernels not tested: {missing}")
    for name, why in _tiers():
        terminalreporter.write_line(
            f"tnt_kernels: SIMD tier {name}: " + (f"NOT RUN, {why}" if why else "run")
        )


@pytest.fixture(autouse=True)
def _fixed_surroundings() -> Iterator[None]:
    """Seeds and settings. Uninitialised memory is NaN, so that an element never written shows."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


@pytest.fixture(params=USABLE_TIERS or ["missing"])
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each SIMD tier that this machine can run."""
    module = native.load()
    if module is None:
        pytest.skip("the native module is missing")
    module.set_tier(request.param)
    yield request.param
    module.set_tier("auto")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a model called each fused operation."""
    calls: dict[str, int] = {}

    def count(owner: Any, name: str) -> None:
        own = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return own(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    for name in ("pixel_embed", "inner_block", "word_to_sentence"):
        count(fused.ops, name)
    count(fused.outer, "outer_block")
    count(fused, "class_token_block")
    return calls


@pytest.fixture
def needs_native() -> None:
    if native.load() is None:
        pytest.skip("the native module is missing")
