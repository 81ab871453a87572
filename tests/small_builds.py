"""Builds of the project's setup.py in folders of their own, with sources that compile in a moment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD_VARIABLES = (
    "CUDA_HOME",
    "CUDA_PATH",
    "CXX",
    "CXXFLAGS",
    "LDFLAGS",
    "MAX_JOBS",
    "NVCC_APPEND_FLAGS",
    "NVCC_CCBIN",
    "NVCC_PREPEND_FLAGS",
    "PYTHONPATH",
    "TNT_BUILD_AMX_EMULATION",
    "TNT_BUILD_CPU",
    "TNT_BUILD_CUDA",
    "TNT_CUDA_ARCHS",
    "TNT_SANITIZE",
)

BINDINGS = """
#include <pybind11/pybind11.h>
#include <stdexcept>
int run(int n);
#if TNT_HAVE_CUDA
void bind_cuda(pybind11::module_& m);
#else
void bind_cuda(pybind11::module_&) {}
#endif
PYBIND11_MODULE(_native, m) {
  m.def("run", &run);
  bind_cuda(m);
}
"""
DISPATCH = """
#include <stdexcept>
#if defined(__AVX2__)
#error the dispatcher has -m flags
#endif
namespace portable { int run(int n); }
int run(int n) {
  if (n < 0) throw std::invalid_argument("n is negative");
  return portable::run(n);
}
"""
KERNELS = """
#include "increment.h"
namespace TNT_TIER { int run(int n) { return n + INCREMENT; } }
"""


def environment(**changes: str) -> dict[str, str]:
    """This process's variables without those that steer a build, and without nvcc on PATH."""
    kept = {k: v for k, v in os.environ.items() if k not in BUILD_VARIABLES}
    folders = kept.get("PATH", os.defpath).split(os.pathsep)
    kept["PATH"] = os.pathsep.join(folder for folder in folders if not Path(folder, "nvcc").exists())
    return {**kept, **changes}


def nvcc_variables() -> dict[str, str]:
    """What `environment` leaves out and a build needs to find the nvcc of this process."""
    return {name: os.environ[name] for name in ("PATH", "CUDA_HOME", "CUDA_PATH") if name in os.environ}


def run(*command: str | Path, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment(**changes), capture_output=True, text=True
    )


def output(*command: str | Path, cwd: Path = ROOT, **changes: str) -> str:
    result = run(*command, cwd=cwd, **changes)
    assert result.returncode == 0, f"{command}:\n{result.stdout}\n{result.stderr}"
    return result.stdout


def build(tree: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, **changes)


def compiled(result: subprocess.CompletedProcess[str]) -> set[str]:
    assert result.returncode == 0, result.stdout + result.stderr
    return set(re.findall(r"\] compile (\w+)\.o", result.stdout))


def modules(tree: Path) -> list[Path]:
    return sorted((tree / "tnt_kernels").glob("_native*.so"))


BUILD_FILES = (
    "setup.py", "build_cuda.py", "pyproject.toml", "README.md", "LICENSE", "tnt_kernels/_version.py",
)  # fmt: skip


def make_small_tree(tree: Path) -> Path:
    """Makes a folder with the project's setup.py and sources that compile in a moment."""
    (tree / "csrc/cpu").mkdir(parents=True)
    (tree / "tnt_kernels").mkdir()
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, tree / name)
    (tree / "tnt_kernels/__init__.py").touch()
    (tree / "csrc/bindings.cpp").write_text(BINDINGS)
    (tree / "csrc/cpu/dispatch.cpp").write_text(DISPATCH)
    (tree / "csrc/cpu/kernels.cpp").write_text(KERNELS)
    (tree / "csrc/cpu/gradients.cpp").write_text("// compiled once per tier, like kernels.cpp\n")
    (tree / "csrc/cpu/increment.h").write_text("#define INCREMENT 1\n")
    return tree
