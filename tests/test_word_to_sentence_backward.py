"""Gradients of word_to_sentence: accuracy on every SIMD tier, and what is asked of a backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradients import check_gradients, gradients, tensors_of
from hypothesis import given, settings
from hypothesis import strategies as st
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
from test_word_to_sentence import KINDS, LAYOUTS, sentence_arguments

from tnt_kernels import native, ops
from tnt_kernels._autograd import tensor_positions
from tnt_kernels.backends import reference

OP = "word_to_sentence"
TENSORS = 8  # of the operator, present or not


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


def given_tensors(values: dict[str, Any]) -> list[str]:
    return [name for name in tensors_of(values) if values[name] is not None]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "c", "d"), [(16, 24, 384), (16, 40, 100), (9, 13, 65)])
def test_accuracy(tier: str, m: int, c: int, d: int, kind: str, precision: str) -> None:
    dtype, autocast = PRECISIONS[precision]
    check_gradients(OP, sentence_arguments(3, 11, m, c, d, dtype, **KINDS[kind]), autocast)


@pytest.mark.parametrize(("c", "d"), [(40, 640), (48, 768)])
@pytest.mark.parametrize("precision", ["float32", "autocast_bfloat16"])
def test_accuracy_of_wide_models(tier: str, c: int, d: int, precision: str) -> None:
    dtype, autocast = PRECISIONS[precision]
    check_gradients(OP, sentence_arguments(1, 49, 16, c, d, dtype), autocast)


@pytest.mark.parametrize("n", [1, 7, 15, 16, 17, 33, 196])
@pytest.mark.parametrize("batch", [1, 3])
def test_sentence_counts(tier: str, batch: int, n: int) -> None:
    """Blocks of sentences that are not full, end inside an image or go on in the next one."""
    check_gradients(OP, sentence_arguments(batch, n, 4, 24, 96, bias=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "c", "d"), [(1, 7, 3), (5, 3, 17), (2, 31, 33), (3, 16, 130)])
def test_odd_sizes(tier: str, m: int, c: int, d: int, kind: str) -> None:
    check_gradients(OP, sentence_arguments(5, 13, m, c, d, **KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_long_sums(tier: str, kind: str) -> None:
    """More sentences than are held at a time, the last ones filling no block."""
    check_gradients(OP, sentence_arguments(11, 197, 4, 6, 40, **KINDS[kind]))


def test_more_sentences_than_a_grid_axis_holds(needs_native: None) -> None:
    torch.set_num_threads(2)
    check_gradients(OP, sentence_arguments(335, 196, 2, 6, 16))


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Any], torch.dtype | None, int]:
    m, c, d = draw(st.integers(1, 20)), draw(st.integers(6, 50)), draw(st.integers(16, 130))
    n = draw(st.integers(1, 40))
    dtype, autocast = PRECISIONS[draw(st.sampled_from(list(PRECISIONS)))]
    torch.manual_seed(draw(st.integers(0, 2**16)))
    options = {name: draw(st.booleans()) for name in ("per_word", "bias", "norm2")}
    values = sentence_arguments(4096 // (n * d) + 1, n, m, c, d, dtype, **options)
    return values, autocast, draw(st.integers(1, 3))


@settings(max_examples=25)
@given(call=calls())
def test_any_call(tier: str, call: tuple[dict[str, Any], torch.dtype | None, int]) -> None:
    values, autocast, threads = call
    torch.set_num_threads(threads)
    check_gradients(OP, values, autocast)


@pytest.mark.parametrize(
    ("words", "tokens", "autocast"),
    [
        (torch.bfloat16, torch.float32, None),
        (torch.float16, torch.float32, None),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_mixed_streams(
    tier: str, words: torch.dtype, tokens: torch.dtype, autocast: torch.dtype | None
) -> None:
    check_gradients(OP, sentence_arguments(3, 11, dtype=words, tokens_dtype=tokens), autocast)


def test_words_with_a_large_mean(tier: str) -> None:
    values = sentence_arguments(3, 50)
    values["words"] += 1000.0
    check_gradients(OP, values)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_expanded_tokens(tier: str, precision: str) -> None:
    """The stem: class token and positions are expanded, and autograd sums their gradient."""
    dtype, autocast = PRECISIONS[precision]
    values = sentence_arguments(5, 7, dtype=dtype, bias=True)
    one = values.pop("tokens")[:1]
    grad = randn(5, 8, 96, dtype=dtype)

    def stem(one: torch.Tensor, **others: Any) -> torch.Tensor:
        return ops.word_to_sentence(tokens=one.expand(5, -1, -1), **others)

    found = gradients(stem, {"one": one, **values}, grad, autocast=autocast)
    torch.testing.assert_close(found["one"], grad.sum(0, keepdim=True))
    whole = backward(grad, {"tokens": one.expand(5, -1, -1), **values}, autocast)
    assert torch.equal(whole[1], grad)


def test_gradient_of_the_tokens_is_a_tensor_of_its_own(needs_native: None) -> None:
    values = sentence_arguments()
    grad = randn(2, 7, 96)
    found = backward(grad, values)[1]
    assert torch.equal(found, grad)
    assert found.data_ptr() != grad.data_ptr()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["words", "grad"])
def test_layouts(name: str, layout: str, needs_native: None) -> None:
    values, grad = sentence_arguments(), randn(2, 7, 96)
    if name == "words":
        values["words"] = LAYOUTS[layout](values["words"])
    else:
        grad = LAYOUTS[layout](grad)
    plain = {n: v.contiguous() if isinstance(v, torch.Tensor) else v for n, v in values.items()}
    for ours, expected in zip(backward(grad, values), backward(grad.contiguous(), plain), strict=True):
        assert ours.is_contiguous()
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("precision", ["float32", "autocast_bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_for_every_number_of_threads(tier: str, kind: str, precision: str) -> None:
    dtype, autocast = PRECISIONS[precision]
    values = sentence_arguments(7, 197, 4, 6, 100, dtype, **KINDS[kind])
    grad = randn(7, 198, 100)
    runs = []
    for threads in (1, 2, 3, 5, 40, 2):
        torch.set_num_threads(threads)
        runs.append(backward(grad, values, autocast))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "autocast_bfloat16"])
def test_only_what_is_asked_for(tier: str, kind: str, precision: str) -> None:
    """Each gradient alone, and all but each, have the bits that they have among all."""
    dtype, autocast = PRECISIONS[precision]
    values = sentence_arguments(3, 11, dtype=dtype, **KINDS[kind])
    grad = randn(3, 12, 96)
    names = given_tensors(values)
    whole = gradients(ops.word_to_sentence, values, grad, autocast=autocast)
    for name in names:
        for wanted in ([name], [other for other in names if other != name]):
            found = gradients(ops.word_to_sentence, values, grad, autocast=autocast, wanted=wanted)
            assert list(found) == wanted
            assert all(torch.equal(found[n], whole[n]) for n in wanted), (name, wanted)


def test_nothing_asked_for(needs_native: None) -> None:
    assert backward(randn(2, 7, 96), sentence_arguments(), needed=[False] * TENSORS) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_special_values(tier: str, kind: str, value: float, precision: str) -> None:
    dtype, autocast = PRECISIONS[precision]
    for name in ("words", "grad"):
        values = sentence_arguments(dtype=dtype, **KINDS[kind])
        grad = randn(2, 7, 96, dtype=dtype)
        (values["words"][7, 3] if name == "words" else grad[1, 2])[5] = value
        eager = gradients(
            reference.word_to_sentence, reference_arguments(OP, values), grad, autocast=autocast
        )
        ours = gradients(ops.word_to_sentence, values, grad, autocast=autocast)
        for key in ours:
            # Which are NaN and which infinite hangs on the order of the terms.
            assert torch.equal(ours[key].isfinite(), eager[key].isfinite()), key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 17])
def test_infinite_parameters_and_no_eps(tier: str, kind: str, n: int) -> None:
    """Lanes without a sentence must not make NaN of what is none in eager PyTorch."""
    for name in ("norm1_weight", "norm1_bias", "weight", "norm2_weight"):
        values = sentence_arguments(1, n, **KINDS[kind])
        if values[name] is None:
            continue
        values[name].view(-1)[3] = float("inf")
        grad = randn(1, n + 1, 96)
        eager = gradients(reference.word_to_sentence, reference_arguments(OP, values), grad)
        ours = gradients(ops.word_to_sentence, values, grad)
        for key in ours:
            if key == "words" or name == "norm2_weight":  # NaN or infinity hangs on the order of the terms
                assert torch.equal(ours[key].isfinite(), eager[key].isfinite()), (name, key)
            else:
                assert_same_special_values(ours[key], eager[key])
    values = {**sentence_arguments(1, n, **KINDS[kind]), "eps1": 0.0, "eps2": 0.0}
    assert all(
        g.isfinite().all() for g in gradients(ops.word_to_sentence, values, randn(1, n + 1, 96)).values()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    values = sentence_arguments(2, 3, 4, 3, 5, torch.float64, **KINDS[kind])
    names = given_tensors(values)
    tensors = [values[name].requires_grad_() for name in names]

    def public(*args: torch.Tensor) -> torch.Tensor:
        return ops.word_to_sentence(**{**values, **dict(zip(names, args, strict=True))})

    def registered(*args: torch.Tensor) -> torch.Tensor:
        return operator(OP)(*operator_arguments(OP, {**values, **dict(zip(names, args, strict=True))}))

    for function in (public, registered):
        assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(registered, tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_opcheck(kind: str, precision: str) -> None:
    dtype, compute = PRECISIONS[precision]
    args = operator_arguments(OP, sentence_arguments(dtype=dtype, **KINDS[kind]), compute)
    needed = [args[i] is not None for i in tensor_positions(operator(OP))]
    torch.library.opcheck(operator(f"{OP}_backward"), (randn(2, 7, 96, dtype=dtype), needed, *args))


def test_opcheck_in_float64() -> None:
    args = operator_arguments(OP, arguments(OP, torch.float64))
    torch.library.opcheck(
        operator(f"{OP}_backward"), (randn(2, 7, 48, dtype=torch.float64), [True] * TENSORS, *args)
    )


def test_inputs_alone_are_kept(needs_native: None) -> None:
    values = {name: value.requires_grad_() for name, value in arguments(OP).items()}
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda x: x):
        ops.word_to_sentence(**values)
    assert saved
    assert {t.data_ptr() for t in saved} <= {value.data_ptr() for value in values.values()}


@pytest.mark.parametrize("kind", KINDS)
def test_no_images(kind: str, needs_native: None) -> None:
    values = sentence_arguments(**KINDS[kind])
    values["words"], values["tokens"] = values["words"][:0], values["tokens"][:0]
    found = gradients(ops.word_to_sentence, values, randn(0, 7, 96))
    for name, gradient in found.items():
        assert gradient.shape == values[name].shape
        assert not gradient.any()


def test_arguments_stay_as_they_are(tier: str) -> None:
    values, grad = sentence_arguments(bias=True), randn(2, 7, 96)
    copies, of_grad = {n: v.clone() for n, v in values.items()}, grad.clone()
    backward(grad, values)
    assert torch.equal(grad, of_grad)
    assert all(torch.equal(values[n], copies[n]) for n in values)


def test_wrong_gradient_is_refused(needs_native: None) -> None:
    for grad in (randn(2, 6, 48), randn(2, 7, 48, dtype=torch.bfloat16), randn(14, 48)):
        with pytest.raises(
            ValueError, match=r"word_to_sentence_backward: grad must be torch[.]float32 of shape \[2, 7, 48\]"
        ):
            backward(grad, arguments(OP))


def test_bad_arguments_are_refused(needs_native: None) -> None:
    values = {**arguments(OP), "weight": randn(48, 383)}
    with pytest.raises(ValueError, match=r"word_to_sentence: weight must be of shape \[48, 384\]"):
        backward(randn(2, 7, 48), values, needed=[True] * TENSORS)


def test_forward_is_what_it_was(tier: str) -> None:
    """A call that is recorded for autograd gives the bits of one that is not."""
    values = sentence_arguments(bias=True)
    expected = run(OP, values)
    values["words"].requires_grad_()
    assert torch.equal(ops.word_to_sentence(**values).detach(), expected)


def test_native_function_checks_what_it_gets(needs_native: None) -> None:
    module = native.load()
    assert module is not None
    x, grad = torch.ones(2 * 6 * 4), torch.ones(2 * 4 * 5)
    parameters = list(sentence_arguments(2, 3, 2, 2, 5, bias=True).values())[2:]

    def call(**change: Any) -> None:
        values = {
            "grad": grad.data_ptr(), "grad_dtype": 0, "words": x.data_ptr(), "words_dtype": 0,
            "grad_words": 0, "batch": 2, "n": 3, "m": 2, "c": 2, "d": 5, "norm1_size": 4,
            "weights": [p.data_ptr() for p in parameters], "weight_dtypes": [0] * 6, "grads": [0] * 6,
            "eps1": 1e-5, "eps2": 1e-5, "compute_dtype": 0, "threads": 1,
        }  # fmt: skip
        module.word_to_sentence_backward(**{**values, **change})

    call()
    call(batch=0, grad=0, words=0)
    no_norm2 = [p.data_ptr() for p in parameters[:4]] + [0, 0]
    for change, message in (
        ({"grad": 0}, "grad must not be null"),
        ({"words": 0}, "words must not be null"),
        ({"grads": [0] * 5}, "six pointers"),
        ({"weights": no_norm2, "grads": [0, 0, 0, 0, 0, x.data_ptr()]}, "a norm2 that is absent"),
        ({"weights": [0] * 6}, "weight is needed"),
        ({"weights": []}, "got 0 parameter pointers"),
        ({"norm1_size": 3}, "norm1 must normalise"),
        ({"grad_dtype": 2}, "dtype code 2"),
        ({"compute_dtype": -1}, "dtype code -1"),
        ({"threads": 0}, "threads >= 1"),
        ({"batch": -1}, "batch >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**change)
