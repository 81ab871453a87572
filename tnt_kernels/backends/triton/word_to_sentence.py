"""LayerNorm, projection, LayerNorm of the words of a patch, added to its sentence token, in one kernel.

A program has all channels of its sentences, for the second LayerNorm needs them: in accumulators of PART
channels, so that their number need not be a power of two and the end goes part by part. The first LayerNorm
is applied to the words on their way into the product; its statistics come from a pass of their own over the
program's words, which then lie in the cache. To correct the product afterwards instead would cancel where
words have a mean and are rounded for the product.
"""

# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_kernels import _checks, dispatch
from tnt_kernels.backends import reference
from tnt_kernels.backends.triton.configs import Config, config_of
from tnt_kernels.backends.triton.runtime import architecture, contiguous, dot_precision, launch

__all__ = ["normalise", "project", "projection", "runs", "within", "word_to_sentence"]


@triton.jit
def within(column, END: tl.constexpr, STEP: tl.constexpr):
    """column < END. Where whole steps lead to END that is no question, and the compiler drops the mask."""
    return tl.full(column.shape, True, tl.int1) if END % STEP == 0 else column < END


@triton.jit
def _statistics(
    x,  # [ROWS, 1] pointers to the first of WIDTH elements
    inside,  # [ROWS, 1] which of the rows exist
    eps,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
):
    """Mean and reciprocal deviation of each row, [ROWS, 1]; steps are merged as by Chan et al. (1983)."""
    mean = tl.zeros(inside.shape, tl.float32)
    squares = tl.zeros(inside.shape, tl.float32)  # of the distances from the mean, summed
    for k in range(0, WIDTH, STEP):
        column = k + tl.arange(0, STEP)[None, :]
        present = within(column, WIDTH, STEP)
        step = tl.load(x + column, inside & present, other=0.0).to(tl.float32)
        count = tl.minimum(WIDTH - k, STEP).to(tl.float32)
        step_mean = tl.sum(step, axis=1, keep_dims=True) / count
        centred = tl.where(present, step - step_mean, 0.0)
        distance = step_mean - mean
        mean += distance * (count / (k + count))
        squares += tl.sum(centred * centred, axis=1, keep_dims=True)
        squares += distance * distance * (k * count / (k + count))
    return mean, 1.0 / tl.sqrt(squares / WIDTH + eps)


