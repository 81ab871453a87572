"""pixel_embed: accuracy on every SIMD tier, any strides of the image, patches and words, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    PRECISIONS,
    arguments,
    assert_as_accurate,
    assert_same_special_values,
    check,
    eager_and_exact,
    in_dtype,
    operator,
    operator_arguments,
    randn,
    run,
)

from tnt_kernels import ops

OP = "pixel_embed"


def embed_arguments(
    batch: int = 2,
    channels: int = 3,
    grid: tuple[int, int] = (2, 3),
    patch: tuple[int, int] = (16, 16),
    stride: int = 4,
    c: int = 24,
    kernel: int = 7,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    position: bool = True,
    legacy: bool = False,
) -> dict[str, Any]:
    m = -(-patch[0] // stride) * -(-patch[1] // stride)
    return {
        "image": randn(batch, channels, grid[0] * patch[0], grid[1] * patch[1], dtype=dtype),
        "weight": randn(c, channels, kernel, kernel, dtype=dtype, scale=(channels * kernel**2) ** -0.5),
        "bias": randn(c, dtype=dtype) if bias else None,
        "position": randn(1, m, c, dtype=dtype) if position else None,
        "patch_size": patch,
        "stride": stride,
        "legacy": legacy,
    }


BYTES = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
NORMAL: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def normalized(image: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """As torchvision does it."""
    mean, std = (torch.tensor(NORMAL[name], dtype=dtype).view(3, 1, 1) for name in ("mean", "std"))
    return (image.to(dtype) / 255 - mean) / std


def by_hand(values: dict[str, Any]) -> torch.Tensor:
    """The definition, one patch at a time, in float64."""
    v = in_dtype(values, torch.float64)
    (patch_h, patch_w), stride, pad = v["patch_size"], v["stride"], v["weight"].shape[-1] // 2
    sentences = []
    for image in v["image"]:
        whole = F.conv2d(image, v["weight"], v["bias"], stride, pad)
        for top in range(0, image.shape[1], patch_h):
            for left in range(0, image.shape[2], patch_w):
                if v["legacy"]:
                    y, x, h, w = (i // stride for i in (top, left, patch_h, patch_w))
                    out = whole[:, y : y + h, x : x + w]
                else:
                    patch = image[:, top : top + patch_h, left : left + patch_w]
                    out = F.conv2d(patch, v["weight"], v["bias"], stride, pad)
                sentences.append(
                    torch.stack([out[:, y, x] for y in range(out.shape[1]) for x in range(out.shape[2])])
                )
    words = torch.stack(sentences)
    return words if v["position"] is None else words + v["position"]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(("patch", "stride"), [((16, 16), 4), ((8, 12), 4), ((14, 14), 7)])
def test_definition(
    backend: str, legacy: bool, patch: tuple[int, int], stride: int, needs_native: None
) -> None:
    values = embed_arguments(patch=patch, stride=stride, legacy=legacy)
    torch.testing.assert_close(
        run(OP, values, backend=backend).double(), by_hand(values), rtol=1e-5, atol=1e-5
    )


def test_a_patch_does_not_see_its_neighbour(tier: str) -> None:
    values = embed_arguments(batch=1, grid=(1, 2))
    changed = values["image"].clone()
    changed[..., :16] += 1.0  # the patch on the left
    assert torch.equal(run(OP, values)[1], run(OP, {**values, "image": changed})[1])
    values["legacy"] = True
    assert not torch.equal(run(OP, values)[1], run(OP, {**values, "image": changed})[1])


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("c", [24, 40, 48, 13])
def test_accuracy(tier: str, c: int, precision: str, legacy: bool) -> None:
    dtype, autocast = PRECISIONS[precision]
    check(OP, embed_arguments(batch=3, grid=(3, 3), c=c, dtype=dtype, legacy=legacy), autocast)


@pytest.mark.parametrize(
    ("patch", "stride", "kernel"),
    [
        ((16, 16), 2, 7),
        ((14, 10), 4, 7),
        ((4, 4), 4, 3),
        ((5, 3), 1, 5),
        ((3, 3), 5, 7),
        ((32, 32), 4, 1),
        ((6, 7), 3, 9),
    ],
)
def test_other_patches(tier: str, patch: tuple[int, int], stride: int, kernel: int) -> None:
    check(OP, embed_arguments(batch=4, grid=(5, 3), patch=patch, stride=stride, kernel=kernel, c=10))


LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch_inside": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "every_second": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "cropped": lambda x: F.pad(x, (3, 2, 1, 4), value=float("nan"))[..., 1:-4, 3:-2],
    "flipped_channels": lambda x: x[:, [2, 1, 0]].flip(1),
    "expanded_batch": lambda x: x[:1].expand(x.shape),
    "expanded_channels": lambda x: x[:, :1].expand(x.shape),
    "one_value": lambda x: x[:1, :1, :1, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("legacy", [False, True])
def test_image_layouts(layout: str, precision: str, legacy: bool, needs_native: None) -> None:
    dtype, _ = PRECISIONS[precision]
    values = embed_arguments(dtype=dtype, legacy=legacy)
    values["image"] = LAYOUTS[layout](values["image"])
    expected = run(OP, {**values, "image": values["image"].contiguous()})
    assert torch.equal(run(OP, values), expected)
    check(OP, values)


def test_strided_parameters(tier: str) -> None:
    values = embed_arguments()
    values["weight"] = values["weight"].to(memory_format=torch.channels_last)
    values["bias"] = values["bias"].repeat_interleave(2)[::2]
    values["position"] = values["position"].transpose(1, 2).contiguous().transpose(1, 2)
    check(OP, values)


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Any], torch.dtype | None, int]:
    stride = draw(st.integers(1, 6))
    legacy = draw(st.booleans())
    if legacy:
        patch = (stride * draw(st.integers(1, 5)), stride * draw(st.integers(1, 5)))
    else:
        patch = (draw(st.integers(1, 20)), draw(st.integers(1, 20)))
    dtype, autocast = PRECISIONS[draw(st.sampled_from(list(PRECISIONS)))]
    torch.manual_seed(draw(st.integers(0, 2**16)))
    c = draw(st.integers(4, 50))
    grid = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    words = -(-patch[0] // stride) * -(-patch[1] // stride) * grid[0] * grid[1]
    values = embed_arguments(
        batch=min(64, 4096 // (words * c) + 1),
        channels=draw(st.integers(1, 4)),
        grid=grid,
        patch=patch,
        stride=stride,
        c=c,
        kernel=draw(st.sampled_from([1, 3, 5, 7, 9])),
        dtype=dtype,
        bias=draw(st.booleans()),
        position=draw(st.booleans()),
        legacy=legacy,
    )
    if draw(st.booleans()):
        values["image"] = values["image"].to(memory_format=torch.channels_last)
    return values, autocast, draw(st.integers(1, 3))


@settings(max_examples=25)
@given(call=calls())
def test_any_call(tier: str, call: tuple[dict[str, Any], torch.dtype | None, int]) -> None:
    values, autocast, threads = call
    torch.set_num_threads(threads)
    check(OP, values, autocast)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_images(backend: str) -> None:
    values = embed_arguments()
    values["image"] = values["image"][:0]
    out = run(OP, values, backend=backend)
    assert out.shape == (0, 16, 24)


def test_more_patches_than_a_grid_axis_holds(needs_native: None) -> None:
    torch.set_num_threads(2)
    values = embed_arguments(batch=3, channels=1, grid=(148, 148), patch=(4, 4), c=5, kernel=3)
    assert 3 * 148 * 148 > 65_535
    check(OP, values)


@pytest.mark.parametrize("position", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_result_dtype(precision: str, position: torch.dtype | None, needs_native: None) -> None:
    """As eager: the convolution's dtype, widened by the position's."""
    dtype, autocast = PRECISIONS[precision]
    values = embed_arguments(dtype=dtype)
    values["position"] = None if position is None else values["position"].to(position)
    check(OP, values, autocast)
    direct = operator(OP)(*operator_arguments(OP, values, autocast))
    assert direct.dtype == run(OP, values, autocast).dtype


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e4])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_special_values_in_the_image(tier: str, value: float, legacy: bool, precision: str) -> None:
    dtype, autocast = PRECISIONS[precision]
    values = embed_arguments(legacy=legacy, dtype=dtype)
    values["image"][0, 1, 7, 18] = value
    values["image"][1, 2, 0, 0] = value
    assert_same_special_values(run(OP, values, autocast), run(OP, values, autocast, backend="reference"))


def test_special_values_in_parameters(tier: str) -> None:
    for name in ("bias", "position"):
        values = embed_arguments()
        values[name].view(-1)[7] = float("nan")
        values[name].view(-1)[20] = float("inf")
        assert_same_special_values(run(OP, values), run(OP, values, backend="reference"))
    values = embed_arguments()
    values["weight"][3, 0, 3, 3] = float("nan")  # meets a pixel in every word, padding in none
    assert_same_special_values(run(OP, values), run(OP, values, backend="reference"))


def test_same_bits_whatever_the_threads(tier: str) -> None:
    values = embed_arguments(batch=3)
    first = run(OP, values)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(first, run(OP, values))


def test_gradients_under_compute_dtype() -> None:
    values = arguments(OP)
    eager, exact = eager_and_exact(OP, values, torch.bfloat16)
    values["weight"].requires_grad_()
    out = operator(OP)(*operator_arguments(OP, values, torch.bfloat16))
    assert out.requires_grad
    assert_as_accurate(out.detach(), eager, exact)


def test_float64() -> None:
    values = embed_arguments()
    values["position"] = values["position"].double()
    for out in (run(OP, values, backend="auto"), operator(OP)(*operator_arguments(OP, values))):
        assert out.dtype == torch.float64
        torch.testing.assert_close(out, by_hand(values), rtol=1e-5, atol=1e-5)
    values = embed_arguments(dtype=torch.float64)
    torch.testing.assert_close(run(OP, values, backend="auto"), by_hand(values))
    torch.testing.assert_close(operator(OP)(*operator_arguments(OP, values)), by_hand(values))
    with pytest.raises(RuntimeError, match="float64"):
        run(OP, values, backend="cpu")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("legacy", [False, True])
def test_uint8_with_mean_and_std(backend: str, precision: str, legacy: bool, needs_native: None) -> None:
    dtype, autocast = PRECISIONS[precision]
    values = {**arguments(OP, dtype), "legacy": legacy}
    pixels = normalized(BYTES, torch.float32).to(dtype)
    eager, _ = eager_and_exact(OP, {**values, "image": pixels}, autocast)
    _, exact = eager_and_exact(OP, {**in_dtype(values, torch.float64), "image": normalized(BYTES)})
    out = run(OP, {**values, "image": BYTES, **NORMAL}, autocast, backend=backend)
    assert out.dtype == eager.dtype
    assert_as_accurate(out, eager, exact)


def test_uint8_in_training_and_compiled(needs_native: None) -> None:
    values = {**arguments(OP), "image": BYTES, **NORMAL}
    names = ("weight", "bias", "position")
    gradients = []
    for image, normal in ((BYTES, NORMAL), (normalized(BYTES, torch.float32), {})):
        given = {**arguments(OP), **{name: values[name].clone().requires_grad_() for name in names}}
        out = ops.pixel_embed(**{**given, "image": image, **normal})
        gradients.append(torch.autograd.grad(out.square().sum(), [given[name] for name in names]))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    compiled = torch.compile(ops.pixel_embed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**values), ops.pixel_embed(**values))
    torch.library.opcheck(operator(OP), (*operator_arguments(OP, values), *NORMAL.values()))


BAD = [
    ({"image": None}, TypeError, r"image must be a tensor of shape \[images, channels.*NoneType"),
    (
        {"image": torch.ones(3, 32, 48)},
        ValueError,
        r"image must be a tensor of shape .*got shape \[3, 32, 48\]",
    ),
    ({"image": torch.ones(2, 3, 32, 48).int()}, ValueError, "image must be of dtype float32.*int32"),
    ({"image": torch.ones(2, 3, 32, 48).byte()}, ValueError, "mean must be 3 numbers for .* uint8, got None"),
    ({"image": torch.ones(3, 32, 48).byte(), **NORMAL}, ValueError, "image must be a tensor of shape"),
    ({"image": BYTES, **NORMAL, "mean": (0.5, 0.5)}, ValueError, r"mean must be 3 numbers .*\(0.5, 0.5\)"),
    ({"image": BYTES, **NORMAL, "std": (1.0, 0.0, 1.0)}, ValueError, r"std must be positive, got \(1.0, 0.0"),
    ({"image": BYTES, **NORMAL, "std": (1.0, float("nan"), 1.0)}, ValueError, "std must be finite numbers"),
    ({"mean": (0.5, 0.5, 0.5)}, ValueError, "mean must be None for an image that is not of dtype uint8"),
    (
        {"image": BYTES, **NORMAL, "weight": torch.ones(24, 3, 7, 7, device="meta")},
        ValueError,
        "weight must be on cpu.*meta",
    ),
    ({"image": torch.ones(2, 3, 33, 48)}, ValueError, "image must be .* patches of 16x16 divide, got 33x48"),
    ({"image": torch.ones(2, 3, 32, 8)}, ValueError, "image must be .* 16x16 divide, got 32x8"),
    ({"image": torch.ones(2, 3, 0, 16)}, ValueError, "image must be .* got 0x16"),
    (
        {"image": torch.ones(2, 4, 32, 48)},
        ValueError,
        r"weight must be of shape \[24, 4, 7, 7\], got shape \[24, 3, 7, 7\]",
    ),
    (
        {"image": torch.ones(2, 3, 32, 48).bfloat16()},
        ValueError,
        "weight must be of dtype torch.bfloat16 .*float32",
    ),
    (
        {"weight": torch.ones(24, 3, 7)},
        ValueError,
        r"weight must be a tensor of shape \[c, channels, kernel, kernel\]",
    ),
    ({"weight": torch.ones(24, 3, 7, 5)}, ValueError, r"weight must be of shape \[24, 3, 5, 5\]"),
    ({"weight": torch.ones(24, 3, 6, 6)}, ValueError, "weight must be .* with k odd"),
    ({"weight": torch.ones(0, 3, 7, 7)}, ValueError, "weight must be"),
    ({"weight": torch.ones(24, 3, 7, 7, device="meta")}, ValueError, "weight must be on cpu.*meta"),
    ({"bias": torch.ones(23)}, ValueError, r"bias must be of shape \[24\], got shape \[23\]"),
    ({"bias": 0.5}, TypeError, r"bias must be None or a tensor of shape \[24\], got float"),
    (
        {"position": torch.ones(1, 15, 24)},
        ValueError,
        r"position must be of shape \[1, 16, 24\], got shape \[1, 15, 24\]",
    ),
    ({"position": torch.ones(16, 24)}, ValueError, "position must be a tensor of shape"),
    ({"position": torch.ones(1, 16, 24, device="meta")}, ValueError, "position must be on cpu"),
    ({"patch_size": 0}, ValueError, r"patch_size must be positive, got \(0, 0\)"),
    ({"patch_size": (16, -16)}, ValueError, r"patch_size must be positive"),
    ({"patch_size": (16, 16, 16)}, ValueError, r"patch_size must be one number or a pair"),
    ({"patch_size": "16"}, ValueError, r"patch_size must be one number or a pair"),
    ({"stride": 0}, ValueError, "stride must be positive, got 0"),
    ({"stride": 5, "legacy": True}, ValueError, "patch_size must be a multiple of stride 5 when legacy"),
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    with pytest.raises(error, match="pixel_embed: " + message):
        run(OP, {**arguments(OP), **change}, backend=backend)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [case for case in BAD if all(isinstance(v, (torch.Tensor, int)) for v in case[0].values())],
)
def test_bad_arguments_of_the_operator(change: dict[str, Any], error: type[Exception], message: str) -> None:
    values = operator_arguments(OP, {**arguments(OP), **change})
    with pytest.raises(error, match=message):
        operator(OP)(*values)
