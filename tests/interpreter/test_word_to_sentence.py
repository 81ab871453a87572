"""Word to sentence on GPUs, forward and backward, in Triton's interpreter.

In float32 and float16: the interpreter multiplies bfloat16 matrices wrongly.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradients import assert_gradients_as_accurate, eager_and_exact_gradients
from oracle import (
    assert_as_accurate,
    assert_same_special_values,
    eager_and_exact,
    operator_arguments,
    randn,
    sentence_parameters,
)
from torch import Tensor

from tnt_kernels.backends.reference import word_to_sentence_in
from tnt_kernels.backends.triton import runtime
from tnt_kernels.backends.triton.configs import Config, forced
from tnt_kernels.backends.triton.word_to_sentence import word_to_sentence
from tnt_kernels.backends.triton.word_to_sentence_backward import word_to_sentence_backward

OP = "word_to_sentence"
TENSORS = ("words", "tokens", "norm1_weight", "norm1_bias", "weight", "bias", "norm2_weight", "norm2_bias")
KINDS = {
    "tnt": {},
    "stem": {"bias": True},
    "legacy": {"per_word": True, "bias": True, "norm2": False},
    "legacy_norm2": {"per_word": True, "bias": True},
    "plain": {"norm2": False},
}
SIZES = [(16, 24, 192), (9, 10, 48), (16, 12, 80), (5, 7, 208)]  # words, channels of a word and of a token
WIDE = [(2, 40, 640), (1, 3, 1024), (33, 40, 16)]


def sentence_arguments(
    batch: int, n: int, m: int, c: int, d: int, mean: float = 0.0, **options: Any
) -> dict[str, Any]:
    dtype = options.get("dtype", torch.float32)
    return {
        "words": randn(batch * n, m, c, mean=mean, dtype=dtype),
        "tokens": randn(batch, n + 1, d, dtype=dtype),
        **sentence_parameters(m, c, d, **options),
    }


def run(values: dict[str, Any]) -> Tensor:
    return word_to_sentence(*operator_arguments(OP, values))


def check(values: dict[str, Any]) -> None:
    eager, exact = eager_and_exact(OP, values)
    ours = run(values)
    assert ours.is_contiguous()
    assert_as_accurate(ours, eager, exact)
    assert torch.equal(ours[:, 0], values["tokens"][:, 0])


def backward(values: dict[str, Any], grad: Tensor, wanted: list[str] | None = None) -> dict[str, Tensor]:
    """The gradients of the tensors named, or of all."""
    names = [name for name in TENSORS if values[name] is not None and (wanted is None or name in wanted)]
    needed = [name in names for name in TENSORS]
    found = word_to_sentence_backward(grad, needed, *operator_arguments(OP, values))
    return dict(zip(names, found, strict=True))


def check_backward(values: dict[str, Any]) -> dict[str, Tensor]:
    grad = torch.randn(values["tokens"].shape).to(values["tokens"].dtype)
    ours = backward(values, grad)
    assert_gradients_as_accurate(ours, *eager_and_exact_gradients(OP, values, grad))
    assert all(gradient.is_contiguous() for gradient in ours.values())
    return ours


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "c", "d"), SIZES)
def test_forward(m: int, c: int, d: int, kind: str) -> None:
    check(sentence_arguments(3, 13, m, c, d, **KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "c", "d"), SIZES)
def test_backward(m: int, c: int, d: int, kind: str) -> None:
    check_backward(sentence_arguments(3, 13, m, c, d, **KINDS[kind]))


@pytest.mark.parametrize(("m", "c", "d"), WIDE)
def test_wide_and_narrow(m: int, c: int, d: int) -> None:
    check(sentence_arguments(1, 17, m, c, d, bias=True))
    check_backward(sentence_arguments(1, 17, m, c, d, bias=True))


@pytest.mark.parametrize(("batch", "n"), [(1, 1), (37, 1), (1, 33), (5, 7), (2, 32), (1, 65)])
def test_sentence_counts(batch: int, n: int) -> None:
    """Tiles that are not full, that hold one image or many, and images that begin inside of a tile."""
    check(sentence_arguments(batch, n, 4, 6, 48))
    check_backward(sentence_arguments(batch, n, 4, 6, 48, bias=True))


@pytest.mark.parametrize("rows", [16, 64, 128])
def test_every_number_of_rows(rows: int) -> None:
    values = sentence_arguments(3, 45, 4, 6, 80, bias=True)
    with forced(f"{OP} large", Config(rows, 4)), forced(f"{OP}_backward", Config(rows, 4)):
        check(values)
        check_backward(values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mean", [10.0, 1000.0])
def test_words_with_a_large_mean(mean: float, kind: str) -> None:
    check(sentence_arguments(3, 13, 16, 24, 96, mean, **KINDS[kind]))
    check_backward(sentence_arguments(3, 13, 16, 24, 96, mean, **KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_float16(mean: float, kind: str) -> None:
    values = sentence_arguments(3, 25, 16, 24, 96, mean, dtype=torch.float16, **KINDS[kind])
    check(values)
    check_backward(values)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_tokens_of_float16_products(kind: str) -> None:
    """As under autocast: words, tokens and parameters are float32."""
    values = sentence_arguments(3, 25, 16, 24, 96, **KINDS[kind])
    eager = word_to_sentence_in(*operator_arguments(OP, values, torch.float16))
    ours = word_to_sentence(*operator_arguments(OP, values, torch.float16))
    _, exact = eager_and_exact(OP, values)
    assert ours.dtype == torch.float32
    assert_as_accurate(ours, eager, exact)


def test_tokens_of_one_image_serve_the_batch() -> None:
    """The stem: class token and positions, expanded."""
    values = sentence_arguments(5, 7, 4, 6, 48, bias=True)
    values["tokens"] = values["tokens"][:1].expand(5, -1, -1)
    check(values)
    assert torch.equal(run(values), run({**values, "tokens": values["tokens"].contiguous()}))
    grad = torch.randn(5, 8, 48)
    found = backward(values, grad)["tokens"]
    assert torch.equal(found, grad)
    assert found.data_ptr() != grad.data_ptr()


def test_any_layout() -> None:
    values = sentence_arguments(3, 5, 4, 6, 48, bias=True)
    grad = torch.randn(3, 6, 48)
    spread = {
        name: value.repeat_interleave(2, dim=-1)[..., ::2] if isinstance(value, Tensor) else value
        for name, value in values.items()
    }
    assert not spread["weight"].is_contiguous()
    assert torch.equal(run(spread), run(values))
    expected = backward(values, grad)
    found = backward(spread, grad.transpose(0, 2).contiguous().transpose(0, 2))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_asked_for(kind: str) -> None:
    """Each gradient alone, and all but each, have the bits that they have among all."""
    values, grad = sentence_arguments(2, 9, 4, 6, 48, **KINDS[kind]), torch.randn(2, 10, 48)
    whole = backward(values, grad)
    assert backward(values, grad, []) == {}
    for name in whole:
        for wanted in ([name], [other for other in whole if other != name]):
            found = backward(values, grad, wanted)
            assert sorted(found) == sorted(wanted)
            assert all(torch.equal(found[n], whole[n]) for n in wanted), (name, wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_special_values(kind: str, value: float) -> None:
    for name in ("words", "tokens", "grad"):
        values, grad = sentence_arguments(2, 6, 4, 6, 48, **KINDS[kind]), torch.randn(2, 7, 48)
        {**values, "grad": grad}[name].view(-1, 6)[7, 5] = value
        eager, exact = eager_and_exact(OP, values)
        assert_as_accurate(run(values), eager, exact)
        eager_gradients, _ = eager_and_exact_gradients(OP, values, grad)
        for key, ours in backward(values, grad).items():
            # Which are NaN and which infinite hangs on the order of the terms.
            assert torch.equal(ours.isfinite(), eager_gradients[key].isfinite()), (name, key)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_beyond_the_last_add_nothing(kind: str) -> None:
    """They hold no number where eps is zero, or a parameter infinite."""
    values = {**sentence_arguments(1, 5, 4, 6, 48, **KINDS[kind]), "eps1": 0.0, "eps2": 0.0}
    check(values)
    check_backward(values)
    values["norm1_bias"][3] = float("inf")
    grad = torch.randn(1, 6, 48)
    eager, _ = eager_and_exact(OP, values)
    assert_same_special_values(run(values), eager)
    eager_gradients, _ = eager_and_exact_gradients(OP, values, grad)
    for key, ours in backward(values, grad).items():
        assert torch.equal(ours.isfinite(), eager_gradients[key].isfinite()), key


def test_no_images() -> None:
    values = sentence_arguments(0, 6, 4, 6, 48, bias=True)
    assert run(values).shape == (0, 7, 48)
    for name, gradient in backward(values, torch.randn(0, 7, 48)).items():
        assert gradient.shape == values[name].shape
        assert not gradient.any()


@pytest.mark.parametrize("d", [40, 1040])
def test_other_widths_are_left_to_plain_pytorch(d: int) -> None:
    values = sentence_arguments(1, 3, 2, 6, d)
    assert torch.equal(run(values), eager_and_exact(OP, values)[0])
    check_backward(values)


def test_float64_is_left_to_plain_pytorch() -> None:
    values = {
        n: v.double() if isinstance(v, Tensor) else v for n, v in sentence_arguments(1, 3, 2, 6, 48).items()
    }
    assert torch.equal(run(values), eager_and_exact(OP, values)[1])


@pytest.mark.parametrize(("words", "tokens", "compute"), [
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32, None),
    (torch.float32, torch.float16, torch.float16),
])  # fmt: skip
def test_products_are_in_the_compute_dtype(
    words: torch.dtype, tokens: torch.dtype, compute: torch.dtype | None
) -> None:
    """What is launched, for the interpreter does not multiply 16-bit matrices right."""
    values = sentence_arguments(1, 3, 2, 8, 48, dtype=torch.float32 if compute else words)
    meta = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in values.items()}
    meta["words"], meta["tokens"] = meta["words"].to(words), meta["tokens"].to(tokens)
    arguments = operator_arguments(OP, meta, compute)
    with runtime.recording(90) as launches:
        out = word_to_sentence(*arguments)
        needed = [argument is not None for argument in arguments[:8]]
        found = word_to_sentence_backward(torch.empty_like(out), needed, *arguments)
    assert out.dtype == tokens
    assert [gradient.dtype for gradient in found] == [a.dtype for a in arguments[:8] if a is not None]
    assert [launch.arguments["weight_ptr"].dtype for launch in launches[:2]] == [compute or words] * 2
    assert launches[1].arguments["dz_ptr"].dtype == (compute or words)


def test_wrong_gradient_is_refused() -> None:
    values = sentence_arguments(2, 6, 4, 6, 48)
    message = r"word_to_sentence_backward: grad must be torch[.]float32 of shape \[2, 7, 48\]"
    with pytest.raises(ValueError, match=message):
        backward(values, torch.randn(2, 6, 48))


def test_bad_arguments_are_refused() -> None:
    values = {**sentence_arguments(2, 6, 4, 6, 48), "weight": torch.randn(48, 25)}
    message = r"word_to_sentence: weight must be of shape \[48, 24\]"
    with pytest.raises(ValueError, match=message):
        run(values)
    with pytest.raises(ValueError, match=message):
        backward(values, torch.randn(2, 7, 48))
