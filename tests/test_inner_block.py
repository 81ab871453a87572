"""inner_block and its halves: accuracy on every SIMD tier, shapes, strides, special values, bad input."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    PRECISIONS,
    arguments,
    assert_as_accurate,
    assert_same_special_values,
    attention_parameters,
    check,
    eager_and_exact,
    inner_parameters,
    mlp_parameters,
    operator,
    operator_arguments,
    randn,
    reference_arguments,
    run,
)

from tnt_kernels import ops
from tnt_kernels.backends import reference
from tnt_kernels.dispatch import use_backend

INNER_OPS = ("inner_attention", "inner_mlp", "inner_block")
ELEMENTS = 4096  # at least so many outputs, or the largest error is luck


def inner_arguments(
    op: str,
    s: int,
    m: int,
    c: int,
    heads: int = 1,
    hidden: int | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> dict[str, Any]:
    values: dict[str, Any] = {"x": randn(s, m, c, dtype=dtype)}
    if op == "inner_mlp":
        return {**values, **mlp_parameters(c, hidden, dtype=dtype, **options)}
    values["num_heads"] = heads
    if op == "inner_attention":
        return {**values, **attention_parameters(c, dtype=dtype, **options)}
    return {**values, **inner_parameters(c, hidden, dtype=dtype, **options)}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("c", "heads"), [(24, 4), (40, 4), (48, 4), (12, 2), (33, 3)])
@pytest.mark.parametrize("m", [16, 9, 49])
def test_accuracy(tier: str, m: int, c: int, heads: int, precision: str) -> None:
    dtype, autocast = PRECISIONS[precision]
    s = max(3, ELEMENTS // (m * c)) | 1  # odd: the last group of sentences is not full
    check("inner_block", inner_arguments("inner_block", s, m, c, heads, dtype=dtype), autocast)


@pytest.mark.parametrize("op", ["inner_attention", "inner_mlp"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_accuracy_of_halves(tier: str, op: str, precision: str) -> None:
    dtype, autocast = PRECISIONS[precision]
    check(op, inner_arguments(op, 13, 16, 24, 4, dtype=dtype), autocast)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_halves_make_the_whole(backend: str, needs_native: None) -> None:
    whole = inner_arguments("inner_block", 9, 16, 40, 4)
    names = list(inner_parameters(40))
    first = {n.replace("norm1", "norm"): whole[n] for n in ("x", *names[:8], "num_heads")}
    second = {n.replace("norm2", "norm"): whole[n] for n in names[8:]}
    y = run("inner_attention", first, backend=backend)
    halves = run("inner_mlp", {"x": y, **second}, backend=backend)
    torch.testing.assert_close(halves, run("inner_block", whole, backend=backend), rtol=1e-6, atol=1e-6)


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, dict[str, Any], torch.dtype | None, int]:
    op = draw(st.sampled_from(INNER_OPS))
    m = draw(st.integers(1, 70))
    heads = draw(st.integers(1, 5))
    c = heads * draw(st.integers(-(-6 // heads), 72 // heads))
    hidden = draw(st.sampled_from([None, 1, 7, 2 * c, 3 * c + 1]))
    dtype, autocast = PRECISIONS[draw(st.sampled_from(list(PRECISIONS)))]
    torch.manual_seed(draw(st.integers(0, 2**16)))
    s = ELEMENTS // (m * c) + draw(st.integers(1, 4))
    options = {"bias": draw(st.booleans())}
    if op != "inner_mlp":
        options["qkv_bias"] = draw(st.booleans())
    values = inner_arguments(op, s, m, c, heads, hidden, dtype, **options)
    if op != "inner_mlp":
        values["scale"] = draw(st.sampled_from([None, 0.5]))
    layout = draw(st.sampled_from(["contiguous", "transposed", "step", "expanded"]))
    x = values["x"]
    if layout == "transposed":
        values["x"] = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    elif layout == "step":
        values["x"] = torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]
    elif layout == "expanded":
        values["x"] = x[:1].expand(s, m, c)
    if draw(st.booleans()):  # parameters that lie strided in memory
        for name, value in values.items():
            if name.endswith(("weight", "bias")) and value is not None:
                values[name] = (
                    value.t().contiguous().t() if value.dim() == 2 else value.repeat_interleave(2)[::2]
                )
    return op, values, autocast, draw(st.integers(1, 3))


@settings(max_examples=40)
@given(call=calls())
def test_any_call(tier: str, call: tuple[str, dict[str, Any], torch.dtype | None, int]) -> None:
    op, values, autocast, threads = call
    torch.set_num_threads(threads)
    check(op, values, autocast)


@pytest.mark.parametrize(("m", "c", "heads"), [(1, 1, 1), (1, 2, 2), (2, 3, 1), (5, 8, 8), (256, 24, 4)])
def test_extreme_sizes(tier: str, m: int, c: int, heads: int) -> None:
    check("inner_block", inner_arguments("inner_block", ELEMENTS // (m * c) + 1, m, c, heads))


@pytest.mark.parametrize("op", INNER_OPS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_sentences(op: str, backend: str) -> None:
    values = arguments(op)
    values["x"] = values["x"][:0]
    out = run(op, values, backend=backend)
    assert out.shape == (0, 16, 24)
    assert out.dtype == torch.float32


def test_more_sentences_than_a_grid_axis_holds(needs_native: None) -> None:
    torch.set_num_threads(2)
    values = inner_arguments("inner_block", 65_537, 16, 24, 4)
    out = run("inner_block", values)
    ends = torch.cat([values["x"][:64], values["x"][-65:]])
    expected = run("inner_block", {**values, "x": ends}, backend="reference")
    torch.testing.assert_close(torch.cat([out[:64], out[-65:]]), expected, rtol=1e-5, atol=1e-5)
    assert not torch.isnan(out).any()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_same_bits_whatever_the_threads(tier: str, precision: str) -> None:
    dtype, autocast = PRECISIONS[precision]
    values = inner_arguments("inner_block", 37, 16, 24, 4, dtype=dtype)
    first = run("inner_block", values, autocast)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(first, run("inner_block", values, autocast))


def test_sentences_do_not_meet(tier: str) -> None:
    values = inner_arguments("inner_block", 6, 9, 24, 4)
    whole = run("inner_block", values)
    for i in range(6):
        alone = run("inner_block", {**values, "x": values["x"][i : i + 1]})
        torch.testing.assert_close(alone[0], whole[i], rtol=0, atol=1e-6)


def test_arguments_stay_as_they_are(tier: str) -> None:
    values = arguments("inner_block")
    copies = {n: v.clone() for n, v in values.items() if isinstance(v, torch.Tensor)}
    run("inner_block", values)
    for name, copy in copies.items():
        assert torch.equal(values[name], copy), name


def _special(op: str, name: str, value: float, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    values = inner_arguments(op, 5, 16, 24, 4, dtype=dtype)
    if name == "x":
        values["x"][1, 3, 5] = value
        values["x"][4, 15, 23] = value
    else:
        values[name].view(-1)[2] = value
    return values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e15])
@pytest.mark.parametrize("op", INNER_OPS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_special_values_in_words(tier: str, op: str, value: float, precision: str) -> None:
    dtype, autocast = PRECISIONS[precision]
    if value == 1e15 and dtype == torch.float16:
        value = 1e4
    values = _special(op, "x", value, dtype)
    ours = run(op, values, autocast)
    assert_same_special_values(ours, run(op, values, autocast, backend="reference"))
    assert torch.isfinite(ours[[0, 2, 3]]).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", list(inner_parameters(2)))
def test_special_values_in_parameters(tier: str, name: str, value: float) -> None:
    """NaN or infinity where eager has either: PyTorch's own GELU of infinity is NaN on some processors."""
    values = _special("inner_block", name, value)
    ours, eager = run("inner_block", values), run("inner_block", values, backend="reference")
    assert torch.equal(torch.isfinite(ours), torch.isfinite(eager))


