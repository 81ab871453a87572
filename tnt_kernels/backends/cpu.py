"""The native CPU backend: registered operators on the kernels of ``tnt_kernels._native``.

A launcher checks the arguments, makes contiguous what must be, and hands over pointers, sizes and
dtype codes. float16 goes through float32. What the kernels cannot do (float64, or the native module
missing) is computed in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tnt_kernels import _checks, native
from tnt_kernels._ops import lib
from tnt_kernels.backends import reference

__all__ = ["inner_attention", "inner_block", "inner_mlp", "pixel_embed", "word_to_sentence"]

CODES = {torch.float32: 0, torch.bfloat16: 1}  # dtype codes of the native module

_ATTENTION, _MLP, _BOTH = 1, 2, 3  # `parts` of the native inner block


def _held(tensor: Tensor) -> Tensor:
    """Returns the tensor as a kernel can read it: contiguous, float32 or bfloat16."""
    return (tensor.float() if tensor.dtype == torch.float16 else tensor).contiguous()


def _parameters(
    parameters: Sequence[Tensor | None],
) -> tuple[list[int], list[int], list[Tensor]]:
    """Returns pointers (0 = absent), dtype codes, and the tensors that the caller must keep alive."""
    pointers, codes, held = [], [], []
    for value in parameters:
        if value is None:
            pointers.append(0)
            codes.append(0)
            continue
        if value.dtype not in CODES or not value.is_contiguous():
            value = _held(value)
            held.append(value)
        pointers.append(value.data_ptr())
        codes.append(CODES[value.dtype])
    return pointers, codes, held


def _compute_code(dtype: torch.dtype, compute_dtype: torch.dtype | None) -> int:
    return 1 if (dtype if compute_dtype is None else compute_dtype) == torch.bfloat16 else 0


def _launch_inner(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    parts: int,
    hidden: int,
    num_heads: int,
    scale: float,
    eps1: float,
    eps2: float,
    compute_dtype: torch.dtype | None,
    drop_path1: Tensor | None,
    drop_path2: Tensor | None,
    seed: Tensor | None,
    drops: Sequence[float],
) -> Tensor:
    module = native.load()
    assert module is not None
    s, m, c = x.shape
    source = _held(x)
    out = source.new_empty((s, m, c))
    if out.numel() > 0:
        pointers, codes, held = _parameters(parameters)
        factors, _, held_factors = _parameters((drop_path1, drop_path2))
        module.inner_block(
            source.data_ptr(), out.data_ptr(), CODES[source.dtype], _compute_code(x.dtype, compute_dtype),
            s, m, c, hidden, num_heads, parts, scale, eps1, eps2, pointers, codes, *factors,
            _seed_of(seed), drops, torch.get_num_threads(),
        )  # fmt: skip
        held += held_factors
        del held
    return out.to(x.dtype)


def _seed_of(seed: Tensor | None) -> int:
    return 0 if seed is None else int(seed.item()) & (1 << 64) - 1


def _native_runs(*tensors: Tensor) -> bool:
    if native.load() is None:
        native.warn_once()
        return False
    return all(tensor.dtype != torch.float64 for tensor in tensors)


def inner_block(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    qk_weight: Tensor,
    qk_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    num_heads: int,
    scale: float,
    eps1: float,
    eps2: float,
    compute_dtype: torch.dtype | None,
    drop_path1: Tensor | None = None,
    drop_path2: Tensor | None = None,
    seed: Tensor | None = None,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
    hidden_drop: float = 0.0,
    out_drop: float = 0.0,
) -> Tensor:
    parameters = (
        norm1_weight, norm1_bias, qk_weight, qk_bias, v_weight, v_bias, proj_weight, proj_bias,
        norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
    )  # fmt: skip
    _checks.check_inner_block(x, *parameters, num_heads, compute_dtype)
    _checks.check_drop_path("inner_block", x, drop_path1=drop_path1, drop_path2=drop_path2)
    drops = (attn_drop, proj_drop, hidden_drop, out_drop)
    _checks.check_dropout("inner_block", x, (seed, *drops), _checks.DROPS)
    options = (num_heads, scale, eps1, eps2, compute_dtype, drop_path1, drop_path2, seed)
    if not _native_runs(x):
        return reference.inner_block_in(x, *parameters, *options, *drops)
    return _launch_inner(x, parameters, _BOTH, fc1_weight.shape[0], *options, drops)


def inner_attention(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qk_weight: Tensor,
    qk_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    num_heads: int,
    scale: float,
    eps: float,
    compute_dtype: torch.dtype | None,
    drop_path: Tensor | None = None,
    seed: Tensor | None = None,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
) -> Tensor:
    parameters = (
        norm_weight, norm_bias, qk_weight, qk_bias, v_weight, v_bias, proj_weight, proj_bias,
    )  # fmt: skip
    _checks.check_inner_attention(x, *parameters, num_heads, compute_dtype)
    _checks.check_drop_path("inner_attention", x, drop_path=drop_path)
    noise = (seed, attn_drop, proj_drop)
    _checks.check_dropout("inner_attention", x, noise, _checks.ATTENTION_DROPS)
    if not _native_runs(x):
        options = (num_heads, scale, eps, compute_dtype, drop_path, *noise)
        return reference.inner_attention_in(x, *parameters, *options)
    absent = (None,) * 6
    return _launch_inner(
        x, (*parameters, *absent), _ATTENTION, 0, num_heads, scale, eps, eps, compute_dtype, drop_path, None,
        seed, (attn_drop, proj_drop, 0.0, 0.0),
    )  # fmt: skip


def inner_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    eps: float,
    compute_dtype: torch.dtype | None,
    drop_path: Tensor | None = None,
    seed: Tensor | None = None,
    hidden_drop: float = 0.0,
    out_drop: float = 0.0,
) -> Tensor:
    parameters = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    _checks.check_inner_mlp(x, *parameters, compute_dtype)
    _checks.check_drop_path("inner_mlp", x, drop_path=drop_path)
    noise = (seed, hidden_drop, out_drop)
    _checks.check_dropout("inner_mlp", x, noise, _checks.MLP_DROPS)
    if not _native_runs(x):
        return reference.inner_mlp_in(x, *parameters, eps, compute_dtype, drop_path, *noise)
    absent = (None,) * 8
    hidden = fc1_weight.shape[0]
    return _launch_inner(
        x, (*absent, *parameters), _MLP, hidden, 1, 1.0, eps, eps, compute_dtype, None, drop_path,
        seed, (0.0, 0.0, hidden_drop, out_drop),
    )  # fmt: skip


def pixel_embed(
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
) -> Tensor:
    n, m, c = _checks.check_pixel_embed(
        image, weight, bias, position, patch_h, patch_w, stride, legacy, compute_dtype, mean, std
    )
    image = reference.normalized(image, weight.dtype, mean, std)
    out_dtype = reference.pixel_embed_dtype(image, weight, position, compute_dtype)
    if out_dtype == torch.float64 or not _native_runs(image):
        return reference.pixel_embed_in(
            image, weight, bias, position, patch_h, patch_w, stride, legacy, compute_dtype
        )
    module = native.load()
    assert module is not None
    batch, channels, height, width = image.shape
    # Read where it lies, whatever its strides.
    source = image.float() if image.dtype == torch.float16 else image
    held_dtype = torch.float32 if out_dtype == torch.float16 else out_dtype
    out = source.new_empty((batch * n, m, c), dtype=held_dtype)
    if out.numel() > 0:
        pointers, codes, held = _parameters((weight, bias, position))
        module.pixel_embed(
            source.data_ptr(), CODES[source.dtype], list(source.stride()), batch, channels, height, width,
            *pointers, codes, out.data_ptr(), CODES[out.dtype], _compute_code(image.dtype, compute_dtype),
            c, weight.shape[3], patch_h, patch_w, stride, legacy, torch.get_num_threads(),
        )  # fmt: skip
        del held
    return out.to(out_dtype)


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
    if not _native_runs(words, tokens):
        return reference.word_to_sentence_in(words, tokens, *parameters, eps1, eps2, compute_dtype)
    module = native.load()
    assert module is not None
    batch, length, d = tokens.shape
    m, c = words.shape[1:]
    source = _held(words)
    stream = tokens.float() if tokens.dtype == torch.float16 else tokens
    if stream.stride(2) != 1 or stream.stride(1) != d:  # the batch may be expanded, its rows may not
        stream = stream.contiguous()
    out = stream.new_empty((batch, length, d))
    if out.numel() > 0:
        pointers, codes, held = _parameters(parameters)
        module.word_to_sentence(
            source.data_ptr(), CODES[source.dtype], stream.data_ptr(), out.data_ptr(), CODES[stream.dtype],
            stream.stride(0), batch, length - 1, m, c, d, norm1_weight.numel(), pointers, codes,
            eps1, eps2, _compute_code(words.dtype, compute_dtype), torch.get_num_threads(),
        )  # fmt: skip
        del held
    return out.to(tokens.dtype)


for _launcher in (pixel_embed, inner_attention, inner_mlp, inner_block, word_to_sentence):
    lib.impl(_launcher.__name__, _launcher, "CPU")
