"""Every operation in plain PyTorch: any device, any floating dtype, differentiable.

This is the fallback of every other backend, the oracle of the tests and the baseline of the
benchmarks. An active torch.autocast acts here as it acts on the reference model; the functions named
`*_in` do what a registered operator promises, in the compute_dtype given and no other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tnt_kernels.backends.philox import dropout_factors

__all__ = [
    "add_layer_norm",
    "add_layer_norm_in",
    "attention",
    "autocast_to",
    "inner_attention",
    "inner_attention_in",
    "inner_block",
    "inner_block_in",
    "inner_mlp",
    "inner_mlp_in",
    "layer_norm",
    "packed_linear",
    "packed_linear_in",
    "pixel_embed",
    "pixel_embed_dtype",
    "pixel_embed_in",
    "word_to_sentence",
    "word_to_sentence_in",
]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the trailing dimension; parameters may be of a wider dtype than x."""
    if weight.dtype == x.dtype and bias.dtype == x.dtype:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    wide = torch.promote_types(x.dtype, torch.promote_types(weight.dtype, bias.dtype))
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(x.dtype)


def attention(
    x: Tensor,  # [S, m, c]
    qk_weight: Tensor,  # [2c, c]: queries, then keys; head-major inside each
    qk_bias: Tensor | None,
    v_weight: Tensor,  # [c, c]
    v_bias: Tensor | None,
    proj_weight: Tensor,  # [c, c]
    proj_bias: Tensor | None,
    num_heads: int,
    scale: float,
    seed: Tensor | None = None,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
) -> Tensor:
    s, m, c = x.shape
    qk = F.linear(x, qk_weight, qk_bias).reshape(s, m, 2, num_heads, c // num_heads)
    q, k = qk.permute(2, 0, 3, 1, 4).unbind(0)
    v = F.linear(x, v_weight, v_bias).reshape(s, m, num_heads, c // num_heads).transpose(1, 2)
    probabilities = ((q @ k.transpose(-2, -1)) * scale).softmax(dim=-1)
    if attn_drop > 0.0:
        probabilities = probabilities * _head_factors(probabilities, seed, attn_drop)
    out = F.linear((probabilities @ v).transpose(1, 2).reshape(s, m, c), proj_weight, proj_bias)
    return dropped(out, seed, 1, proj_drop)


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
    drop_path: Tensor | None = None,  # [S] factor of each sentence's branch
    seed: Tensor | None = None,  # [1]
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
) -> Tensor:
    y = layer_norm(x, norm_weight, norm_bias, eps)
    y = attention(
        y, qk_weight, qk_bias, v_weight, v_bias, proj_weight, proj_bias, num_heads, scale, seed, attn_drop,
        proj_drop,
    )  # fmt: skip
    return x + _scaled(y, drop_path)


def inner_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    eps: float,
    drop_path: Tensor | None = None,  # [S] factor of each sentence's branch
    seed: Tensor | None = None,  # [1]
    hidden_drop: float = 0.0,
    out_drop: float = 0.0,
) -> Tensor:
    y = layer_norm(x, norm_weight, norm_bias, eps)
    hidden = dropped(F.gelu(F.linear(y, fc1_weight, fc1_bias)), seed, 2, hidden_drop)
    return x + _scaled(dropped(F.linear(hidden, fc2_weight, fc2_bias), seed, 3, out_drop), drop_path)


