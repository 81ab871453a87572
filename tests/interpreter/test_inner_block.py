"""The inner block's Triton kernels, forward and backward, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradients import assert_gradients_as_accurate
from oracle import (
    assert_as_accurate,
    attention_parameters,
    eager_and_exact,
    in_dtype,
    inner_parameters,
    mlp_parameters,
    operator_arguments,
    randn,
)
from torch import Tensor

from tnt_kernels import _ops
from tnt_kernels._autograd import COMPOSITES, tensor_positions
from tnt_kernels.backends.triton import configs, inner_block, inner_block_backward
from tnt_kernels.backends.triton.configs import Config

OPS = ("inner_block", "inner_attention", "inner_mlp")

# sentences, words, channels, heads, hidden channels (None: four times the channels)
SHAPES = [
    (9, 16, 24, 4, None),  # TNT-S
    (5, 16, 40, 4, None),  # TNT-B
    (3, 16, 48, 4, None),  # no column to spare for the biases
    (7, 16, 12, 4, None),  # TNT-Ti: four heads in a group
    (3, 9, 10, 5, None),
    (1, 16, 24, 4, None),
    (2, 16, 64, 2, 100),
    (2, 33, 32, 4, 40),
    (2, 64, 64, 1, 8),
    (3, 4, 48, 3, 50),  # groups that are no power of two
    (2, 16, 16, 16, 7),
    (1, 1, 1, 1, 1),
]


def arguments(op: str, shape: tuple[Any, ...], **options: Any) -> dict[str, Any]:
    s, m, c, heads, hidden = shape
    x = {"x": randn(s, m, c, scale=1.5, mean=0.3)}
    if op == "inner_block":
        return {**x, **inner_parameters(c, hidden, **options), "num_heads": heads}
    if op == "inner_attention":
        return {**x, **attention_parameters(c, **options), "num_heads": heads}
    options.pop("qkv_bias", None)
    return {**x, **mlp_parameters(c, hidden, **options)}


def launch(op: str, given: dict[str, Any]) -> Tensor:
    return getattr(inner_block, op)(*operator_arguments(op, given))


def check_forward(op: str, given: dict[str, Any]) -> Tensor:
    ours = launch(op, given)
    eager, exact = eager_and_exact(op, given)
    assert ours.is_contiguous()
    assert ours.dtype == eager.dtype
    assert_as_accurate(ours, eager, exact, what=op)
    return ours


def double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def names_of(op: str) -> list[str]:
    schema = getattr(_ops, op)._schema.arguments
    return [schema[i].name for i in tensor_positions(getattr(_ops, op))]


def check_backward(op: str, given: dict[str, Any], wanted: list[str] | None = None) -> list[Tensor]:
    args = operator_arguments(op, given)
    grad = randn(*given["x"].shape)
    names = names_of(op)
    present = {name for name in names if isinstance(given.get(name), Tensor)} - {"drop_path1", "drop_path2"}
    present -= {"drop_path"}
    needed = [name in (present if wanted is None else wanted) for name in names]
    ours = getattr(inner_block_backward, f"{op}_backward")(grad, needed, *args)
    composite = COMPOSITES[f"{op}_backward"]
    eager = composite(grad, needed, *args)
    exact = composite(grad.double(), needed, *map(double, args))
    asked = [name for name, flag in zip(names, needed, strict=True) if flag]
    assert len(ours) == len(asked)
    assert all(gradient.is_contiguous() for gradient in ours)
    found = [dict(zip(asked, gradients, strict=True)) for gradients in (ours, eager, exact)]
    assert_gradients_as_accurate(*found)
    return ours


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block(shape: tuple[Any, ...]) -> None:
    given = arguments("inner_block", shape)
    check_forward("inner_block", given)
    check_backward("inner_block", given)


@pytest.mark.parametrize("op", ["inner_attention", "inner_mlp"])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_halves(op: str, shape: tuple[Any, ...]) -> None:
    given = arguments(op, shape)
    check_forward(op, given)
    check_backward(op, given)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_without_biases(op: str, shape: tuple[Any, ...]) -> None:
    given = arguments(op, shape, qkv_bias=False, bias=False)
    check_forward(op, given)
    check_backward(op, given)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_drop_path(op: str, shape: tuple[Any, ...]) -> None:
    given = arguments(op, shape)
    for name in ("drop_path1", "drop_path2") if op == "inner_block" else ("drop_path",):
        factors = torch.empty(shape[0]).bernoulli_(0.6) / 0.6
        factors[0] = 0.0
        given[name] = factors
    out = check_forward(op, given)
    assert torch.equal(out[0], given["x"][0])
    check_backward(op, given)


@pytest.mark.parametrize(
    "wanted", [["x"], ["fc2_bias"], ["qk_weight", "norm2_bias"], ["norm1_weight"]], ids=str
)
def test_only_the_gradients_asked_for(wanted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    own = inner_block_backward.launch

    def recorded(kernel: Any, grid: Any, given: Any, *rest: Any) -> None:
        launched.append((kernel.__name__, given["grad_x_ptr"] is not None, given["sums_ptr"] is not None))
        own(kernel, grid, given, *rest)

    monkeypatch.setattr(inner_block_backward, "launch", recorded)
    check_backward("inner_block", arguments("inner_block", SHAPES[0]), wanted)
    mlp, attention = "_mlp_backward_kernel", "_attention_backward_kernel"
    assert (
        launched
        == {
            "x": [(mlp, True, False), (attention, True, False)],
            "fc2_bias": [(mlp, False, True)],
            "qk_weight": [(mlp, True, True), (attention, False, True)],
            "norm1_weight": [(mlp, True, False), (attention, False, True)],
        }[wanted[0]]
    )


def test_programs_that_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer programs than tiles, the last of which is not full: sums go on where they stand."""
    monkeypatch.setattr(inner_block_backward, "_PROGRAMS", 2)
    for kernel in ("mlp_backward few", "attention_backward few"):
        monkeypatch.setitem(configs._forced, kernel, Config(32, 4))
    given = arguments("inner_block", (13, 16, 24, 4, None))
    first = check_backward("inner_block", given)
    assert len(first) == 15
    given = arguments("inner_block", (7, 16, 48, 4, None))
    check_backward("inner_block", given)


