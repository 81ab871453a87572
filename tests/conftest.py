"""What every test gets: fixed seeds, torch.empty filled with NaN, and global settings put back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

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


USABLE_TIERS = [name for name, why in _tiers() if not why]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="fail the run if a test was skipped")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = len(reporter.stats.get("skipped", [])) if reporter is not None else 0
    if skipped and session.config.getoption("--no-skips") and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter.write_line(f"\n--no-skips: {skipped} tests did not run", red=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
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
