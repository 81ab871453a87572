"""Gradients of inner_block and its halves: accuracy on every SIMD tier, and what is asked of a backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradients import check_gradients, drop_path_factors, gradients, tensors_of
from oracle import (
    PRECISIONS,
    arguments,
    attention_parameters,
    in_dtype,
    inner_parameters,
    mlp_parameters,
    operator,
    operator_arguments,
    randn,
)

from tnt_kernels import native, ops
from tnt_kernels._autograd import tensor_positions
from tnt_kernels.dispatch import use_backend

INNER_OPS = ("inner_attention", "inner_mlp", "inner_block")


def inner_arguments(
    op: str,
    s: int,
    m: int,
    c: int,
    heads: int = 1,
    hidden: int | None = None,
    dtype: torch.dtype = torch.float32,
    drop_path: bool = False,
    **options: Any,
) -> dict[str, Any]:
    values: dict[str, Any] = {"x": randn(s, m, c, dtype=dtype)}
    if op == "inner_mlp":
        values |= mlp_parameters(c, hidden, dtype=dtype, **options)
    elif op == "inner_attention":
        values |= {**attention_parameters(c, dtype=dtype, **options), "num_heads": heads}
    else:
        values |= {**inner_parameters(c, hidden, dtype=dtype, **options), "num_heads": heads}
    if drop_path:
        names = ("drop_path1", "drop_path2") if op == "inner_block" else ("drop_path",)
        values |= {name: drop_path_factors(s) for name in names}
    return values


def given_tensors(values: dict[str, Any]) -> list[str]:
    return [name for name in tensors_of(values) if values[name] is not None]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("c", "heads"), [(24, 4), (40, 4), (48, 4), (12, 2), (33, 3)])
@pytest.mark.parametrize("m", [16, 9, 49])
def test_accuracy(tier: str, m: int, c: int, heads: int, precision: str) -> None:
    dtype, autocast = PRECISIONS[precision]
    s = max(3, 4096 // (m * c)) | 1  # odd: the last group of sentences is not full
    values = inner_arguments("inner_block", s, m, c, heads, dtype=dtype, drop_path=True)
    check_gradients("inner_block", values, autocast)


@pytest.mark.parametrize("op", ["inner_attention", "inner_mlp"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("drop_path", [False, True])
def test_accuracy_of_halves(tier: str, op: str, precision: str, drop_path: bool) -> None:
    dtype, autocast = PRECISIONS[precision]
    check_gradients(op, inner_arguments(op, 13, 16, 24, 4, dtype=dtype, drop_path=drop_path), autocast)


@pytest.mark.parametrize("m", [1, 2, 15, 17, 33, 64])
@pytest.mark.parametrize(("c", "heads", "hidden"), [(7, 7, 5), (10, 5, 17), (30, 2, 31), (64, 1, 96)])
def test_odd_sizes(tier: str, m: int, c: int, heads: int, hidden: int) -> None:
    check_gradients("inner_block", inner_arguments("inner_block", 11, m, c, heads, hidden))


@pytest.mark.parametrize(("c", "heads", "hidden"), [(1, 1, 1), (2, 2, 3), (3, 3, 5)])
def test_hardly_any_channels(tier: str, c: int, heads: int, hidden: int) -> None:
    """LayerNorm of so few channels divides by next to nothing, for which eager is no measure either."""
    values = inner_arguments("inner_block", 5, 17, c, heads, hidden)
    grad = randn(5, 17, c)
    exact = gradients(ops.inner_block, in_dtype(values, torch.float64), grad.double())
    for name, gradient in gradients(ops.inner_block, values, grad).items():
        scale = exact[name].abs().max().item()
        torch.testing.assert_close(gradient.double(), exact[name], rtol=0, atol=1e-3 * scale + 1e-5)


@pytest.mark.parametrize("op", INNER_OPS)
def test_absent_biases(tier: str, op: str) -> None:
    options = {"bias": False} if op == "inner_mlp" else {"qkv_bias": False, "bias": False}
    check_gradients(op, inner_arguments(op, 7, 16, 24, 4, **options))


@pytest.mark.parametrize("op", INNER_OPS)
def test_long_sums(tier: str, op: str) -> None:
    """Several chunks of sentences, the last one not full."""
    check_gradients(op, inner_arguments(op, 333, 4, 8, 2, drop_path=True))


def test_more_sentences_than_a_grid_axis(needs_native: None) -> None:
    values = inner_arguments("inner_block", 65_601, 2, 16, 2)
    torch.set_num_threads(2)
    check_gradients("inner_block", values)


def test_gradient_of_any_layout(tier: str) -> None:
    values = inner_arguments("inner_block", 6, 16, 24, 4)
    grad = randn(6, 24, 16).transpose(1, 2)
    values["x"] = randn(12, 16, 24)[::2]
    values["fc1_weight"] = randn(24, 96).t()
    check_gradients("inner_block", values, grad=grad)
    check_gradients("inner_block", values, grad=randn(1).expand(6, 16, 24))


@pytest.mark.parametrize("op", INNER_OPS)
@pytest.mark.parametrize("precision", ["float32", "autocast_bfloat16"])
def test_the_same_bits_for_every_number_of_threads(tier: str, op: str, precision: str) -> None:
    dtype, autocast = PRECISIONS[precision]
    values = inner_arguments(op, 301, 16, 24, 4, dtype=dtype, drop_path=True)
    grad = randn(301, 16, 24)
    runs = []
    for threads in (1, 2, 3, 5, 2):
        torch.set_num_threads(threads)
        runs.append(gradients(getattr(ops, op), values, grad, autocast=autocast))
    for run in runs[1:]:
        assert all(torch.equal(run[name], runs[0][name]) for name in run)


@pytest.mark.parametrize("op", INNER_OPS)
def test_only_what_is_asked_for(tier: str, op: str) -> None:
    """Each gradient alone, and all but each, have the bits that they have among all."""
    values = inner_arguments(op, 9, 16, 24, 4, drop_path=True)
    grad = randn(9, 16, 24)
    names = given_tensors(values)
    whole = gradients(getattr(ops, op), values, grad)
    for name in names:
        for wanted in ([name], [other for other in names if other != name]):
            found = gradients(getattr(ops, op), values, grad, wanted=wanted)
            assert list(found) == wanted
            assert all(torch.equal(found[n], whole[n]) for n in wanted), (name, wanted)


@pytest.mark.parametrize("op", INNER_OPS)
def test_gradient_of_a_drop_path_factor(op: str, needs_native: None) -> None:
    values = inner_arguments(op, 5, 16, 24, 4, drop_path=True)
    name = "drop_path2" if op == "inner_block" else "drop_path"
    factors, x = values[name].requires_grad_(), values["x"].requires_grad_()
    ours = torch.autograd.grad(getattr(ops, op)(**values).square().sum(), [factors, x])
    with use_backend("reference"):
        theirs = torch.autograd.grad(getattr(ops, op)(**values).square().sum(), [factors, x])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_dropped_branch_has_no_gradient(tier: str) -> None:
    values = inner_arguments("inner_block", 5, 16, 24, 4)
    values["drop_path1"], values["drop_path2"] = torch.zeros(5), torch.zeros(5)
    grad = randn(5, 16, 24)
    found = gradients(ops.inner_block, values, grad)
    assert torch.equal(found.pop("x"), grad)
    assert all(not gradient.any() for gradient in found.values())


@pytest.mark.parametrize("op", INNER_OPS)
def test_input_alone_is_kept(op: str, needs_native: None) -> None:
    values = {
        name: value.requires_grad_() if isinstance(value, torch.Tensor) else value
        for name, value in arguments(op).items()
    }
    known = {value.data_ptr() for value in values.values() if isinstance(value, torch.Tensor)}
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda x: x):
        getattr(ops, op)(**values)
    assert saved
    assert {tensor.data_ptr() for tensor in saved} <= known


@pytest.mark.parametrize("op", INNER_OPS)
def test_special_values_stay_where_they_are(tier: str, op: str) -> None:
    for special in (float("nan"), float("inf")):
        values = inner_arguments(op, 5, 16, 24, 4)
        values["x"][2, 3, 5] = special
        eager_nan = gradients(getattr(ops, op), values, randn(5, 16, 24))["x"].isnan()
        assert eager_nan[2].any()
        assert not eager_nan[[0, 1, 3, 4]].any()


@pytest.mark.parametrize("op", INNER_OPS)
def test_gradcheck(op: str) -> None:
    values = inner_arguments(op, 3, 4, 6, 2, 8, dtype=torch.float64, drop_path=True)
    names = given_tensors(values)
    tensors = [values[name].requires_grad_() for name in names]

    def public(*args: torch.Tensor) -> torch.Tensor:
        return getattr(ops, op)(**{**values, **dict(zip(names, args, strict=True))})

    def registered(*args: torch.Tensor) -> torch.Tensor:
        return operator(op)(*operator_arguments(op, {**values, **dict(zip(names, args, strict=True))}))

    for function in (public, registered):
        assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(registered, tensors)


@pytest.mark.parametrize("op", INNER_OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(op: str, dtype: torch.dtype) -> None:
    values = arguments(op, dtype)
    args = operator_arguments(op, values)
    needed = [i < len(args) and args[i] is not None for i in tensor_positions(operator(op))]
    torch.library.opcheck(operator(f"{op}_backward"), (torch.randn_like(values["x"]), needed, *args))
    values = {n: v.requires_grad_() if isinstance(v, torch.Tensor) else v for n, v in values.items()}
    torch.library.opcheck(operator(op), operator_arguments(op, values))


def test_gradient_of_the_gradient(needs_native: None) -> None:
    values = inner_arguments("inner_block", 4, 16, 24, 4)
    x, weight = values["x"].requires_grad_(), values["fc1_weight"].requires_grad_()
    found = []
    for dtype in (torch.float32, torch.float64):
        cast = {n: v.to(dtype) if isinstance(v, torch.Tensor) else v for n, v in values.items()}
        (first,) = torch.autograd.grad(ops.inner_block(**cast).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), weight)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("s", [0, 1])
def test_few_sentences(tier: str, s: int) -> None:
    values = inner_arguments("inner_block", s, 16, 24, 4)
    found = gradients(ops.inner_block, values, randn(s, 16, 24))
    assert all(gradient.shape == values[name].shape for name, gradient in found.items())
    assert all(bool(gradient.any()) == (s > 0) for name, gradient in found.items() if name != "x")
    if s:
        check_gradients("inner_block", values)


def test_wrong_gradient_is_refused(needs_native: None) -> None:
    values = arguments("inner_block")
    args = operator_arguments("inner_block", values)
    needed = [True] * 15 + [False] * 3
    for grad in (randn(12, 16, 23), randn(12, 16, 24, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"inner_block_backward: grad must be torch[.]float32 of shape"):
            operator("inner_block_backward")(grad, needed, *args)


@pytest.mark.parametrize("op", INNER_OPS)
@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (torch.ones(11), "float32 of shape"),
        (torch.ones(12, 1), "float32 of shape"),
        (torch.ones(12, dtype=torch.bfloat16), r"got torch[.]bfloat16"),
        (0.5, "must be a tensor or None, got float"),
    ],
)
def test_wrong_drop_path_is_refused(op: str, factors: Any, message: str) -> None:
    name = "drop_path2" if op == "inner_block" else "drop_path"
    with pytest.raises((ValueError, TypeError), match=f"{op}: {name} .*{message}"):
        getattr(ops, op)(**{**arguments(op), name: factors})


def test_native_function_checks_what_it_gets(needs_native: None) -> None:
    module = native.load()
    assert module is not None

    def call(**change: Any) -> None:
        tensors = [torch.ones(4) for _ in range(14)]
        values = {
            "x": torch.ones(16).data_ptr(), "grad": torch.ones(16).data_ptr(), "grad_x": 0, "io_dtype": 0,
            "compute_dtype": 0, "sentences": 1, "m": 4, "c": 1, "hidden": 1, "heads": 1, "parts": 3,
            "scale": 1.0, "eps1": 1e-5, "eps2": 1e-5, "weights": [t.data_ptr() for t in tensors],
            "weight_dtypes": [0] * 14, "drop_path1": 0, "drop_path2": 0, "seed": 0,
            "drops": [0.0] * 4, "grads": [0] * 14, "threads": 1,
        }  # fmt: skip
        module.inner_block_backward(**{**values, **change})

    call()
    for change, message in (
        ({"grads": [0] * 13}, "a gradient, or 0, for each weight"),
        ({"grad": 0}, "x and grad must not be null"),
        ({"sentences": 0}, "sentences >= 1"),
        ({"drops": [0.0, 0.0, 0.0, 1.5]}, "rates of dropout must lie"),
        ({"drops": [0.0]}, "four rates of dropout"),
        ({"heads": 2}, "heads must divide c"),
        ({"weights": [0] * 14}, "qk, v and proj weights are needed"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**change)
