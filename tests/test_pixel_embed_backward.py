"""Gradients of pixel_embed: accuracy on every SIMD tier, any patches, and what is asked of a backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradients import check_gradients, gradients, tensors_of
from hypothesis import given, settings
from oracle import (
    PRECISIONS,
    arguments,
    assert_same_special_values,
    operator,
    operator_arguments,
    randn,
    reference_arguments,
    run,
)
from test_pixel_embed import LAYOUTS, calls, embed_arguments

from tnt_kernels import native, ops
from tnt_kernels._autograd import tensor_positions
from tnt_kernels.backends import reference

OP = "pixel_embed"
TENSORS = 4  # of the operator, present or not


def given_tensors(values: dict[str, Any]) -> list[str]:
    return [name for name in tensors_of(values) if values[name] is not None]


def result_gradient(values: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out = reference.pixel_embed(**reference_arguments(OP, values))
    return randn(*out.shape, dtype=out.dtype)


def backward(
    grad: torch.Tensor,
    values: dict[str, Any],
    compute_dtype: torch.dtype | None = None,
    needed: list[bool] | None = None,
) -> list[torch.Tensor]:
    """The registered operator, for all gradients or those needed."""
    args = operator_arguments(OP, values, compute_dtype)
    needed = [tensor is not None for tensor in args[:TENSORS]] if needed is None else needed
    return operator(f"{OP}_backward")(grad, needed, *args)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("c", [24, 40, 48, 13])
def test_accuracy(tier: str, c: int, precision: str, legacy: bool) -> None:
    dtype, autocast = PRECISIONS[precision]
    check_gradients(OP, embed_arguments(batch=3, grid=(3, 3), c=c, dtype=dtype, legacy=legacy), autocast)


PATCHES = [  # patch, stride, kernel
    ((16, 16), 2, 7),
    ((14, 10), 4, 7),
    ((4, 4), 4, 3),
    ((5, 3), 1, 5),
    ((3, 3), 5, 7),
    ((32, 32), 4, 1),
    ((6, 7), 3, 9),
    ((1, 1), 1, 5),
    ((9, 9), 3, 17),
]


@pytest.mark.parametrize(("patch", "stride", "kernel"), PATCHES)
@pytest.mark.parametrize("precision", ["float32", "autocast_bfloat16"])
def test_other_patches(tier: str, patch: tuple[int, int], stride: int, kernel: int, precision: str) -> None:
    dtype, autocast = PRECISIONS[precision]
    values = embed_arguments(4, grid=(5, 3), patch=patch, stride=stride, kernel=kernel, c=10, dtype=dtype)
    check_gradients(OP, values, autocast)


@pytest.mark.parametrize(
    ("patch", "stride", "kernel"), [((4, 4), 4, 9), ((2, 6), 2, 7), ((1, 1), 1, 5), ((10, 5), 5, 1)]
)
@pytest.mark.parametrize("grid", [(1, 1), (4, 5)])
def test_neighbours_overlap(
    tier: str, patch: tuple[int, int], stride: int, kernel: int, grid: tuple[int, int]
) -> None:
    """A legacy convolution: pixels that several patches see, some of them not next to each other."""
    check_gradients(OP, embed_arguments(4, 2, grid, patch, stride, kernel=kernel, c=10, legacy=True))


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("c", [1, 7, 33])
def test_channels(tier: str, channels: int, c: int) -> None:
    check_gradients(OP, embed_arguments(3, channels, (3, 4), c=c))


@settings(max_examples=25)
@given(call=calls())
def test_any_call(tier: str, call: tuple[dict[str, Any], torch.dtype | None, int]) -> None:
    values, autocast, threads = call
    torch.set_num_threads(threads)
    check_gradients(OP, values, autocast)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_image_layouts(layout: str, legacy: bool, precision: str, needs_native: None) -> None:
    values = embed_arguments(dtype=PRECISIONS[precision][0], legacy=legacy)
    values["image"] = LAYOUTS[layout](values["image"])
    grad = result_gradient(values)
    expected = backward(grad, {**values, "image": values["image"].contiguous()})
    for ours, theirs in zip(backward(grad, values), expected, strict=True):
        assert ours.is_contiguous()
        assert torch.equal(ours, theirs)


def test_layouts_of_the_gradient(needs_native: None) -> None:
    values = embed_arguments()
    for grad in (randn(12, 24, 16).transpose(1, 2), randn(1).expand(12, 16, 24), randn(12, 32, 24)[:, ::2]):
        for ours, expected in zip(backward(grad, values), backward(grad.contiguous(), values), strict=True):
            assert torch.equal(ours, expected)


def test_strided_parameters(tier: str) -> None:
    values = embed_arguments()
    values["weight"] = values["weight"].to(memory_format=torch.channels_last)
    values["position"] = values["position"].transpose(1, 2).contiguous().transpose(1, 2)
    assert all(gradient.is_contiguous() for gradient in backward(randn(12, 16, 24), values))
    check_gradients(OP, values)


@pytest.mark.parametrize("position", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_wider_position(tier: str, precision: str, position: torch.dtype | None) -> None:
    dtype, autocast = PRECISIONS[precision]
    values = embed_arguments(batch=3, grid=(3, 3), dtype=dtype, bias=position is not None)
    values["position"] = None if position is None else values["position"].to(position)
    check_gradients(OP, values, autocast)


def test_more_patches_than_a_grid_axis_holds(needs_native: None) -> None:
    torch.set_num_threads(2)
    check_gradients(OP, embed_arguments(batch=3, channels=1, grid=(148, 148), patch=(4, 4), c=5, kernel=3))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("precision", ["float32", "autocast_bfloat16"])
def test_the_same_bits_for_every_number_of_threads(tier: str, legacy: bool, precision: str) -> None:
    dtype, autocast = PRECISIONS[precision]
    values = embed_arguments(batch=5, grid=(7, 9), dtype=dtype, legacy=legacy)
    grad = randn(315, 16, 24)
    runs = []
    for threads in (1, 2, 3, 5, 40, 2):
        torch.set_num_threads(threads)
        runs.append(backward(grad, values, autocast))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("precision", ["float32", "autocast_bfloat16"])
def test_only_what_is_asked_for(tier: str, legacy: bool, precision: str) -> None:
    """Each gradient alone, and all but each, have the bits that they have among all."""
    dtype, autocast = PRECISIONS[precision]
    values = embed_arguments(dtype=dtype, legacy=legacy)
    grad = randn(12, 16, 24)
    names = given_tensors(values)
    whole = gradients(ops.pixel_embed, values, grad, autocast=autocast)
    for name in names:
        for wanted in ([name], [other for other in names if other != name]):
            found = gradients(ops.pixel_embed, values, grad, autocast=autocast, wanted=wanted)
            assert list(found) == wanted
            assert all(torch.equal(found[n], whole[n]) for n in wanted), (name, wanted)


def test_nothing_asked_for(needs_native: None) -> None:
    assert backward(randn(12, 16, 24), embed_arguments(), needed=[False] * TENSORS) == []


def test_pixels_that_no_word_sees_have_no_gradient(tier: str) -> None:
    values = embed_arguments(patch=(8, 8), stride=4, kernel=1)
    image = backward(randn(12, 4, 24), values)[0]
    seen = torch.zeros(8, 8, dtype=torch.bool)
    seen[::4, ::4] = True
    seen = seen.repeat(2, 3)
    assert image[..., seen].all()
    assert not image[..., ~seen].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_special_values(tier: str, value: float, legacy: bool, precision: str) -> None:
    """A pixel that is not finite reaches the weights that meet it; a gradient its patch, or what it saw."""
    dtype, autocast = PRECISIONS[precision]
    values = embed_arguments(legacy=legacy, dtype=dtype)
    values["image"][1, 2, 7, 18] = value
    grad = randn(12, 16, 24)
    found = gradients(ops.pixel_embed, values, grad, autocast=autocast)
    eager = gradients(reference.pixel_embed, reference_arguments(OP, values), grad, autocast=autocast)
    assert not eager["weight"].isfinite().all()
    for name in found:
        assert torch.equal(found[name].isfinite(), eager[name].isfinite()), name

    values = embed_arguments(legacy=legacy, dtype=dtype)
    grad[3, 5, 7] = value  # the patch at the left of the second row
    found = gradients(ops.pixel_embed, values, grad, autocast=autocast)
    strange = ~found["image"].isfinite()
    assert strange[0, :, 16:32, :16].any()
    strange[0, :, 16 - 3 * legacy : 32, : 16 + 3 * legacy] = False
    assert not strange.any()
    for name, at in (("weight", (7,)), ("bias", (7,)), ("position", (0, 5, 7))):
        bad = ~found[name].isfinite()
        assert bad[at].any(), name
        bad[at] = False
        assert not bad.any(), name


@pytest.mark.parametrize("patch", [(16, 16), (12, 12)])
def test_lanes_without_a_word(tier: str, patch: tuple[int, int]) -> None:
    """What an earlier patch or word left behind there would make NaN of an infinity."""
    values = embed_arguments(batch=1, grid=(3, 11), patch=patch)
    values["image"][0, 1, 2 * patch[0] + 10, 9 * patch[1] + 5] = float("inf")
    grad = result_gradient(values)
    eager = gradients(reference.pixel_embed, reference_arguments(OP, values), grad)
    ours = gradients(ops.pixel_embed, values, grad)
    assert ours["weight"].isinf().any()
    for name in ours:
        assert_same_special_values(ours[name], eager[name])


@pytest.mark.parametrize("legacy", [False, True])
def test_gradcheck(legacy: bool) -> None:
    values = embed_arguments(1, 2, (2, 2), (4, 4), 2, 3, 3, torch.float64, legacy=legacy)
    names = given_tensors(values)
    tensors = [values[name].requires_grad_() for name in names]

    def public(*args: torch.Tensor) -> torch.Tensor:
        return ops.pixel_embed(**{**values, **dict(zip(names, args, strict=True))})

    def registered(*args: torch.Tensor) -> torch.Tensor:
        return operator(OP)(*operator_arguments(OP, {**values, **dict(zip(names, args, strict=True))}))

    for function in (public, registered):
        assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(registered, tensors)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_opcheck(bias: bool, precision: str) -> None:
    dtype, compute = PRECISIONS[precision]
    values = embed_arguments(dtype=dtype, bias=bias, position=bias)
    args = operator_arguments(OP, values, compute)
    needed = [args[i] is not None for i in tensor_positions(operator(OP))]
    grad = torch.randn_like(operator(OP)(*args))
    torch.library.opcheck(operator(f"{OP}_backward"), (grad, needed, *args))


def test_opcheck_in_float64() -> None:
    args = operator_arguments(OP, arguments(OP, torch.float64))
    grad = randn(12, 16, 24, dtype=torch.float64)
    torch.library.opcheck(operator(f"{OP}_backward"), (grad, [True] * TENSORS, *args))


def test_inputs_alone_are_kept(needs_native: None) -> None:
    values = {
        name: value.requires_grad_() if isinstance(value, torch.Tensor) else value
        for name, value in arguments(OP).items()
    }
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda x: x):
        ops.pixel_embed(**values)
    assert saved
    assert {t.data_ptr() for t in saved} <= {values[name].data_ptr() for name in given_tensors(values)}


@pytest.mark.parametrize("legacy", [False, True])
def test_no_images(legacy: bool, needs_native: None) -> None:
    values = embed_arguments(legacy=legacy)
    values["image"] = values["image"][:0]
    for name, gradient in gradients(ops.pixel_embed, values, randn(0, 16, 24)).items():
        assert gradient.shape == values[name].shape
        assert not gradient.any()


@pytest.mark.parametrize("legacy", [False, True])
def test_one_patch(tier: str, legacy: bool) -> None:
    check_gradients(OP, embed_arguments(batch=1, grid=(1, 1), legacy=legacy))


def test_arguments_stay_as_they_are(tier: str) -> None:
    values, grad = embed_arguments(), randn(12, 16, 24)
    copies, of_grad = {n: values[n].clone() for n in given_tensors(values)}, grad.clone()
    backward(grad, values)
    assert torch.equal(grad, of_grad)
    assert all(torch.equal(values[n], copies[n]) for n in copies)


def test_forward_is_what_it_was(tier: str) -> None:
    """A call that is recorded for autograd gives the bits of one that is not."""
    values = embed_arguments()
    expected = run(OP, values)
    values["weight"].requires_grad_()
    assert torch.equal(ops.pixel_embed(**values).detach(), expected)


def test_wrong_gradient_is_refused(needs_native: None) -> None:
    for grad in (randn(12, 15, 24), randn(12, 16, 24, dtype=torch.bfloat16), randn(12 * 16, 24)):
        with pytest.raises(
            ValueError, match=r"pixel_embed_backward: grad must be torch[.]float32 of shape \[12, 16, 24\]"
        ):
            backward(grad, arguments(OP))


def test_bad_arguments_are_refused(needs_native: None) -> None:
    with pytest.raises(ValueError, match=r"pixel_embed: weight must be .* with k odd"):
        backward(randn(12, 16, 24), {**arguments(OP), "weight": randn(24, 3, 6, 6)})


def test_native_function_checks_what_it_gets(needs_native: None) -> None:
    module = native.load()
    assert module is not None
    image, weight, grad = torch.ones(2, 3, 8, 8), torch.ones(5, 3, 3, 3), torch.ones(8, 4, 5)

    def call(**change: Any) -> None:
        values = {
            "grad": grad.data_ptr(), "grad_dtype": 0, "image": image.data_ptr(), "image_dtype": 0,
            "strides": list(image.stride()), "batch": 2, "channels": 3, "height": 8, "width": 8,
            "weight": weight.data_ptr(), "weight_dtype": 0, "grad_image": 0, "grad_weight": 0, "grad_bias": 0,
            "grad_position": 0, "compute_dtype": 0, "c": 5, "kernel": 3, "patch_h": 4, "patch_w": 4,
            "stride": 2, "legacy": False, "threads": 1,
        }  # fmt: skip
        module.pixel_embed_backward(**{**values, **change})

    call()
    call(batch=0, grad=0, image=0)
    for change, message in (
        ({"grad": 0}, "grad must not be null"),
        ({"image": 0}, "image must not be null"),
        ({"weight": 0}, "weight is needed"),
        ({"strides": [1, 2, 3]}, "four strides"),
        ({"kernel": 2}, "kernel must be odd"),
        ({"patch_h": 3}, "patch must divide the image"),
        ({"stride": 0}, "stride and patch must be at least 1"),
        ({"stride": 3, "legacy": True}, "stride to divide patch"),
        ({"grad_dtype": 2}, "dtype code 2"),
        ({"image_dtype": 2}, "dtype code 2"),
        ({"threads": 0}, "threads >= 1"),
        ({"batch": -1}, "batch >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**change)