def test_large_scores(tier: str) -> None:
    """Scores far apart: probabilities of zero and one, no overflow."""
    values = inner_arguments("inner_attention", 11, 16, 24, 4)
    values["scale"] = 300.0
    check("inner_attention", values)


def test_words_with_a_large_mean(tier: str) -> None:
    values = inner_arguments("inner_block", 11, 16, 24, 4)
    values["x"] += 1000.0
    check("inner_block", values)


def test_negative_view_and_inference_tensors(needs_native: None) -> None:
    values = arguments("inner_block")
    expected = run("inner_block", {**values, "x": -values["x"]})
    assert torch.equal(run("inner_block", {**values, "x": torch._neg_view(values["x"])}), expected)
    with torch.inference_mode():
        x = -values["x"]
        assert torch.equal(ops.inner_block(**{**values, "x": x}), expected)


def test_two_python_threads(needs_native: None) -> None:
    torch.set_num_threads(2)
    values = [inner_arguments("inner_block", 64, 16, 24, 4) for _ in range(2)]
    expected = [run("inner_block", v) for v in values]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(10):
            if not torch.equal(run("inner_block", values[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("op", INNER_OPS)
def test_mixed_parameter_dtypes(tier: str, op: str) -> None:
    values = arguments(op, torch.bfloat16)
    for name in values:
        if name.startswith("norm"):
            values[name] = values[name].float()
    check(op, values)
    for dtype in (torch.bfloat16, torch.float16):
        values = {
            name: value.to(dtype) if name.startswith(("qk", "fc1", "proj")) else value
            for name, value in arguments(op).items()
        }
        check(op, values, torch.bfloat16)


@pytest.mark.parametrize("op", INNER_OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients(op: str, dtype: torch.dtype) -> None:
    values = {
        n: v.requires_grad_() if isinstance(v, torch.Tensor) else v for n, v in arguments(op, dtype).items()
    }
    tensors = [v for v in values.values() if isinstance(v, torch.Tensor)]
    expected = torch.autograd.grad(
        getattr(reference, op)(**reference_arguments(op, values)).square().sum(), tensors
    )
    calls = [lambda: getattr(ops, op)(**values), lambda: operator(op)(*operator_arguments(op, values))]
    for call in calls:
        actual = torch.autograd.grad(call().square().sum(), tensors)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gradient_of_one_parameter_alone(needs_native: None) -> None:
    values = arguments("inner_block")
    assert ops.inner_block(**values).grad_fn is None
    values["fc2_bias"].requires_grad_()
    out = ops.inner_block(**values)
    out.sum().backward()
    torch.testing.assert_close(values["fc2_bias"].grad, torch.full((24,), 12.0 * 16))


def test_float64_takes_the_reference_path() -> None:
    values = arguments("inner_block", torch.float64)
    with torch.no_grad():
        _, exact = eager_and_exact("inner_block", values)
        assert torch.equal(ops.inner_block(**values), exact)
        with use_backend("cpu"), pytest.raises(RuntimeError, match=r"float64"):
            ops.inner_block(**values)
        direct = operator("inner_block")(*operator_arguments("inner_block", values))
    assert torch.equal(direct, exact)


@pytest.mark.parametrize("precision", ["bfloat16", "autocast_bfloat16", "autocast_float16"])
@pytest.mark.parametrize("op", INNER_OPS)
def test_operator_with_compute_dtype_and_gradients(op: str, precision: str) -> None:
    """A direct call that needs gradients is computed in compute_dtype by PyTorch."""
    dtype, compute = PRECISIONS[precision]
    values = arguments(op, dtype)
    eager, exact = eager_and_exact(op, values, compute)
    values["x"].requires_grad_()
    out = operator(op)(*operator_arguments(op, values, compute))
    assert out.requires_grad
    assert out.dtype == dtype
    assert_as_accurate(out.detach(), eager, exact)


def test_operator_computes_bfloat16_words_in_float32(needs_native: None) -> None:
    values = arguments("inner_block", torch.bfloat16)
    wide = {n: v.float() if isinstance(v, torch.Tensor) else v for n, v in values.items()}
    expected = run("inner_block", wide, backend="reference").bfloat16()
    for grad in (False, True):
        values["x"].requires_grad_(grad)
        out = operator("inner_block")(*operator_arguments("inner_block", values, torch.float32))
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.detach(), expected, rtol=2**-7, atol=1e-3)


BAD = [
    ("inner_block", {"x": [1.0]}, TypeError, "x must be a tensor .*list"),
    (
        "inner_block",
        {"x": torch.ones(16, 24)},
        ValueError,
        r"x must be a tensor of shape \[sentences.*\[16, 24\]",
    ),
    ("inner_block", {"x": torch.ones(2, 16, 24).int()}, ValueError, "x must be of dtype float32.*int32"),
    (
        "inner_block",
        {"x": torch.ones(2, 16, 25)},
        ValueError,
        "num_heads must be a positive divisor of the 25",
    ),
    (
        "inner_block",
        {"x": torch.ones(2, 16, 28)},
        ValueError,
        r"norm1_weight must be of shape \[28\], got shape \[24\]",
    ),
    ("inner_block", {"x": torch.ones(2, 0, 24)}, ValueError, "x must be of at least one word"),
    (
        "inner_block",
        {"x": torch.ones(2, 16, 0)},
        ValueError,
        "x must be of at least one word and one channel",
    ),
    (
        "inner_block",
        {"x": torch.ones(2, 16, 24).double()},
        ValueError,
        "norm1_weight must be of dtype .*float64",
    ),
    ("inner_block", {"x": torch.ones(2, 16, 24).half()}, ValueError, "qk_weight must be of dtype .*float16"),
    ("inner_block", {"num_heads": 5}, ValueError, "num_heads must be a positive divisor of the 24 .*5"),
    ("inner_block", {"num_heads": 0}, ValueError, "num_heads must be .*0"),
    ("inner_block", {"num_heads": -4}, ValueError, "num_heads must be .*-4"),
    ("inner_block", {"num_heads": 4.0}, ValueError, r"num_heads must be .*4\.0"),
    (
        "inner_block",
        {"norm1_weight": None},
        TypeError,
        r"norm1_weight must be a tensor of shape \[24\], got NoneType",
    ),
    (
        "inner_block",
        {"norm2_bias": torch.ones(23)},
        ValueError,
        r"norm2_bias must be of shape \[24\], got shape \[23\]",
    ),
    (
        "inner_block",
        {"qk_weight": torch.ones(24, 48)},
        ValueError,
        r"qk_weight must be of shape \[48, 24\], .*\[24, 48\]",
    ),
    (
        "inner_block",
        {"qk_bias": torch.ones(24)},
        ValueError,
        r"qk_bias must be of shape \[48\], got shape \[24\]",
    ),
    (
        "inner_block",
        {"v_bias": 3.0},
        TypeError,
        r"v_bias must be None or a tensor of shape \[24\], got float",
    ),
    (
        "inner_block",
        {"v_weight": torch.ones(24, 24, device="meta")},
        ValueError,
        "v_weight must be on cpu .*meta",
    ),
    (
        "inner_block",
        {"proj_weight": torch.ones(24, 24).double()},
        ValueError,
        "proj_weight must be of dtype .*float64",
    ),
    (
        "inner_block",
        {"fc1_weight": torch.ones(24)},
        ValueError,
        r"fc1_weight must be of shape \[hidden, 24\].*\[24\]",
    ),
    (
        "inner_block",
        {"fc1_weight": torch.ones(0, 24)},
        ValueError,
        r"fc1_weight must be .*at least one hidden unit.*\[0, 24\]",
    ),
    (
        "inner_block",
        {"fc1_weight": torch.ones(95, 24)},
        ValueError,
        r"fc2_weight must be of shape \[24, 95\]",
    ),
    ("inner_block", {"fc1_bias": torch.ones(96, device="meta")}, ValueError, "fc1_bias must be on cpu"),
    ("inner_block", {"fc2_weight": None}, TypeError, "fc2_weight must be a tensor"),
    ("inner_attention", {"x": torch.ones(24)}, ValueError, "inner_attention: x must be a tensor of shape"),
    (
        "inner_attention",
        {"norm_weight": torch.ones(1)},
        ValueError,
        r"inner_attention: norm_weight must be of shape \[24\]",
    ),
    ("inner_attention", {"num_heads": 7}, ValueError, "inner_attention: num_heads"),
    ("inner_mlp", {"x": torch.ones(2, 16, 24).long()}, ValueError, "inner_mlp: x must be of dtype"),
    (
        "inner_mlp",
        {"fc1_weight": None},
        TypeError,
        r"inner_mlp: fc1_weight must be a tensor of shape \[hidden, 24\]",
    ),
    ("inner_mlp", {"fc2_bias": torch.ones(25)}, ValueError, r"inner_mlp: fc2_bias must be of shape \[24\]"),
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("op", "change", "error", "message"), BAD)
def test_bad_arguments(
    op: str, change: dict[str, Any], error: type[Exception], message: str, backend: str
) -> None:
    for autocast in (None, torch.bfloat16):
        if autocast is not None and "dtype" in message and "float64" not in message:
            continue  # autocast brings every parameter to its own dtype
        with pytest.raises(error, match=message):
            run(op, {**arguments(op), **change}, autocast, backend)


@pytest.mark.parametrize(
    ("op", "change", "error", "message"),
    [case for case in BAD if all(isinstance(v, torch.Tensor) for v in case[1].values())],
)
def test_bad_arguments_of_the_operator(
    op: str, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    values = operator_arguments(
        op, {**arguments(op), "scale": 0.5, **change} if op != "inner_mlp" else {**arguments(op), **change}
    )
    with pytest.raises(error, match=message):
        operator(op)(*values)
    if "on cpu" not in message:
        meta = [v.to("meta") if isinstance(v, torch.Tensor) else v for v in values]
        with pytest.raises(error, match=message):
            operator(op)(*meta)


@pytest.mark.parametrize("compute_dtype", [torch.float64, torch.int32])
def test_bad_compute_dtype_of_the_operator(compute_dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"compute_dtype must be None, float32, bfloat16 or float16"):
        operator("inner_block")(*operator_arguments("inner_block", arguments("inner_block"), compute_dtype))
