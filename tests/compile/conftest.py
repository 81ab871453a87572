"""Tests of compiled kernels. Without nvcc those of CUDA kernels are left out, and the summary says so."""

from __future__ import annotations

from pathlib import Path

import pytest

import build_cuda


def _why_no_nvcc() -> str | None:
    try:
        build_cuda.find_nvcc()
    except build_cuda.Unusable as error:
        return str(error)
    return None


CUDA_TESTS = "test_cuda_resources.py"
WHY_NO_NVCC = _why_no_nvcc()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if collection_path.name == CUDA_TESTS and WHY_NO_NVCC is not None else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if WHY_NO_NVCC is not None:
        terminalreporter.write_line(f"tnt_kernels: tests/compile/{CUDA_TESTS}: NOT RUN, {WHY_NO_NVCC}")
