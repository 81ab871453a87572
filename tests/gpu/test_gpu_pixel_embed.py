"""The pixel embedding on the GPU: images however they lie in memory, in the forward and the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_cases import (
    DEVICE,
    Given,
    backends,
    eager_and_exact,
    exactly,
    make,
    our_gradients,
    ours,
    plain_gradients,
    public,
    upstream,
)
from gradients import assert_gradients_as_accurate, tensors_of
from oracle import assert_as_accurate
from torch import Tensor

from tnt_kernels.backends import reference
from tnt_kernels.dispatch import can_run, choose, use_backend

OP = "pixel_embed"
BACKENDS = backends(OP)
CASES = [
    ("pixel_embed c=24", torch.float32),
    ("pixel_embed c=24", torch.bfloat16),
    ("pixel_embed patch=14 stride=7", torch.float32),
    ("pixel_embed legacy", torch.bfloat16),
]


def misaligned(tensor: Tensor) -> Tensor:
    """The same values one element behind an aligned address."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def spread(image: Tensor) -> Tensor:
    """The same values with gaps between rows and columns."""
    batch, channels, height, width = image.shape
    wide = image.new_full((batch, channels, 2 * height, 3 * width), torch.nan)
    wide[..., ::2, 1::3] = image
    return wide[..., ::2, 1::3]


def wider(image: Tensor) -> Tensor:
    """The same values in a larger image: rows that start at no multiple of 16 bytes."""
    wide = image.new_zeros((*image.shape[:-1], image.shape[-1] + 5))
    wide[..., 3:-2] = image
    return wide[..., 3:-2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda image: image.to(memory_format=torch.channels_last),
    "transposed": lambda image: image.transpose(2, 3).contiguous().transpose(2, 3),
    "channels first": lambda image: image.transpose(0, 1).contiguous().transpose(0, 1),
    "spread": spread,
    "wider": wider,
    "misaligned": misaligned,
}


def gradients_in_place(given: Given, grad: Tensor, backend: str) -> dict[str, Tensor]:
    """Gradients of tensors where they lie: tests/gradients.py copies those with gaps."""
    names = tensors_of(given)
    values = {**given, **{name: given[name].detach().requires_grad_() for name in names}}
    with use_backend(backend):
        out = public(OP)(**values)
        found = torch.autograd.grad(out, [values[name] for name in names], grad)
    return dict(zip(names, found, strict=True))


def assert_accurate(given: Given, grad: Tensor, backend: str) -> None:
    eager, exact = eager_and_exact(OP, given)
    assert_as_accurate(ours(OP, given, backend=backend), eager, exact)
    assert_gradients_as_accurate(
        gradients_in_place(given, grad, backend),
        plain_gradients(OP, given, grad),
        plain_gradients(OP, exactly(given), grad.double()),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("case", "dtype"), CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend: str, case: str, dtype: torch.dtype, layout: str) -> None:
    _, given = make(case, dtype)
    grad, image = upstream(OP, given), LAYOUTS[layout](given["image"])
    assert torch.equal(image, given["image"])
    assert_accurate({**given, "image": image}, grad, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_image_for_the_whole_batch(backend: str) -> None:
    _, given = make("pixel_embed c=24")
    given["image"] = given["image"][:1, :1].expand(5, 3, -1, -1)
    assert given["image"].stride()[:2] == (0, 0)
    assert_accurate(given, upstream(OP, given), backend)


@pytest.mark.parametrize(("case", "dtype"), CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_misaligned(backend: str, case: str, dtype: torch.dtype) -> None:
    _, given = make(case, dtype)
    grad = misaligned(upstream(OP, given))
    given = {name: misaligned(v) if isinstance(v, Tensor) else v for name, v in given.items()}
    assert all(given[name].data_ptr() % 16 for name in tensors_of(given))
    assert grad.data_ptr() % 16
    assert_accurate(given, grad, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_any_strides(backend: str) -> None:
    _, given = make("pixel_embed c=24")
    grad = upstream(OP, given)
    strided = grad.transpose(0, 2).contiguous().transpose(0, 2)
    expected = our_gradients(OP, given, grad, backend=backend)
    for name, gradient in gradients_in_place(given, strided, backend).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("wanted", ["image", "weight", "bias", "position"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_one_at_a_time_are_those_of_all(backend: str, wanted: str) -> None:
    _, given = make("pixel_embed c=24")
    grad = upstream(OP, given)
    values: dict[str, Any] = {**given, wanted: given[wanted].clone().requires_grad_()}
    with use_backend(backend):
        (found,) = torch.autograd.grad(public(OP)(**values), values[wanted], grad)
    assert torch.equal(found, our_gradients(OP, given, grad, backend=backend)[wanted])


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_of_other_dtypes(backend: str) -> None:
    _, given = make("pixel_embed c=24")
    low = {name: given[name].bfloat16() for name in ("image", "weight", "bias")}
    given = {**given, **low}
    out = ours(OP, given, backend=backend)
    eager, exact = eager_and_exact(OP, given)
    assert out.dtype == eager.dtype == torch.float32  # widened by the position
    assert_as_accurate(out, eager, exact)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "wider", "misaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["pixel_embed c=24", "pixel_embed patch=14 stride=7"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_uint8_with_mean_and_std(backend: str, case: str, dtype: torch.dtype, layout: str) -> None:
    _, given = make(case, dtype)
    image = torch.randint(0, 256, given["image"].shape, dtype=torch.uint8, device=given["image"].device)
    statistics = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    normalized = {**given, "image": reference.normalized(image, dtype, **statistics)}
    exact = {**exactly(given), "image": reference.normalized(image, torch.float64, **statistics)}
    bytes_ = LAYOUTS[layout](image) if layout in LAYOUTS else image
    assert torch.equal(bytes_, image)
    out = ours(OP, {**given, "image": bytes_, **statistics}, backend=backend)
    assert out.dtype == dtype
    assert_as_accurate(out, eager_and_exact(OP, normalized)[0], eager_and_exact(OP, exact)[1])

    grad, names = upstream(OP, normalized), ["weight", "bias", "position"]
    values = {**given, **{name: given[name].detach().requires_grad_() for name in names}}
    with use_backend(backend):
        words = public(OP)(**{**values, "image": bytes_}, **statistics)
        found = torch.autograd.grad(words, [values[name] for name in names], grad)
    assert_gradients_as_accurate(
        dict(zip(names, found, strict=True)),
        plain_gradients(OP, normalized, grad),
        plain_gradients(OP, exact, grad.double()),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_patch(backend: str) -> None:
    _, given = make("pixel_embed c=24")
    given["image"][0, 1, 5, 3] = torch.nan
    out = ours(OP, given, backend=backend)
    assert out[0].isnan().any()
    assert not out[1:].isnan().any()


@pytest.mark.parametrize("backend", ["cuda"])
def test_the_native_kernels_are_taken_first(backend: str) -> None:
    _, given = make("pixel_embed c=24")
    image = given["image"]
    assert can_run(backend, OP, image) is None
    assert choose(OP, image) == backend
    assert image.device.type == DEVICE


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_left_to_pytorch(backend: str) -> None:
    _, given = make("pixel_embed c=24")
    given = exactly(given)
    assert "float64" in str(can_run(backend, OP, given["image"]))
    assert choose(OP, given["image"]) == "reference"
