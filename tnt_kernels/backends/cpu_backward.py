"""Gradients of pixel_embed and word_to_sentence on the native CPU backend.

The kernels compute what they need again from an operator's inputs. Gradients of parameters leave them in
float32, summed in an order that does not depend on the number of threads. float64, or a missing native
module, goes through plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tnt_kernels import _checks, _ops, native
from tnt_kernels.backends import reference
from tnt_kernels.backends.cpu import CODES, _compute_code, _held, _native_runs, _parameters
from tnt_kernels.backends.cpu_inner_backward import _by_autograd

_pixel_embed_by_autograd = _by_autograd(reference.pixel_embed_in, _ops.pixel_embed)
_word_to_sentence_by_autograd = _by_autograd(reference.word_to_sentence_in, _ops.word_to_sentence)


def _new_gradients(needed: Sequence[bool], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Returns float32 tensors for the kernel to write, None where no gradient is needed."""
    return [
        torch.empty(tensor.shape, dtype=torch.float32) if wants and tensor is not None else None
        for wants, tensor in zip(needed, tensors, strict=True)
    ]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _found(gradients: Sequence[Tensor | None], tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Returns the gradients that were needed, each in its tensor's dtype."""
    return [
        gradient.to(tensor.dtype)
        for gradient, tensor in zip(gradients, tensors, strict=True)
        if gradient is not None and tensor is not None
    ]


def pixel_embed_backward(
    grad: Tensor,
    needed: Sequence[bool],
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    patch_h: int,
    patch_w: int,
    stride: int,
    legacy: bool,
    compute_dtype: torch.dtype | None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> list[Tensor]:
    options = (patch_h, patch_w, stride, legacy)
    n, m, c = _checks.check_pixel_embed(image, weight, bias, position, *options, compute_dtype, mean, std)
    image = reference.normalized(image, weight.dtype, mean, std)
    tensors = (image, weight, bias, position)
    batch, channels, height, width = image.shape
    out_dtype = reference.pixel_embed_dtype(image, weight, position, compute_dtype)
    _checks.check_gradient("pixel_embed_backward", grad, (batch * n, m, c), out_dtype, image.device)
    if out_dtype == torch.float64 or not _native_runs(image):
        return _pixel_embed_by_autograd(grad, needed, *tensors, *options, compute_dtype)
    module = native.load()
    assert module is not None
    source = image.float() if image.dtype == torch.float16 else image
    result = _held(grad)
    gradients = [
        torch.empty(image.shape, dtype=source.dtype) if needed[0] else None,
        *_new_gradients(needed[1:], tensors[1:]),
    ]
    pointers, codes, held = _parameters((weight,))
    module.pixel_embed_backward(
        result.data_ptr(), CODES[result.dtype], source.data_ptr(), CODES[source.dtype], list(source.stride()),
        batch, channels, height, width, *pointers, *codes, *map(_address, gradients),
        _compute_code(image.dtype, compute_dtype), c, weight.shape[3], *options, torch.get_num_threads(),
    )  # fmt: skip
    del held
    return _found(gradients, tensors)


def word_to_sentence_backward(
    grad: Tensor,
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
    if not _native_runs(words, tokens):
        return _word_to_sentence_by_autograd(
            grad, needed, words, tokens, *parameters, eps1, eps2, compute_dtype
        )
    module = native.load()
    assert module is not None
    batch, length, d = tokens.shape
    m, c = words.shape[1:]
    source, result = _held(words), _held(grad)
    grad_words = torch.empty_like(source) if needed[0] else None
    grad_tokens = grad.clone(memory_format=torch.contiguous_format) if needed[1] else None
    gradients = _new_gradients(needed[2:], parameters)
    if needed[0] or any(needed[2:]):
        pointers, codes, held = _parameters(parameters)
        module.word_to_sentence_backward(
            result.data_ptr(), CODES[result.dtype], source.data_ptr(), CODES[source.dtype],
            _address(grad_words), batch, length - 1, m, c, d, norm1_weight.numel(), pointers, codes,
            [_address(gradient) for gradient in gradients], eps1, eps2,
            _compute_code(words.dtype, compute_dtype), torch.get_num_threads(),
        )  # fmt: skip
        del held
    return _found([grad_words, grad_tokens, *gradients], [words, tokens, *parameters])


for _launcher in (pixel_embed_backward, word_to_sentence_backward):
    _ops.lib.impl(_launcher.__name__, _launcher, "CPU")
