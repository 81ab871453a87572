"""Gradients of word_to_sentence, which keeps its arguments alone.

One kernel projects the words again, as forward does, and takes the gradient back through the second
LayerNorm: dz. The products of dz, with the weight and with the normalised words, are cuBLAS's. The one for
the weight is a sum over every sentence; the one for the words, in the same kernel, would stream the weight
through each program a second time, which costs more than it saves to keep dz. The first LayerNorm's gradient
is a pass over the words.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_kernels import _checks
from tnt_kernels._autograd import COMPOSITES
from tnt_kernels.backends import reference
from tnt_kernels.backends.triton.add_layer_norm import launch_add_layer_norm
from tnt_kernels.backends.triton.configs import config_of
from tnt_kernels.backends.triton.layer_norm_backward import launch_layer_norm_backward
from tnt_kernels.backends.triton.runtime import architecture, contiguous, launch
from tnt_kernels.backends.triton.word_to_sentence import normalise, project, projection, runs, within

__all__ = ["word_to_sentence_backward"]


@triton.jit
def _word_to_sentence_backward_kernel(
    grad_ptr,  # [B, n + 1, D]
    words_ptr,  # [S, K]
    norm1_weight_ptr,  # [WIDTH]
    norm1_bias_ptr,  # [WIDTH]
    weight_ptr,  # [D, K]
    bias_ptr,  # [D] or None
    norm2_weight_ptr,  # [D]
    dz_ptr,  # [S, D], receives the gradient of what the second LayerNorm takes
    partial_ptr,  # [programs, 3, D], receives shares of the gradients of norm2_weight, norm2_bias and bias
    sentences,  # S = B * n
    n,
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
    program = tl.program_id(0).to(tl.int64)
    start = program * ROWS
    row = tl.arange(0, ROWS)[:, None]
    inside = row < tl.minimum(sentences - start, ROWS).to(tl.int32)
    z = project(
        words_ptr + start * K, norm1_weight_ptr, norm1_bias_ptr, weight_ptr, bias_ptr, row, inside, eps1,
        K, WIDTH, D, PARTS, PART, STEP, PRECISION,
    )  # fmt: skip
    normed, reciprocal = normalise(z, eps2, D, PARTS, PART)
    image, place = start // n, (start % n).to(tl.int32)
    grads = grad_ptr + (start + image + 1) * D + (row + (place + row) // n) * D
    dz_ptr += start * D
    partial_ptr += program * 3 * D
    # The gradient is read twice, for z takes the registers. Rows beyond the last may hold no numbers.
    along_mean = tl.zeros((ROWS,), tl.float32)
    along_normed = tl.zeros((ROWS,), tl.float32)
    for i in tl.static_range(PARTS):
        column = i * PART + tl.arange(0, PART)
        real = within(column, D, PART)
        present = inside & real[None, :]
        grad = tl.load(grads + column[None, :], present, other=0.0).to(tl.float32)
        product = tl.where(present, grad * normed[i], 0.0)
        tl.store(partial_ptr + column, tl.sum(product, axis=0), real)
        tl.store(partial_ptr + D + column, tl.sum(grad, axis=0), real)
        norm_weight = tl.load(norm2_weight_ptr + column, real, other=0.0).to(tl.float32)[None, :]
        along_mean += tl.sum(grad * norm_weight, axis=1)
        along_normed += tl.sum(product * norm_weight, axis=1)
    along_mean = (along_mean / D)[:, None]
    along_normed = (along_normed / D)[:, None]
    for i in tl.static_range(PARTS):
        column = i * PART + tl.arange(0, PART)
        real = within(column, D, PART)
        present = inside & real[None, :]
        grad = tl.load(grads + column[None, :], present, other=0.0).to(tl.float32)
        norm_weight = tl.load(norm2_weight_ptr + column, real, other=0.0).to(tl.float32)[None, :]
        dz = (grad * norm_weight - along_mean - normed[i] * along_normed) * reciprocal[:, None]
        dz = tl.where(present, dz, 0.0)
        tl.store(partial_ptr + 2 * D + column, tl.sum(dz, axis=0), real)
        tl.store(dz_ptr + row * D + column[None, :], dz.to(dz_ptr.dtype.element_ty), present)


def word_to_sentence_backward(
    grad: Tensor,  # [B, n + 1, d]
    needed: Sequence[bool],
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
) -> list[Tensor]:
    parameters = (norm1_weight, norm1_bias, weight, bias, norm2_weight, norm2_bias)
    _checks.check_word_to_sentence(words, tokens, *parameters, compute_dtype)
    _checks.check_gradient("word_to_sentence_backward", grad, tokens.shape, tokens.dtype, words.device)
    tensors = (words, tokens, *parameters)
    if not runs(*tensors):
        by_autograd = COMPOSITES["word_to_sentence_backward"]
        return by_autograd(grad, needed, *tensors, eps1, eps2, compute_dtype)
    found: list[Tensor | None] = [None] * len(tensors)
    if needed[1]:
        found[1] = grad.clone(memory_format=torch.contiguous_format)
    if words.numel() == 0:
        found = [
            torch.zeros(t.shape, dtype=torch.float32, device=t.device) if wants and t is not None else None
            for wants, t in zip(needed, tensors, strict=True)
        ]
    elif needed[0] or any(needed[2:]):
        weight = weight.to(words.dtype if compute_dtype is None else compute_dtype).contiguous()
        dz, found[6], found[7], found[5] = _through_norm2(
            grad, words.contiguous(), norm1_weight, norm1_bias, weight, bias, norm2_weight, eps1, eps2
        )
        with reference.autocast_to(words.device.type, None):
            found[0], found[2], found[3], found[4] = _through_projection(
                dz, needed, words.contiguous(), norm1_weight, norm1_bias, weight, eps1
            )
    return [
        gradient.to(tensor.dtype)
        for gradient, tensor, wants in zip(found, tensors, needed, strict=True)
        if wants and gradient is not None and tensor is not None
    ]


def _through_norm2(
    grad: Tensor,
    words: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    weight: Tensor,  # in the dtype of the product
    bias: Tensor | None,
    norm2_weight: Tensor | None,
    eps1: float,
    eps2: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Returns the gradients of the projection's result [S, d], norm2_weight, norm2_bias and bias."""
    sentences, d = words.shape[0], weight.shape[0]
    if norm2_weight is None:
        dz = grad[:, 1:].reshape(sentences, d)
        return dz.to(weight.dtype), None, None, dz.sum(0, dtype=torch.float32)
    config = config_of("word_to_sentence_backward", architecture(words.device), weight.dtype, d)
    programs = triton.cdiv(sentences, config.rows)
    dz = weight.new_empty((sentences, d))
    partial = weight.new_empty((programs, 3, d), dtype=torch.float32)
    launch(
        _word_to_sentence_backward_kernel,
        (programs,),
        {
            "grad_ptr": grad.contiguous(), "words_ptr": words, "norm1_weight_ptr": norm1_weight.contiguous(),
            "norm1_bias_ptr": norm1_bias.contiguous(), "weight_ptr": weight, "bias_ptr": contiguous(bias),
            "norm2_weight_ptr": norm2_weight.contiguous(), "dz_ptr": dz, "partial_ptr": partial,
            "sentences": sentences, "n": grad.shape[1] - 1, "eps1": eps1, "eps2": eps2,
        },
        projection(norm1_weight, weight, 64 if d < 512 else 128, config),
        config,
    )  # fmt: skip
    grad_weight, grad_bias, grad_z = partial.sum(0)
    return dz, grad_weight, grad_bias, grad_z


def _through_projection(
    dz: Tensor,  # [S, d]
    needed: Sequence[bool],
    words: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients of words, norm1_weight, norm1_bias and weight; None for what is not needed."""
    normed = torch.empty_like(words, dtype=weight.dtype) if needed[4] else None
    # A LayerNorm spans the channels of a word, or all words of a sentence.
    x = words if norm1_weight.numel() == words.shape[2] else words.view(1, words.shape[0], -1)
    norm = (norm1_weight, norm1_bias)
    grad_words, grad_norm_weight, grad_norm_bias = None, None, None
    if needed[0] or needed[2] or needed[3]:
        grad_words = torch.empty_like(words) if needed[0] else None
        partial = launch_layer_norm_backward(
            x, dz @ weight, None, norm, eps, grad_x=grad_words, y=normed, parameters=needed[2] or needed[3]
        )
        if partial is not None:
            grad_norm_weight, grad_norm_bias = partial.sum(1)
    elif normed is not None:
        launch_add_layer_norm(x, norm=norm, eps=eps, out=normed)
    grad_weight = None if normed is None else dz.t() @ normed.view(words.shape[0], -1)
    return grad_words, grad_norm_weight, grad_norm_bias, grad_weight