def test_the_same_bits_every_time() -> None:
    given = arguments("inner_block", SHAPES[1])
    args = operator_arguments("inner_block", given)
    grad, needed = randn(*given["x"].shape), [True] * 15 + [False] * 3
    runs = [inner_block_backward.inner_block_backward(grad, needed, *args) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert torch.equal(launch("inner_block", given), launch("inner_block", given))


@pytest.mark.parametrize("mean", [10.0, -300.0])
def test_words_far_from_zero(mean: float) -> None:
    given = arguments("inner_block", SHAPES[0])
    given["x"] = given["x"] + mean
    check_forward("inner_block", given)
    check_backward("inner_block", given)


def test_large_scores() -> None:
    given = arguments("inner_attention", SHAPES[0])
    given["qk_weight"] = given["qk_weight"] * 30.0
    check_forward("inner_attention", given)


def test_gelu_far_out() -> None:
    given = arguments("inner_mlp", SHAPES[0])
    given["fc1_weight"] = given["fc1_weight"] * 10.0
    check_forward("inner_mlp", given)
    check_backward("inner_mlp", given)
    given["fc1_weight"] = given["fc1_weight"] * 1e6
    check_forward("inner_mlp", given)


def test_nan_stays_in_its_sentence() -> None:
    given = arguments("inner_block", SHAPES[0])
    given["x"][3, 5, 7] = float("nan")
    given["x"][6, 0, 0] = float("inf")
    out = launch("inner_block", given)
    with_nan = out.isnan().flatten(1).all(1).nonzero().flatten().tolist()
    assert with_nan == [3, 6]
    assert torch.isfinite(out[[0, 1, 2, 4, 5, 7, 8]]).all()


def test_strides() -> None:
    given = arguments("inner_block", SHAPES[0])
    dense = check_forward("inner_block", given)
    x = given["x"]
    for strided in (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([x, x], dim=-1)[..., :24],
        x[:1].expand(9, -1, -1),
    ):
        out = check_forward("inner_block", {**given, "x": strided})
        assert torch.equal(out[0], dense[0])
    weight = given["fc1_weight"].t().contiguous().t()
    assert torch.equal(check_forward("inner_block", {**given, "fc1_weight": weight}), dense)


def test_no_sentences() -> None:
    given = arguments("inner_block", (0, 16, 24, 4, None))
    assert launch("inner_block", given).shape == (0, 16, 24)
    args = operator_arguments("inner_block", given)
    needed = [True] * 15 + [False] * 3
    gradients = inner_block_backward.inner_block_backward(given["x"], needed, *args)
    assert [g.shape for g in gradients] == [a.shape for a in args[:15]]
    assert not any(gradient.any() for gradient in gradients)


def test_parameters_of_other_dtypes() -> None:
    """Autocast hands over float32 parameters; those of a LayerNorm may be wider than the others."""
    given = arguments("inner_block", SHAPES[0])
    rounded = {
        name: value.bfloat16() if isinstance(value, Tensor) and name != "x" else value
        for name, value in given.items()
    }
    exact = {name: double(value) for name, value in rounded.items()}
    args = operator_arguments("inner_block", rounded, torch.float32)
    out = inner_block.inner_block(*args)
    _, truth = eager_and_exact("inner_block", {**exact})
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    needed = [True] * 15 + [False] * 3
    gradients = inner_block_backward.inner_block_backward(randn(*given["x"].shape), needed, *args)
    assert [g.dtype for g in gradients] == [torch.float32] + [torch.bfloat16] * 14


def test_what_the_kernels_leave_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout, float64 and larger sizes."""
    monkeypatch.setattr(inner_block, "launch", None)
    given = arguments("inner_block", SHAPES[0])
    check_forward("inner_block", {**given, "seed": torch.tensor([7]), "proj_drop": 0.5})
    check_forward("inner_block", {name: double(value) for name, value in given.items()})
    check_forward("inner_block", arguments("inner_block", (1, 65, 24, 4, None)))
    check_forward("inner_block", arguments("inner_block", (1, 16, 65, 5, None)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "num_heads"),
        ({"fc1_weight": torch.zeros(96, 23)}, "fc1_weight"),
        ({"norm1_bias": torch.zeros(25)}, "norm1_bias"),
        ({"drop_path1": torch.ones(8)}, "drop_path1"),
        ({"proj_weight": torch.zeros(24, 24, dtype=torch.int64)}, "proj_weight"),
    ],
    ids=str,
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    given = {**arguments("inner_block", SHAPES[0]), **change}
    given["scale"] = 1.0
    with pytest.raises((TypeError, ValueError), match=message):
        launch("inner_block", given)
    args = operator_arguments("inner_block", arguments("inner_block", SHAPES[0]))
    with pytest.raises((TypeError, ValueError), match="grad"):
        inner_block_backward.inner_block_backward(torch.ones(2), [True] * 18, *args)


@pytest.mark.parametrize("autocast", [False, True], ids=["float16", "autocast_float16"])
@pytest.mark.parametrize("shape", [(60, *SHAPES[0][1:]), (40, *SHAPES[1][1:]), (30, *SHAPES[2][1:])], ids=str)
def test_16_bit_products(shape: tuple[Any, ...], autocast: bool) -> None:
    """float16 only: the interpreter multiplies the bits of bfloat16."""
    given = arguments("inner_block", shape)
    if not autocast:
        given = in_dtype(given, torch.float16)
    compute_dtype = torch.float16 if autocast else None
    args = operator_arguments("inner_block", given, compute_dtype)
    eager, exact = eager_and_exact("inner_block", given, compute_dtype)
    ours = inner_block.inner_block(*args)
    assert ours.dtype == given["x"].dtype
    assert_as_accurate(ours, eager, exact)

    grad = randn(*given["x"].shape).to(ours.dtype)
    needed = [True] * 15 + [False] * 3
    gradients = [
        inner_block_backward.inner_block_backward(grad, needed, *args),
        COMPOSITES["inner_block_backward"](grad, needed, *args),
        COMPOSITES["inner_block_backward"](
            double(grad), needed, *map(double, operator_arguments("inner_block", given))
        ),
    ]
    assert_gradients_as_accurate(*(dict(zip(names_of("inner_block"), g, strict=False)) for g in gradients))
