"""word_to_sentence: accuracy on every SIMD tier, both kinds of first LayerNorm, layouts, bad input."""

from __future__ import annotations

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
    check,
    eager_and_exact,
    operator,
    operator_arguments,
    randn,
    run,
    sentence_parameters,
)

OP = "word_to_sentence"


def sentence_arguments(
    batch: int = 2,
    n: int = 6,
    m: int = 16,
    c: int = 24,
    d: int = 96,
    dtype: torch.dtype = torch.float32,
    tokens_dtype: torch.dtype | None = None,
    **options: Any,
) -> dict[str, Any]:
    return {
        "words": randn(batch * n, m, c, dtype=dtype),
        "tokens": randn(batch, n + 1, d, dtype=tokens_dtype or dtype),
        **sentence_parameters(m, c, d, dtype=dtype, **options),
    }


KINDS = {
    "tnt": {},
    "stem": {"bias": True},
    "legacy": {"per_word": True, "bias": True, "norm2": False},
    "plain": {"norm2": False},
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "c", "d"), [(16, 24, 384), (16, 40, 100), (9, 13, 65)])
def test_accuracy(tier: str, m: int, c: int, d: int, kind: str, precision: str) -> None:
    dtype, autocast = PRECISIONS[precision]
    check(OP, sentence_arguments(3, 11, m, c, d, dtype, **KINDS[kind]), autocast)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 33, 196])
@pytest.mark.parametrize("batch", [1, 3])
def test_sentence_counts(tier: str, batch: int, n: int) -> None:
    """Blocks of sentences that end inside an image or go on in the next one."""
    check(OP, sentence_arguments(batch, n, 4, 24, 96))


def test_class_token_stays(tier: str) -> None:
    values = sentence_arguments()
    assert torch.equal(run(OP, values)[:, 0], values["tokens"][:, 0])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tokens_of_one_image_serve_the_batch(tier: str, precision: str) -> None:
    """The stem: class token and positions, expanded."""
    dtype, autocast = PRECISIONS[precision]
    values = sentence_arguments(5, 7, dtype=dtype, bias=True)
    values["tokens"] = values["tokens"][:1].expand(5, -1, -1)
    copied = run(OP, {**values, "tokens": values["tokens"].contiguous()}, autocast)
    assert torch.equal(run(OP, values, autocast), copied)
    check(OP, values, autocast)


LAYOUTS = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every_second": lambda x: x.repeat_interleave(2, dim=2)[..., ::2],
    "rows_apart": lambda x: torch.cat([x, x], dim=2)[..., : x.shape[2]],
    "images_apart": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "expanded_rows": lambda x: x[:, :1].expand(x.shape),
    "expanded_width": lambda x: x[..., :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["words", "tokens"])
def test_layouts(name: str, layout: str, needs_native: None) -> None:
    values = sentence_arguments()
    values[name] = LAYOUTS[layout](values[name])
    expected = run(OP, {**values, name: values[name].contiguous()})
    assert torch.equal(run(OP, values), expected)


