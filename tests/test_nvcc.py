"""The CUDA kernels as nvcc builds them: what the module says of itself, refused arguments, no driver."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_builds import build, compiled, make_small_tree, nvcc_variables, output

import tnt_kernels
from tnt_kernels import native

NO_GPU = ("cudaErrorInsufficientDriver", "cudaErrorNoDevice")
KERNEL = """
#include "answer.h"
#include <cuda_runtime.h>
__global__ void nothing() {}
int cuda_answer() {
  nothing<<<1, 1>>>();
  return cudaGetLastError() == cudaSuccess ? -1 : ANSWER;
}
"""
CUDA_BINDINGS = """
#include <pybind11/pybind11.h>
int cuda_answer();
void bind_cuda(pybind11::module_& m) { m.def("cuda_answer", &cuda_answer); }
"""


@pytest.fixture
def cuda() -> Any:
    module = native.cuda()
    assert module is not None, "nvcc is here, and the native module has no CUDA kernels"
    return module


def without_gpu(script: str) -> str:
    """What a script prints in a process that sees no GPU."""
    variables = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(Path(tnt_kernels.__file__).parents[1]),
    }
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_build_and_rebuild(tmp_path: Path) -> None:
    tree = make_small_tree(tmp_path / "a tree")
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/answer.h").write_text("#define ANSWER 42\n")
    (tree / "csrc/cuda/pixel_embed.cu").write_text(KERNEL)
    (tree / "csrc/cuda_bindings.cpp").write_text(CUDA_BINDINGS)
    variables = {**nvcc_variables(), "TNT_BUILD_CUDA": "1", "CUDA_VISIBLE_DEVICES": ""}
    strict = {"NVCC_APPEND_FLAGS": "-Werror all-warnings"}
    assert "pixel_embed_cuda" in compiled(build(tree, **variables, **strict))
    script = "import tnt_kernels._native as n; print(n.cuda_answer())"
    assert output(sys.executable, "-c", script, cwd=tree, CUDA_VISIBLE_DEVICES="") == "42\n"
    assert compiled(build(tree, **variables, **strict)) == set()

    (tree / "csrc/cuda/answer.h").write_text("#define ANSWER 7\n")
    assert compiled(build(tree, **variables, **strict)) == {"pixel_embed_cuda"}
    assert output(sys.executable, "-c", script, cwd=tree, CUDA_VISIBLE_DEVICES="") == "7\n"


def test_what_the_module_says_of_itself(cuda: Any) -> None:
    assert cuda.architectures == sorted(cuda.architectures)
    assert native.cuda_targets().startswith(f"sm_{cuda.architectures[0]}")
    shown = without_gpu("from tnt_kernels.__main__ import main; main(['info'])")
    assert f"{cuda.version}, kernels for {native.cuda_targets()}" in shown


def test_without_a_driver(cuda: Any) -> None:
    script = """
import contextlib
import torch
from tnt_kernels import native
from tnt_kernels.backends import cuda
try:
    native.cuda().probe()
except RuntimeError as error:
    print(error)
cuda._runs = lambda *_: True
cuda._stream_of = lambda _: contextlib.nullcontext(0)
image, weight = torch.randn(1, 3, 32, 32), torch.randn(24, 3, 7, 7)
options = (image, weight, None, None, 16, 16, 4, False, None)
for name, call in (
    ("pixel_embed", lambda: cuda.pixel_embed(*options)),
    ("pixel_embed_backward", lambda: cuda.pixel_embed_backward(
        torch.randn(4, 16, 24), [True, True, False, False], *options)),
):
    try:
        call()
    except RuntimeError as error:
        print(error)
"""
    probe, forward, backward = without_gpu(script).splitlines()
    assert probe in NO_GPU
    place = "the CUDA kernel failed on cpu with image [1, 3, 32, 32] float32:"
    for line, name in ((forward, "pixel_embed"), (backward, "pixel_embed_backward")):
        assert line.startswith(f"{name}: {place} ")
        assert line.split()[-1] in NO_GPU


GOOD: dict[str, Any] = {
    "image": 16, "image_dtype": 0, "strides": [3072, 1024, 32, 1], "batch": 1, "channels": 3,
    "height": 32, "width": 32, "params": [16, 0, 0], "param_dtypes": [0, 0, 0], "out": 16, "out_dtype": 0,
    "compute_dtype": 0, "allow_tf32": False, "c": 24, "kernel": 7, "patch_h": 16, "patch_w": 16,
    "stride": 4, "legacy": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strides": [1, 1, 1]}, "four strides"),
        ({"params": [16, 0]}, "weight, bias and position"),
        ({"batch": -1}, "batch >= 0"),
        ({"channels": 0}, "channels"),
        ({"kernel": 4}, "kernel must be odd"),
        ({"stride": 0}, "stride and patch"),
        ({"height": 33}, "patch must divide"),
        ({"stride": 5, "legacy": True}, "legacy needs stride"),
        ({"params": [0, 0, 0]}, "weight is needed"),
        ({"image": 0}, "image must not be null"),
        ({"image_dtype": 4}, "dtype code"),
        ({"image_dtype": 3, "scale": [1.0] * 2, "shift": [0.0] * 3}, "scale and shift of every channel"),
        ({"image_dtype": 3, "channels": 9}, "too many channels"),
        ({"batch": 1 << 40}, "more patches, words or taps"),
        ({"patch_h": 1 << 32, "height": 1 << 32}, "patch must fit 32 bits"),
    ],
)
def test_arguments_are_checked_again(cuda: Any, changes: dict[str, Any], message: str) -> None:
    cuda.PixelEmbed(**GOOD)
    with pytest.raises(ValueError, match=message):
        cuda.PixelEmbed(**(GOOD | changes))


def test_null_results_are_refused(cuda: Any) -> None:
    with pytest.raises(ValueError, match="out must not be null"):
        cuda.PixelEmbed(**(GOOD | {"out": 0})).run(0, 0)
    gradients = cuda.PixelEmbedGradients(0, 0, 16, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="grad must not be null"):
        cuda.PixelEmbed(**GOOD).run_backward(gradients, 0, 0)