@triton.jit
def project(
    words_ptr,  # [S, K]
    norm_weight_ptr,  # [WIDTH]
    norm_bias_ptr,  # [WIDTH]
    weight_ptr,  # [D, K] in the dtype of the product's operands
    bias_ptr,  # [D] or None
    row,  # [ROWS, 1] 0 .. ROWS - 1: words_ptr is that of the program's first sentence
    inside,  # [ROWS, 1] which of the rows exist
    eps,
    K: tl.constexpr,
    WIDTH: tl.constexpr,  # what a LayerNorm spans: K, or the channels of a word
    D: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Linear(LayerNorm(words)), float32: PARTS of [ROWS, PART], zero from channel D on."""
    z = ()
    for i in tl.static_range(PARTS):
        n = i * PART + tl.arange(0, PART)[None, :]
        begin = tl.zeros((row.shape[0], PART), tl.float32)
        if bias_ptr is not None:
            begin += tl.load(bias_ptr + n, within(n, D, PART), other=0.0).to(tl.float32)
        z += (begin,)
    for first in range(0, K, WIDTH):
        x = words_ptr + row * K + first  # [ROWS, 1]
        mean, reciprocal = _statistics(x, inside, eps, WIDTH, STEP)
        for k in range(0, WIDTH, STEP):
            column = k + tl.arange(0, STEP)
            across, down = column[None, :], column[:, None]
            present = within(across, WIDTH, STEP)
            norm_weight = tl.load(norm_weight_ptr + across, present, other=0.0).to(tl.float32)
            norm_bias = tl.load(norm_bias_ptr + across, present, other=0.0).to(tl.float32)
            words = tl.load(x + across, inside & present, other=0.0).to(tl.float32)
            normed = (words - mean) * reciprocal * norm_weight + norm_bias  # [ROWS, STEP]
            normed = normed.to(weight_ptr.dtype.element_ty)
            added = ()
            for i in tl.static_range(PARTS):
                n = i * PART + tl.arange(0, PART)[None, :]
                present = within(down, WIDTH, STEP) & within(n, D, PART)
                weight = tl.load(weight_ptr + first + down + n * K, present, other=0.0)
                added += (tl.dot(normed, weight, z[i], input_precision=PRECISION),)
            z = added
    return z


@triton.jit
def normalise(
    z,  # PARTS of [ROWS, PART], zero from channel D on
    eps,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    """z without its mean, divided by its deviation, and the reciprocal of that, [ROWS]."""
    total = tl.sum(z[0], axis=1)
    for i in tl.static_range(1, PARTS):
        total += tl.sum(z[i], axis=1)
    mean = (total / D)[:, None]
    centred = ()
    squares = tl.zeros(total.shape, tl.float32)
    for i in tl.static_range(PARTS):
        n = i * PART + tl.arange(0, PART)[None, :]
        part = tl.where(within(n, D, PART), z[i] - mean, 0.0)
        squares += tl.sum(part * part, axis=1)
        centred += (part,)
    reciprocal = 1.0 / tl.sqrt(squares / D + eps)
    normed = ()
    for i in tl.static_range(PARTS):
        normed += (centred[i] * reciprocal[:, None],)
    return normed, reciprocal


@triton.jit
def _word_to_sentence_kernel(
    words_ptr,  # [S, K]
    tokens_ptr,  # [B, n + 1, D], images tokens_stride elements apart
    norm1_weight_ptr,  # [WIDTH]
    norm1_bias_ptr,  # [WIDTH]
    weight_ptr,  # [D, K]
    bias_ptr,  # [D] or None
    norm2_weight_ptr,  # [D] or None
    norm2_bias_ptr,  # [D] or None
    out_ptr,  # [B, n + 1, D]
    sentences,  # S = B * n
    n,
    tokens_stride,
    eps1,
    eps2,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * ROWS
    stop = tl.minimum(start + ROWS, sentences)
    row = tl.arange(0, ROWS)[:, None]
    inside = row < (stop - start).to(tl.int32)
    z = project(
        words_ptr + start * K, norm1_weight_ptr, norm1_bias_ptr, weight_ptr, bias_ptr, row, inside, eps1,
        K, WIDTH, D, PARTS, PART, STEP, PRECISION,
    )  # fmt: skip
    if norm2_weight_ptr is not None:
        z, _ = normalise(z, eps2, D, PARTS, PART)
    # Of the program's first sentence, and how many images later a row is.
    image, place = start // n, (start % n).to(tl.int32)
    later = (place + row) // n
    tokens = tokens_ptr + (image + later) * tokens_stride + ((place + row) % n + 1).to(tl.int64) * D
    out = out_ptr + (start + image + 1) * D + (row + later) * D
    for i in tl.static_range(PARTS):
        column = i * PART + tl.arange(0, PART)[None, :]
        present = within(column, D, PART)
        y = z[i]
        if norm2_weight_ptr is not None:
            y *= tl.load(norm2_weight_ptr + column, present, other=0.0).to(tl.float32)
            y += tl.load(norm2_bias_ptr + column, present, other=0.0).to(tl.float32)
        y += tl.load(tokens + column, inside & present, other=0.0).to(tl.float32)
        tl.store(out + column, y.to(out_ptr.dtype.element_ty), inside & present)

    # The class token of each image whose first sentence is here.
    column = tl.arange(0, PART)
    for i in range(tl.cdiv(start, n), tl.cdiv(stop, n)):
        for first in range(0, D, PART):
            token = tl.load(tokens_ptr + i * tokens_stride + first + column, first + column < D)
            tl.store(out_ptr + i * (n + 1) * D + first + column, token, first + column < D)


def runs(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these arguments; other dtypes and widths are left to plain PyTorch."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    return dtypes <= dispatch.DTYPES and dispatch.over_limits("word_to_sentence", tensors) is None


def projection(norm1_weight: Tensor, weight: Tensor, part: int, config: Config) -> dict[str, Any]:
    """Returns the constants of a kernel that projects by a weight [d, m * c], `part` channels at a time."""
    d, k = weight.shape
    return {
        "K": k, "WIDTH": norm1_weight.numel(), "D": d, "PARTS": triton.cdiv(d, part), "PART": part,
        "ROWS": config.rows, "STEP": 32, "PRECISION": dot_precision(weight.dtype),
    }  # fmt: skip


def word_to_sentence(
    words: Tensor,
    tokens: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    eps1: float,
    eps2: float,
    compute_dtype: torch.dtype | None,
) -> Tensor:
    parameters = (norm1_weight, norm1_bias, weight, bias, norm2_weight, norm2_bias)
    _checks.check_word_to_sentence(words, tokens, *parameters, compute_dtype)
    if not runs(words, tokens, *parameters):
        return reference.word_to_sentence_in(words, tokens, *parameters, eps1, eps2, compute_dtype)
    batch, length, d = tokens.shape
    if tokens.stride(2) != 1 or tokens.stride(1) != d:  # the batch may be expanded, its rows may not
        tokens = tokens.contiguous()
    out = tokens.new_empty((batch, length, d))
    if out.numel() == 0:
        return out
    weight = weight.to(words.dtype if compute_dtype is None else compute_dtype)
    # What is added takes registers at the end: of float32, twice as many for as many channels.
    large = tokens.dtype == torch.float32
    kernel = "word_to_sentence large" if large else "word_to_sentence"
    config = config_of(kernel, architecture(words.device), weight.dtype, d)
    part = 64 if d < 512 or large else 128
    launch(
        _word_to_sentence_kernel,
        (triton.cdiv(words.shape[0], config.rows),),
        {
            "words_ptr": words.contiguous(), "tokens_ptr": tokens,
            "norm1_weight_ptr": norm1_weight.contiguous(), "norm1_bias_ptr": norm1_bias.contiguous(),
            "weight_ptr": weight.contiguous(), "bias_ptr": contiguous(bias),
            "norm2_weight_ptr": contiguous(norm2_weight), "norm2_bias_ptr": contiguous(norm2_bias),
            "out_ptr": out, "sentences": words.shape[0], "n": length - 1, "tokens_stride": tokens.stride(0),
            "eps1": eps1, "eps2": eps2,
        },
        projection(norm1_weight, weight, part, config),
        config,
    )  # fmt: skip
    return out