def _head_factors(probabilities: Tensor, seed: Tensor | None, rate: float) -> Tensor:
    """Factors of probabilities [S, heads, m queries, m keys]: the keys of a head count as channels."""
    s, heads, m, _ = probabilities.shape
    padded = -(-m // 4) * 4
    factors = dropout_factors(seed, 0, s, m, heads * padded, rate, probabilities)
    return factors.reshape(s, m, heads, padded)[..., :m].transpose(1, 2)


def dropped(x: Tensor, seed: Tensor | None, place: int, rate: float) -> Tensor:
    """x [S, m, c] with the elements dropped that the seed drops at this place of a block."""
    if rate == 0.0:
        return x
    s, m, c = x.shape
    return x * dropout_factors(seed, place, s, m, c, rate, x)


def _scaled(branch: Tensor, factors: Tensor | None) -> Tensor:
    return branch if factors is None else branch * factors.to(branch.dtype)[:, None, None]


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
    drop_path1: Tensor | None = None,  # [S] factor of each sentence's attention, and of its MLP
    drop_path2: Tensor | None = None,
    seed: Tensor | None = None,  # [1]
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
    hidden_drop: float = 0.0,
    out_drop: float = 0.0,
) -> Tensor:
    y = inner_attention(
        x, norm1_weight, norm1_bias, qk_weight, qk_bias, v_weight, v_bias, proj_weight, proj_bias,
        num_heads, scale, eps1, drop_path1, seed, attn_drop, proj_drop,
    )  # fmt: skip
    return inner_mlp(
        y, norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps2, drop_path2, seed,
        hidden_drop, out_drop,
    )  # fmt: skip