def test_words_with_a_large_mean(tier: str) -> None:
    values = sentence_arguments(3, 11)
    values["words"] += 1000.0
    check(OP, values)
    values = sentence_arguments(3, 11)
    values["weight"] += 100.0 / values["weight"].shape[1]  # a large mean before the second LayerNorm
    check(OP, values)


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
    out = check(OP, sentence_arguments(3, 11, dtype=words, tokens_dtype=tokens), autocast)
    assert out.dtype == tokens


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Any], torch.dtype | None, int]:
    m, c, d = draw(st.integers(1, 20)), draw(st.integers(6, 50)), draw(st.integers(16, 130))
    n = draw(st.integers(1, 40))
    dtype, autocast = PRECISIONS[draw(st.sampled_from(list(PRECISIONS)))]
    torch.manual_seed(draw(st.integers(0, 2**16)))
    options = {name: draw(st.booleans()) for name in ("per_word", "bias", "norm2")}
    values = sentence_arguments(4096 // (n * d) + 1, n, m, c, d, dtype, **options)
    if draw(st.booleans()):
        values["words"] = LAYOUTS["transposed"](values["words"])
    if draw(st.booleans()):
        values["tokens"] = values["tokens"][:1].expand(values["tokens"].shape)
    return values, autocast, draw(st.integers(1, 3))


@settings(max_examples=25)
@given(call=calls())
def test_any_call(tier: str, call: tuple[dict[str, Any], torch.dtype | None, int]) -> None:
    values, autocast, threads = call
    torch.set_num_threads(threads)
    check(OP, values, autocast)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_images(backend: str) -> None:
    values = sentence_arguments()
    values["words"], values["tokens"] = values["words"][:0], values["tokens"][:0]
    assert run(OP, values, backend=backend).shape == (0, 7, 96)


def test_more_sentences_than_a_grid_axis_holds(needs_native: None) -> None:
    torch.set_num_threads(2)
    check(OP, sentence_arguments(335, 196, 2, 6, 16))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_special_values(tier: str, kind: str, value: float, precision: str) -> None:
    dtype, autocast = PRECISIONS[precision]
    for name, at in (("words", (7, 3, 5)), ("tokens", (1, 2, 3)), ("tokens", (0, 0, 1))):
        values = sentence_arguments(dtype=dtype, **KINDS[kind])
        values[name][at] = value
        eager = run(OP, values, autocast, backend="reference")
        assert_same_special_values(run(OP, values, autocast), eager)


@pytest.mark.parametrize("name", list(sentence_parameters(2, 2, 2)))
def test_special_values_in_parameters(tier: str, name: str) -> None:
    for value in (float("nan"), float("inf")):
        values = sentence_arguments(bias=True)
        values[name].view(-1)[3] = value
        assert_same_special_values(run(OP, values), run(OP, values, backend="reference"))


@pytest.mark.parametrize("precision", ["float32", "autocast_bfloat16"])
def test_same_bits_whatever_the_threads(tier: str, precision: str) -> None:
    dtype, autocast = PRECISIONS[precision]
    values = sentence_arguments(3, 50, dtype=dtype)
    first = run(OP, values, autocast)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(first, run(OP, values, autocast))


def test_arguments_stay_as_they_are(tier: str) -> None:
    values = sentence_arguments(bias=True)
    copies = {n: v.clone() for n, v in values.items()}
    run(OP, values)
    for name, copy in copies.items():
        assert torch.equal(values[name], copy), name


def test_gradients_under_compute_dtype() -> None:
    values = arguments(OP)
    eager, exact = eager_and_exact(OP, values, torch.bfloat16)
    values["tokens"].requires_grad_()
    out = operator(OP)(*operator_arguments(OP, values, torch.bfloat16))
    assert out.requires_grad
    assert_as_accurate(out.detach(), eager, exact)


def test_float64() -> None:
    values = sentence_arguments(dtype=torch.float64)
    _, exact = eager_and_exact(OP, values)
    assert torch.equal(run(OP, values, backend="auto"), exact)
    assert torch.equal(operator(OP)(*operator_arguments(OP, values)), exact)
    with pytest.raises(RuntimeError, match="float64"):
        run(OP, values, backend="cpu")


BAD = [
    ({"words": 1}, TypeError, r"words must be a tensor of shape \[images \* sentences, words, c\], got int"),
    ({"words": torch.ones(12, 384)}, ValueError, r"words must be a tensor of shape .*got shape \[12, 384\]"),
    (
        {"words": torch.ones(11, 16, 24)},
        ValueError,
        r"words must be of 2 \* 6 sentences .*got shape \[11, 16, 24\]",
    ),
    (
        {"words": torch.ones(12, 15, 24)},
        ValueError,
        r"norm1_weight must be of shape \[360\], got shape \[384\]",
    ),
    ({"words": torch.ones(12, 16, 0)}, ValueError, "words must be of at least one word and one channel"),
    (
        {"words": torch.ones(12, 16, 24).double()},
        ValueError,
        "tokens must be of dtype torch.float64 .*float32",
    ),
    ({"words": torch.ones(12, 16, 24).int()}, ValueError, "words must be of dtype float32.*int32"),
    ({"tokens": torch.ones(2, 48)}, ValueError, r"tokens must be a tensor of shape .*got shape \[2, 48\]"),
    ({"tokens": torch.ones(3, 7, 48)}, ValueError, r"words must be of 3 \* 6 sentences"),
    ({"tokens": torch.ones(2, 1, 48)}, ValueError, r"tokens must be .*with a sentence or more"),
    (
        {"tokens": torch.ones(2, 7, 47)},
        ValueError,
        r"weight must be of shape \[47, 384\], got shape \[48, 384\]",
    ),
    (
        {"tokens": torch.ones(2, 7, 48).bfloat16()},
        ValueError,
        "tokens must be of dtype torch.float32 like words",
    ),
    (
        {"tokens": torch.ones(2, 7, 48, device="meta")},
        ValueError,
        "tokens must be on cpu like words, got meta",
    ),
    (
        {"norm1_weight": torch.ones(25)},
        ValueError,
        r"norm1_weight must be of shape \[384\], got shape \[25\]",
    ),
    ({"norm1_weight": None}, TypeError, r"norm1_weight must be a tensor of shape \[384\]"),
    ({"norm1_bias": torch.ones(24)}, ValueError, r"norm1_bias must be of shape \[384\], got shape \[24\]"),
    (
        {"weight": torch.ones(384, 48)},
        ValueError,
        r"weight must be of shape \[48, 384\], got shape \[384, 48\]",
    ),
    ({"weight": torch.ones(48, 384).half()}, ValueError, "weight must be of dtype torch.float32 .*float16"),
    ({"bias": torch.ones(384)}, ValueError, r"bias must be of shape \[48\], got shape \[384\]"),
    ({"norm2_weight": None}, ValueError, "norm2_weight must be given together with norm2_bias, got None"),
    ({"norm2_bias": None}, ValueError, "norm2_bias must be given together with norm2_weight, got None"),
    ({"norm2_bias": torch.ones(48, device="meta")}, ValueError, "norm2_bias must be on cpu"),
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    with pytest.raises(error, match="word_to_sentence: " + message):
        run(OP, {**arguments(OP), **change}, backend=backend)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [case for case in BAD if all(isinstance(v, torch.Tensor) for v in case[0].values())],
)
def test_bad_arguments_of_the_operator(change: dict[str, Any], error: type[Exception], message: str) -> None:
    values = operator_arguments(OP, {**arguments(OP), **change})
    with pytest.raises(error, match=message):
        operator(OP)(*values)
