"""The CUDA kernels of csrc/cuda on a CPU: every thread a fiber, mma.sync emulated lane by lane (tests/cuda)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from ctypes import c_bool, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from oracle import randn
from torch import Tensor

from tnt_kernels.backends import reference

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*(ROOT / "csrc/cuda").glob("*.cu"), ROOT / "tests/cuda/emulated.cpp"]
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}


class PixelEmbed(ctypes.Structure):  # csrc/cuda/pixel_embed.h
    _fields_ = (
        ("image", c_void_p), ("image_type", c_int), ("image_strides", c_int64 * 4),
        ("batch", c_int64), ("channels", c_int64), ("height", c_int64), ("width", c_int64),
        ("weight", c_void_p), ("weight_type", c_int), ("bias", c_void_p), ("bias_type", c_int),
        ("position", c_void_p), ("position_type", c_int), ("scale", c_void_p), ("shift", c_void_p),
        ("out", c_void_p), ("out_type", c_int), ("compute_type", c_int), ("allow_tf32", c_bool),
        ("c", c_int64), ("kernel", c_int), ("patch_h", c_int), ("patch_w", c_int), ("stride", c_int),
        ("legacy", c_bool),
    )  # fmt: skip


class Gradients(ctypes.Structure):
    _fields_ = (
        ("grad", c_void_p), ("grad_type", c_int), ("image", c_void_p), ("image_type", c_int),
        ("weight", c_void_p), ("bias", c_void_p), ("position", c_void_p),
    )  # fmt: skip


class Case(NamedTuple):
    batch: int = 2
    channels: int = 3
    grid: tuple[int, int] = (2, 2)
    patch: tuple[int, int] = (16, 16)
    stride: int = 4
    c: int = 24
    kernel: int = 7
    legacy: bool = False

    def words(self) -> int:
        return -(-self.patch[0] // self.stride) * -(-self.patch[1] // self.stride)

    def options(self) -> tuple[int, int, int, bool]:
        return *self.patch, self.stride, self.legacy

    def arguments(self, image: torch.dtype, parameters: torch.dtype) -> list[Tensor]:
        shape = self.batch, self.channels, self.grid[0] * self.patch[0], self.grid[1] * self.patch[1]
        taps = self.channels * self.kernel**2
        if image == torch.uint8:
            pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
        else:
            pixels = randn(*shape, dtype=image)
        weight = randn(self.c, self.channels, self.kernel, self.kernel, dtype=parameters, scale=taps**-0.5)
        position = randn(1, self.words(), self.c, dtype=parameters)
        return [pixels, weight, randn(self.c, dtype=parameters), position]


@pytest.fixture(scope="module", params=["", "-DTNT_EMULATE_OLD"], ids=["sm_80", "sm_75"])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    library = tmp_path_factory.mktemp("cuda") / "emulated.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    includes = [f"-I{ROOT / 'tests/cuda'}", f"-I{ROOT / 'csrc/cuda'}"]
    defines = [request.param] if request.param else []
    sources = ["-x", "c++", *map(str, SOURCES)]
    subprocess.run([compiler, *flags, *includes, *defines, *sources, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    for name in ("forward_workspace", "backward_workspace"):
        getattr(loaded, name).restype = c_int64
    return loaded


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def call_of(
    case: Case,
    arguments: list[Tensor | None],
    out: Tensor,
    compute: torch.dtype,
    normal: tuple[Tensor, Tensor] | None = None,
    allow_tf32: bool = False,
) -> PixelEmbed:
    image, weight, bias, position = arguments
    scale, shift = normal or (None, None)

    def pair(tensor: Tensor | None) -> tuple[int | None, int]:
        return pointer(tensor), 0 if tensor is None else TYPES[tensor.dtype]

    return PixelEmbed(
        *pair(image), (c_int64 * 4)(*image.stride()), *image.shape, *pair(weight), *pair(bias),
        *pair(position), pointer(scale), pointer(shift), *pair(out), TYPES[compute], allow_tf32, case.c,
        case.kernel, *case.options(),
    )  # fmt: skip


def guarded(size: int) -> Tensor:
    """Bytes, aligned to 16, and 64 more that nothing may write."""
    return torch.full((size + 64,), 0xA5, dtype=torch.uint8)


def run(library: ctypes.CDLL, case: Case, arguments: list[Tensor | None], compute: torch.dtype, **options: Any):
    out_dtype = options.pop("out_dtype", compute)
    n = case.grid[0] * case.grid[1]
    out = torch.full((case.batch * n, case.words(), case.c), float("nan"), dtype=out_dtype)
    call = call_of(case, arguments, out, compute, **options)
    size = library.forward_workspace(ctypes.byref(call))
    workspace = guarded(size)
    assert library.forward(ctypes.byref(call), c_void_p(workspace.data_ptr())) == 0
    assert (workspace[size:] == 0xA5).all()
    return out


def exact(case: Case, arguments: list[Tensor | None], compute: torch.dtype) -> Tensor:
    """In float64, of operands rounded as the products take them."""
    image, weight, bias, position = arguments
    wide = [None if t is None else t.double() for t in (image.to(compute), weight.to(compute), bias, position)]
    return reference.pixel_embed(*wide, *case.options())


TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def assert_close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    scale = wanted.abs().clamp(min=1.0)
    error = ((got.double() - wanted).abs() / scale).max().item()
    assert error <= tolerance, f"relative error {error:.3g}"


FIELDS = [Case(), Case(c=12), Case(c=40, grid=(1, 3), batch=1), Case(c=48, legacy=True)]
OTHERS = [
    Case(c=5),
    Case(c=50, grid=(1, 1), batch=1),
    Case(channels=1, patch=(8, 8), stride=2, kernel=3, c=16),
    Case(channels=4, patch=(6, 10), stride=4, kernel=5, c=7),
    Case(patch=(9, 9), stride=3, grid=(2, 1), c=9, legacy=True),
    Case(patch=(14, 14), stride=7, grid=(1, 2), c=24),
    Case(channels=2, patch=(1, 1), stride=1, kernel=1, c=3),
    Case(patch=(4, 4), stride=1, kernel=9, grid=(2, 3), c=3, legacy=True, batch=1),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("compute", DTYPES)
@pytest.mark.parametrize("case", FIELDS + OTHERS)
def test_forward(kernels: ctypes.CDLL, case: Case, compute: torch.dtype) -> None:
    arguments = case.arguments(compute, compute)
    got = run(kernels, case, arguments, compute)
    assert_close(got, exact(case, arguments, compute), TOLERANCE[compute])


def run_backward(
    library: ctypes.CDLL,
    case: Case,
    arguments: list[Tensor],
    grad: Tensor,
    compute: torch.dtype,
    image_dtype: torch.dtype | None = None,
    **options: Any,
) -> list[Tensor]:
    """Gradients of the image, weight, bias and position."""
    image, *parameters = arguments
    grads = [torch.full(t.shape, float("nan"), dtype=torch.float32) for t in parameters]
    grads.insert(0, torch.full(image.shape, float("nan"), dtype=image_dtype or image.dtype))
    call = call_of(case, arguments, grad, compute, **options)
    gradients = Gradients(
        pointer(grad), TYPES[grad.dtype], pointer(grads[0]), TYPES[grads[0].dtype], *map(pointer, grads[1:])
    )
    size = library.backward_workspace(ctypes.byref(call), ctypes.byref(gradients))
    workspace = guarded(size)
    pointers = ctypes.byref(call), ctypes.byref(gradients), c_void_p(workspace.data_ptr())
    assert library.backward(*pointers) == 0
    assert (workspace[size:] == 0xA5).all()
    return grads


def exact_backward(case: Case, arguments: list[Tensor], grad: Tensor, compute: torch.dtype) -> list[Tensor]:
    image, weight, bias, position = (
        t.detach().to(dtype).double().requires_grad_()
        for t, dtype in zip(arguments, (compute, compute, torch.float64, torch.float64), strict=True)
    )
    out = reference.pixel_embed(image, weight, bias, position, *case.options())
    return list(torch.autograd.grad(out, (image, weight, bias, position), grad.double()))


@pytest.mark.parametrize("compute", DTYPES)
@pytest.mark.parametrize("case", FIELDS + OTHERS)
def test_backward(kernels: ctypes.CDLL, case: Case, compute: torch.dtype) -> None:
    arguments = case.arguments(compute, compute)
    n = case.grid[0] * case.grid[1]
    grad = randn(case.batch * n, case.words(), case.c, dtype=compute)
    got = run_backward(kernels, case, arguments, grad, compute)
    wanted = exact_backward(case, arguments, grad, compute)
    tolerances = (TOLERANCE[compute], 1e-5, 1e-5, 1e-5)  # gradients of parameters stay float32
    for g, w, tolerance in zip(got, wanted, tolerances, strict=True):
        assert_close(g, w, tolerance)
