"""The CUDA kernels of csrc/cuda on a CPU: threads are fibers, mma.sync is emulated (tests/cuda)."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from ctypes import c_bool, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from oracle import randn
from torch import Tensor

from tnt_kernels.backends import reference

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*(ROOT / "csrc/cuda").glob("pixel_embed*.cu"), ROOT / "tests/cuda/emulated.cpp"]
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}


class PixelEmbed(ctypes.Structure):  # csrc/cuda/pixel_embed.h
    _fields_ = (
        ("image", c_void_p), ("image_type", c_int), ("image_strides", c_int64 * 4),
        ("batch", c_int64), ("channels", c_int64), ("height", c_int64), ("width", c_int64),
        ("weight", c_void_p), ("weight_type", c_int), ("bias", c_void_p), ("bias_type", c_int),
        ("position", c_void_p), ("position_type", c_int), ("out", c_void_p), ("out_type", c_int),
        ("compute_type", c_int), ("allow_tf32", c_bool), ("c", c_int64), ("kernel", c_int),
        ("patch_h", c_int), ("patch_w", c_int), ("stride", c_int), ("legacy", c_bool),
        ("scale", c_float * 8), ("shift", c_float * 8),
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
    if os.environ.get("TNT_SANITIZE"):  # threads are fibers, which AddressSanitizer does not know
        flags += ["-fsanitize=undefined", "-fno-sanitize-recover=undefined"]
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
    arguments: Sequence[Tensor | None],
    out: Tensor,
    compute: torch.dtype,
    scale: Sequence[float] = (1,) * 8,
    shift: Sequence[float] = (0,) * 8,
    allow_tf32: bool = False,
) -> PixelEmbed:
    image, weight, bias, position = arguments
    assert image is not None

    def pair(tensor: Tensor | None) -> tuple[int | None, int]:
        return pointer(tensor), 0 if tensor is None else TYPES[tensor.dtype]

    return PixelEmbed(
        *pair(image), (c_int64 * 4)(*image.stride()), *image.shape, *pair(weight), *pair(bias),
        *pair(position), *pair(out), TYPES[compute], allow_tf32, case.c, case.kernel, *case.options(),
        (c_float * 8)(*scale), (c_float * 8)(*shift),
    )  # fmt: skip


def guarded(size: int) -> Tensor:
    """Bytes, aligned to 16, and 64 more that nothing may write."""
    return torch.full((size + 64,), 0xA5, dtype=torch.uint8)


def run(
    library: ctypes.CDLL,
    case: Case,
    arguments: Sequence[Tensor | None],
    compute: torch.dtype,
    **options: Any,
) -> Tensor:
    out_dtype = options.pop("out_dtype", compute)
    n = case.grid[0] * case.grid[1]
    out = torch.full((case.batch * n, case.words(), case.c), float("nan"), dtype=out_dtype)
    call = call_of(case, arguments, out, compute, **options)
    size = library.forward_workspace(ctypes.byref(call))
    workspace = guarded(size)
    assert library.forward(ctypes.byref(call), c_void_p(workspace.data_ptr())) == 0
    assert (workspace[size:] == 0xA5).all()
    return out


def exact(case: Case, arguments: Sequence[Tensor | None], compute: torch.dtype) -> Tensor:
    """In float64, of operands rounded as the products take them."""
    image, weight, bias, position = arguments
    assert image is not None
    assert weight is not None
    bias, position = (None if t is None else t.double() for t in (bias, position))
    operands = image.to(compute).double(), weight.to(compute).double()
    patch_h, patch_w, stride, legacy = case.options()
    return reference.pixel_embed(*operands, bias, position, patch_h, patch_w, stride, legacy)


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
    of_image, _, *of_words = torch.autograd.grad(out, (image, weight, bias, position), grad.double(), True)
    (of_weight,) = torch.autograd.grad(out, weight, grad.to(compute).double())  # the operand of a product
    return [of_image, of_weight, *of_words]


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


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda image: image.contiguous(memory_format=torch.channels_last),
    "turned": lambda image: image.mT.contiguous().mT,
    "misaligned": lambda image: torch.cat([image.new_zeros(1), image.flatten()])[1:].view(image.shape),
    "batch_expanded": lambda image: image[:1].expand(image.shape),
    "crop": lambda image: torch.nn.functional.pad(image, (8, 8, 1, 0))[..., 1:, 8:-8],
    "odd_crop": lambda image: torch.nn.functional.pad(image, (3, 2))[..., 3:-2],
    "every_second": lambda image: image.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("image_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [Case(), Case(legacy=True, c=12), Case(patch=(8, 12), c=5)])
def test_layouts(kernels: ctypes.CDLL, case: Case, layout: str, image_dtype: torch.dtype) -> None:
    compute = torch.bfloat16 if image_dtype == torch.bfloat16 else torch.float16
    arguments = case.arguments(image_dtype, torch.float32)
    arguments[0] = LAYOUTS[layout](arguments[0])
    got = run(kernels, case, arguments, compute, out_dtype=torch.float32)
    rounded = [arguments[0].to(compute), *arguments[1:]]
    assert_close(got, exact(case, rounded, compute), 1e-5)


@pytest.mark.parametrize("compute", DTYPES)
@pytest.mark.parametrize("case", [Case(legacy=True), Case(), Case(patch=(8, 8), stride=2, kernel=3)])
def test_uint8_with_mean_and_std(kernels: ctypes.CDLL, case: Case, compute: torch.dtype) -> None:
    arguments = case.arguments(torch.uint8, torch.float32)
    scale, shift = (0.017, 0.0175, 0.0174), (-2.1, -2.0, -1.8)
    got = run(kernels, case, arguments, compute, scale=scale, shift=shift, out_dtype=torch.float32)
    pixels = arguments[0] * torch.tensor(scale).view(3, 1, 1) + torch.tensor(shift).view(3, 1, 1)
    tolerance = 1e-5 if compute == torch.float32 else 4 * TOLERANCE[compute]  # one rounding may differ
    assert_close(got, exact(case, [pixels, *arguments[1:]], compute), tolerance)


@pytest.mark.parametrize("case", [FIELDS[0], OTHERS[0]])
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("parameters", DTYPES)
def test_mixed_dtypes(
    kernels: ctypes.CDLL, case: Case, out_dtype: torch.dtype, parameters: torch.dtype
) -> None:
    arguments = case.arguments(torch.float32, parameters)
    got = run(kernels, case, arguments, torch.bfloat16, out_dtype=out_dtype)
    assert_close(got, exact(case, arguments, torch.bfloat16), TOLERANCE[out_dtype])
    grad = randn(*got.shape, dtype=out_dtype)
    grads = run_backward(kernels, case, arguments, grad, torch.bfloat16, image_dtype=torch.float32)
    wanted = exact_backward(case, arguments, grad, torch.bfloat16)
    for g, w in zip(grads, wanted, strict=True):
        assert_close(g, w, 3e-2 if g is grads[0] else 1e-5)  # the image's takes the weight as it is


@pytest.mark.parametrize("case", [FIELDS[0], OTHERS[0]])
def test_without_bias_and_position(kernels: ctypes.CDLL, case: Case) -> None:
    image, weight, bias, position = case.arguments(torch.float32, torch.float32)
    for given in ([image, weight, None, None], [image, weight, bias, None], [image, weight, None, position]):
        assert_close(run(kernels, case, given, torch.float32), exact(case, given, torch.float32), 3e-6)


@pytest.mark.parametrize("case", [FIELDS[0], FIELDS[3], OTHERS[0]])
def test_tf32_where_allowed(kernels: ctypes.CDLL, case: Case) -> None:
    arguments = case.arguments(torch.float32, torch.float32)
    got = run(kernels, case, arguments, torch.float32, allow_tf32=True)
    assert_close(got, exact(case, arguments, torch.float32), 2**-9)


@pytest.mark.parametrize("compute", DTYPES)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("case", [FIELDS[0], FIELDS[3], OTHERS[0]])
def test_special_values_reach_what_sees_them(
    kernels: ctypes.CDLL, case: Case, value: float, compute: torch.dtype
) -> None:
    arguments = case.arguments(compute, compute)
    height, width = arguments[0].shape[-2:]
    for row, column in ((0, 0), (5, 4), (13, 8), (height - 1, width - 1)):
        arguments[0][0, 1, row, column] = value
    got, wanted = run(kernels, case, arguments, compute), exact(case, arguments, compute)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.isinf(), wanted.isinf())


@pytest.mark.parametrize("compute", DTYPES)
@pytest.mark.parametrize("case", [FIELDS[0], FIELDS[3], OTHERS[0]])
def test_no_race(kernels: ctypes.CDLL, case: Case, compute: torch.dtype) -> None:
    arguments = case.arguments(compute, compute)

    def everything() -> list[Tensor]:
        out = run(kernels, case, arguments, compute)
        return [out, *run_backward(kernels, case, arguments, out, compute)]

    forwards = everything()
    kernels.run_backwards(1)
    try:
        backwards = everything()
    finally:
        kernels.run_backwards(0)
    assert all(map(torch.equal, forwards, backwards))


def test_many_patches_in_each_slice(kernels: ctypes.CDLL) -> None:
    case = Case(batch=1, grid=(40, 54), c=12)  # 2160 patches, 528 slices: two rounds each
    arguments = case.arguments(torch.bfloat16, torch.bfloat16)
    grad = randn(40 * 54, case.words(), case.c, dtype=torch.bfloat16)
    got = run_backward(kernels, case, arguments, grad, torch.bfloat16)
    wanted = exact_backward(case, arguments, grad, torch.bfloat16)
    for g, w in zip(got[1:], wanted[1:], strict=True):
        assert_close(g, w, 1e-4)


def test_no_images(kernels: ctypes.CDLL) -> None:
    case = Case(batch=0)
    arguments = case.arguments(torch.float32, torch.float32)
    out = run(kernels, case, arguments, torch.float32)
    grads = run_backward(kernels, case, arguments, out, torch.float32)
    assert all((g == 0).all() for g in grads)


def test_gradients_that_nobody_asked_for(kernels: ctypes.CDLL) -> None:
    case = Case()
    arguments = case.arguments(torch.float32, torch.float32)
    grad = randn(8, 16, 24)
    everything = run_backward(kernels, case, arguments, grad, torch.float32)
    call = call_of(case, arguments, grad, torch.float32)
    for wanted in range(4):
        out = torch.full_like(everything[wanted], float("nan"))
        pointers = [out.data_ptr() if i == wanted else None for i in range(4)]
        gradients = Gradients(pointer(grad), 0, pointers[0], 0, *pointers[1:])
        size = kernels.backward_workspace(ctypes.byref(call), ctypes.byref(gradients))
        workspace = guarded(size)
        address = c_void_p(workspace.data_ptr())
        assert kernels.backward(ctypes.byref(call), ctypes.byref(gradients), address) == 0
        assert torch.equal(out, everything[wanted])
        assert (workspace[size:] == 0xA5).all()


BAD = [
    {"height": 33}, {"width": 31}, {"channels": 0}, {"c": 0}, {"kernel": 6}, {"kernel": 0}, {"stride": 0},
    {"patch_h": 0}, {"legacy": True, "stride": 3}, {"batch": -1}, {"batch": 2**30}, {"height": 2**40},
    {"channels": 2**40}, {"c": 2**40}, {"image_type": 4}, {"out_type": 3}, {"weight_type": -1},
    {"compute_type": 3}, {"image_type": 3, "channels": 9},
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_sizes_and_types_are_refused(kernels: ctypes.CDLL, bad: dict[str, int]) -> None:
    case = Case()
    arguments = case.arguments(torch.float32, torch.float32)
    out = torch.zeros(8, 16, 24)
    call = call_of(case, arguments, out, torch.float32)
    for name, value in bad.items():
        setattr(call, name, value)
    assert kernels.forward_workspace(ctypes.byref(call)) == 0
    assert kernels.forward(ctypes.byref(call), None) == 1  # cudaErrorInvalidValue
    gradients = Gradients(pointer(out), 0, None, 0, None, None, None)
    assert kernels.backward(ctypes.byref(call), ctypes.byref(gradients), None) == 1