def pixel_embed(
    image: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [c, C, k, k]
    bias: Tensor | None,  # [c]
    position: Tensor | None,  # [1, m, c]
    patch_h: int,
    patch_w: int,
    stride: int,
    legacy: bool,
) -> Tensor:
    batch, channels, height, width = image.shape
    c, kernel = weight.shape[0], weight.shape[-1]
    rows, columns = height // patch_h, width // patch_w
    word_rows, word_columns = -(-patch_h // stride), -(-patch_w // stride)
    if legacy:
        # One convolution over the whole image; its output is cut into words afterwards.
        y = F.conv2d(image, weight, bias, stride=stride, padding=kernel // 2)
        y = y.reshape(batch, c, rows, word_rows, columns, word_columns).permute(0, 2, 4, 3, 5, 1)
    else:
        # Each patch is an image of its own, so that zeros pad at the patch's border.
        patches = image.reshape(batch, channels, rows, patch_h, columns, patch_w)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(
            batch * rows * columns, channels, patch_h, patch_w
        )
        y = F.conv2d(patches, weight, bias, stride=stride, padding=kernel // 2).permute(0, 2, 3, 1)
    y = y.reshape(batch * rows * columns, word_rows * word_columns, c)
    return y if position is None else y + position


def word_to_sentence(
    words: Tensor,  # [B*n, m, c]
    tokens: Tensor,  # [B, n+1, d]
    norm1_weight: Tensor,  # [m*c], or [c]: each word normalised on its own (timm's legacy network)
    norm1_bias: Tensor,
    weight: Tensor,  # [d, m*c]
    bias: Tensor | None,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    eps1: float,
    eps2: float,
) -> Tensor:
    batch, n = tokens.shape[0], tokens.shape[1] - 1
    m, c = words.shape[1:]
    if norm1_weight.shape[0] == m * c:
        y = layer_norm(words.reshape(batch, n, m * c), norm1_weight, norm1_bias, eps1)
    else:
        y = layer_norm(words, norm1_weight, norm1_bias, eps1).reshape(batch, n, m * c)
    y = F.linear(y, weight, bias)
    if norm2_weight is not None and norm2_bias is not None:
        y = layer_norm(y, norm2_weight, norm2_bias, eps2)
    return torch.cat([tokens[:, :1], (tokens[:, 1:] + y).to(tokens.dtype)], dim=1)


def add_layer_norm(
    x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    total = x if y is None else x + y.to(x.dtype)
    normed = layer_norm(total, weight, bias, eps).to(x.dtype if out_dtype is None else out_dtype)
    return (x.new_empty(0) if y is None else total), normed


def packed_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], gelu: bool
) -> Tensor:
    parts = [
        F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        for weight, bias in zip(weights, biases, strict=True)
    ]
    out = torch.cat(parts, dim=-1)
    return F.gelu(out) if gelu else out


def autocast_to(device: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to dtype whatever surrounds it; None switches it off."""
    if device == "meta":  # autocast does not know it, and computes nothing there
        return nullcontext()
    return torch.autocast(device, dtype=dtype, enabled=dtype is not None)


def _in_compute_dtype(
    function: Callable[..., Tensor],
    compute_dtype: torch.dtype | None,
    out_dtype: torch.dtype,
    *args: Any,
) -> Tensor:
    device = args[0].device.type
    lower = compute_dtype in (torch.bfloat16, torch.float16) and device != "meta"
    if compute_dtype is not None and not lower:
        args = tuple(a.float() if isinstance(a, Tensor) else a for a in args)
    with autocast_to(device, compute_dtype if lower else None):
        return function(*args).to(out_dtype)


def convolution_dtype(image: Tensor, weight: Tensor, compute_dtype: torch.dtype | None) -> torch.dtype:
    """Dtype in which pixel_embed convolves: the image's, where that is of uint8 the weight's."""
    if compute_dtype is not None:
        return compute_dtype
    return weight.dtype if image.dtype == torch.uint8 else image.dtype


def pixel_embed_dtype(
    image: Tensor, weight: Tensor, position: Tensor | None, compute_dtype: torch.dtype | None
) -> torch.dtype:
    """Dtype of pixel_embed's result: that of the convolution, widened by the position's."""
    dtype = convolution_dtype(image, weight, compute_dtype)
    return dtype if position is None else torch.promote_types(dtype, position.dtype)


def normalized(
    image: Tensor, dtype: torch.dtype, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Tensor:
    """(image / 255 - mean) / std of an image of uint8, in a floating dtype; any other image as it is."""
    if mean is None or std is None:
        return image
    wide = torch.promote_types(dtype, torch.float32)
    # No tensor is made of the numbers: that would copy from the host, which CUDA graphs cannot.
    pairs = enumerate(zip(mean, std, strict=True))
    return torch.stack([image[:, i].to(wide) * (1 / (255 * s)) - m / s for i, (m, s) in pairs], 1).to(dtype)


def pixel_embed_in(
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
    image = normalized(image, weight.dtype, mean, std)
    out_dtype = pixel_embed_dtype(image, weight, position, compute_dtype)
    options = (patch_h, patch_w, stride, legacy)
    return _in_compute_dtype(pixel_embed, compute_dtype, out_dtype, image, weight, bias, position, *options)


def inner_attention_in(x: Tensor, *args: Any) -> Tensor:
    arguments, compute_dtype, drop_path = _split(args, 11)
    return _in_compute_dtype(inner_attention, compute_dtype, x.dtype, x, *arguments, *drop_path)


def inner_mlp_in(x: Tensor, *args: Any) -> Tensor:
    arguments, compute_dtype, drop_path = _split(args, 7)
    return _in_compute_dtype(inner_mlp, compute_dtype, x.dtype, x, *arguments, *drop_path)


def inner_block_in(x: Tensor, *args: Any) -> Tensor:
    arguments, compute_dtype, drop_paths = _split(args, 18)
    return _in_compute_dtype(inner_block, compute_dtype, x.dtype, x, *arguments, *drop_paths)


def _split(args: tuple[Any, ...], count: int) -> tuple[Any, torch.dtype | None, Any]:
    """The first `count` arguments, the compute_dtype behind them, and what follows."""
    return args[:count], args[count], args[count + 1 :]


def word_to_sentence_in(words: Tensor, tokens: Tensor, *args: Any) -> Tensor:
    *rest, compute_dtype = args
    return _in_compute_dtype(word_to_sentence, compute_dtype, tokens.dtype, words, tokens, *rest)


def add_layer_norm_in(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    with autocast_to(x.device.type, None):
        return add_layer_norm(x, *args)


def packed_linear_in(x: Tensor, *args: Any) -> Tensor:
    with autocast_to(x.device.type, None):
        return packed_linear(x, *args)
