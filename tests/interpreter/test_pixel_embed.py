"""The pixel embedding's Triton kernels in the interpreter: patches, strides, layouts and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradients import assert_gradients_as_accurate, eager_and_exact_gradients, tensors_of
from oracle import assert_as_accurate, eager_and_exact, operator_arguments, randn
from torch import Tensor

from tnt_kernels.backends.triton.pixel_embed import pixel_embed
from tnt_kernels.backends.triton.pixel_embed_backward import pixel_embed_backward

OP = "pixel_embed"
# Patches, patch, stride, kernel, channels of the image and of a word.
SHAPES = [
    ((2, 3), (16, 16), 4, 7, 3, 24),
    ((1, 1), (16, 16), 4, 7, 3, 40),
    ((3, 1), (14, 10), 4, 7, 3, 13),
    ((2, 2), (4, 4), 4, 3, 5, 12),
    ((1, 2), (5, 3), 1, 5, 2, 48),
    ((2, 2), (3, 3), 5, 7, 1, 17),
    ((1, 3), (8, 8), 4, 1, 19, 70),
    ((2, 1), (6, 9), 3, 9, 3, 10),
    ((2, 2), (6, 4), 2, 3, 3, 8),
]
IDS = ["-".join(str(part).replace(", ", "x") for part in shape) for shape in SHAPES]


def values(
    grid: tuple[int, int] = (2, 3),
    patch: tuple[int, int] = (16, 16),
    stride: int = 4,
    kernel: int = 7,
    channels: int = 3,
    c: int = 24,
    batch: int = 3,
    dtype: torch.dtype = torch.float32,
    legacy: bool = False,
) -> dict[str, Any]:
    m = -(-patch[0] // stride) * -(-patch[1] // stride)
    return {
        "image": randn(batch, channels, grid[0] * patch[0], grid[1] * patch[1], dtype=dtype, mean=0.5),
        "weight": randn(c, channels, kernel, kernel, dtype=dtype, scale=(channels * kernel**2) ** -0.5),
        "bias": randn(c, dtype=dtype),
        "position": randn(1, m, c, dtype=dtype),
        "patch_size": patch,
        "stride": stride,
        "legacy": legacy,
    }


def run(given: dict[str, Any], compute_dtype: torch.dtype | None = None) -> Tensor:
    return pixel_embed(*operator_arguments(OP, given, compute_dtype))


def gradients(given: dict[str, Any], grad: Tensor, *wanted: str) -> dict[str, Tensor]:
    names = tensors_of(given)
    needed = [name in (wanted or names) for name in ("image", "weight", "bias", "position")]
    found = pixel_embed_backward(grad, needed, *operator_arguments(OP, given))
    return dict(zip([name for name in names if not wanted or name in wanted], found, strict=True))


def check(given: dict[str, Any]) -> None:
    """Asserts that the result and all gradients are as accurate as eager's."""
    eager, exact = eager_and_exact(OP, given)
    out = run(given)
    assert out.shape == eager.shape
    assert out.dtype == eager.dtype
    assert_as_accurate(out, eager, exact)
    grad = torch.randn_like(eager)
    assert_gradients_as_accurate(gradients(given, grad), *eager_and_exact_gradients(OP, given, grad))


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_shapes(shape: tuple[Any, ...]) -> None:
    check(values(*shape))


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if not any(p % shape[2] for p in shape[1])])
def test_legacy(shape: tuple[Any, ...]) -> None:
    check(values(*shape, legacy=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_more_tiles_than_programs(dtype: torch.dtype) -> None:
    check(values(batch=70, grid=(2, 2), patch=(8, 8), c=16, dtype=dtype))


@pytest.mark.parametrize("layout", ["channels_last", "strided", "flipped", "expanded", "transposed"])
def test_layouts(layout: str) -> None:
    given = values(grid=(2, 2))
    image = given["image"]
    given["image"] = {
        "channels_last": lambda: image.to(memory_format=torch.channels_last),
        "strided": lambda: randn(6, 3, 64, 96)[::2, :, ::2, 1::3],
        "flipped": lambda: image.transpose(0, 1).contiguous().transpose(0, 1),
        "expanded": lambda: image[:1, :1].expand(3, 3, 32, 32),
        "transposed": lambda: image.transpose(2, 3),
    }[layout]()
    given["weight"] = given["weight"].to(memory_format=torch.channels_last)
    given["bias"] = randn(48)[::2]
    check(given)


def test_parameters_of_other_dtypes_and_autocast() -> None:
    given = values()
    low = {name: given[name].half() for name in ("image", "weight", "bias")}
    out = run({**given, **low})
    assert out.dtype == torch.float32  # widened by the position
    eager, exact = eager_and_exact(OP, {**given, **low})
    assert_as_accurate(out, eager, exact)
    assert run(given, torch.float16).dtype == torch.float32
    torch.testing.assert_close(run(given, torch.float16), run(given), rtol=1e-2, atol=1e-2)
    assert run({**given, "position": None}, torch.float16).dtype == torch.float16


@pytest.mark.parametrize("absent", ["bias", "position"])
def test_without(absent: str) -> None:
    check({**values(), absent: None})


@pytest.mark.parametrize("name", ["image", "weight", "bias", "position"])
def test_gradients_one_at_a_time_are_those_of_all(name: str) -> None:
    given = values()
    grad = torch.randn_like(run(given))
    assert torch.equal(gradients(given, grad, name)[name], gradients(given, grad)[name])


def test_no_image() -> None:
    given = values(batch=0)
    assert run(given).shape == (0, 16, 24)
    for name, gradient in gradients(given, torch.empty(0, 16, 24)).items():
        assert gradient.shape == given[name].shape
        assert not gradient.any()


def test_nan_stays_in_its_patch() -> None:
    given = values(batch=1, grid=(1, 2))
    given["image"][0, 1, 5, 3] = torch.nan
    out = run(given)
    assert out[0].isnan().any()
    assert not out[1].isnan().any()


def test_float64_is_left_to_pytorch() -> None:
    given = {name: v.double() if isinstance(v, Tensor) else v for name, v in values().items()}
    eager, _ = eager_and_exact(OP, given)
    torch.testing.assert_close(run(given), eager, rtol=1e-12, atol=1e-12)
