"""The pixel embedding for GPUs without the CUDA kernel: every patch of the image is read where it lies.

A row is a word. Its k = 7 x 7 x 3 pixels are gathered while the weight is multiplied, some at a time; zeros
stand for pixels beyond the border, that of the patch, or of the image in timm's older network (legacy).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_kernels import _checks
from tnt_kernels.backends import reference
from tnt_kernels.backends.triton.configs import config_of
from tnt_kernels.backends.triton.runtime import architecture, contiguous, dot_precision, launch
from tnt_kernels.dispatch import DTYPES

__all__ = ["DEPTH", "can_launch", "geometry", "pixel_embed", "pixels", "place_of", "strides", "tile_width"]

DEPTH = 32  # pixels of a word that are read at a time
_COLUMNS = 64  # channels in a tile, at most
_MOST_WORDS = 2**31 - 1024  # so that they are counted in 32 bits


@triton.jit
def place_of(
    row,  # [ROWS] words
    PATCH_ROWS: tl.constexpr,  # of an image
    PATCH_COLUMNS: tl.constexpr,
    WORD_ROWS: tl.constexpr,  # of a patch
    WORD_COLUMNS: tl.constexpr,
):
    """The image of each word, row and column of its patch, its own row and column there."""
    word = row % (WORD_ROWS * WORD_COLUMNS)
    sentence = row // (WORD_ROWS * WORD_COLUMNS)
    patch = sentence % (PATCH_ROWS * PATCH_COLUMNS)
    image = sentence // (PATCH_ROWS * PATCH_COLUMNS)
    return image, patch // PATCH_COLUMNS, patch % PATCH_COLUMNS, word // WORD_COLUMNS, word % WORD_COLUMNS


@triton.jit
def pixels(
    image_ptr,  # [batch, CHANNELS, height, width], any strides
    row,  # [ROWS] words
    inside,  # [ROWS] whether there is such a word
    k,  # [K] places in a window: channel, row, column
    batch_stride,
    channel_stride,
    row_stride,
    column_stride,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    PATCH_ROWS: tl.constexpr,
    PATCH_COLUMNS: tl.constexpr,
    WORD_ROWS: tl.constexpr,
    WORD_COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    LEGACY: tl.constexpr,
):
    """[ROWS, K] pixels of each word's window."""
    image, patch_y, patch_x, word_y, word_x = place_of(
        row, PATCH_ROWS, PATCH_COLUMNS, WORD_ROWS, WORD_COLUMNS
    )
    # The window's corner in the patch, or in the image.
    y, x = word_y * STRIDE - KERNEL // 2, word_x * STRIDE - KERNEL // 2
    top, left = patch_y * PATCH_H, patch_x * PATCH_W
    height: tl.constexpr = PATCH_H * (PATCH_ROWS if LEGACY else 1)
    width: tl.constexpr = PATCH_W * (PATCH_COLUMNS if LEGACY else 1)
    corner = (
        image.to(tl.int64) * batch_stride
        + (top + y).to(tl.int64) * row_stride
        + (left + x).to(tl.int64) * column_stride
    )
    if LEGACY:
        y += top
        x += left
    channel, ky, kx = k // (KERNEL * KERNEL), k // KERNEL % KERNEL, k % KERNEL
    step = (
        channel.to(tl.int64) * channel_stride + ky.to(tl.int64) * row_stride + kx.to(tl.int64) * column_stride
    )
    y, x = y[:, None] + ky[None, :], x[:, None] + kx[None, :]
    seen = inside[:, None] & (channel < CHANNELS)[None, :] & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return tl.load(image_ptr + corner[:, None] + step[None, :], seen, other=0.0)


@triton.jit
def _pixel_embed_kernel(
    image_ptr,  # [batch, CHANNELS, height, width], any strides
    weight_ptr,  # [c, CHANNELS, KERNEL, KERNEL], of the dtype of the product
    bias_ptr,  # [c] or None
    position_ptr,  # [m, c] or None
    out_ptr,  # [rows, c]
    rows,
    c,
    batch_stride,
    channel_stride,
    row_stride,
    column_stride,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    PATCH_ROWS: tl.constexpr,
    PATCH_COLUMNS: tl.constexpr,
    WORD_ROWS: tl.constexpr,
    WORD_COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    LEGACY: tl.constexpr,
):
    T: tl.constexpr = weight_ptr.dtype.element_ty
    K: tl.constexpr = CHANNELS * KERNEL * KERNEL
    blocks = tl.cdiv(c, COLUMNS)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, DEPTH):
        k = start + tl.arange(0, DEPTH)
        window = pixels(
            image_ptr, row, row < rows, k, batch_stride, channel_stride, row_stride, column_stride, CHANNELS,
            KERNEL, PATCH_H, PATCH_W, PATCH_ROWS, PATCH_COLUMNS, WORD_ROWS, WORD_COLUMNS, STRIDE, LEGACY,
        )  # fmt: skip
        weight = tl.load(
            weight_ptr + column[None, :].to(tl.int64) * K + k[:, None],
            (k < K)[:, None] & (column < c)[None, :],
            other=0.0,
        )  # [DEPTH, COLUMNS]
        acc = tl.dot(window.to(T), weight, acc, input_precision=PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, column < c, other=0.0).to(tl.float32)[None, :]
    inside = (row < rows)[:, None] & (column < c)[None, :]
    if position_ptr is not None:
        word = row % (WORD_ROWS * WORD_COLUMNS)
        acc += tl.load(position_ptr + word[:, None] * c + column[None, :], inside, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + row[:, None].to(tl.int64) * c + column[None, :], acc.to(out_ptr.dtype.element_ty), inside
    )


def geometry(
    image: Tensor, weight: Tensor, patch_h: int, patch_w: int, stride: int, legacy: bool
) -> dict[str, int]:
    """The sizes that every kernel is compiled for."""
    return {
        "CHANNELS": weight.shape[1], "KERNEL": weight.shape[3], "PATCH_H": patch_h, "PATCH_W": patch_w,
        "PATCH_ROWS": image.shape[2] // patch_h, "PATCH_COLUMNS": image.shape[3] // patch_w,
        "WORD_ROWS": triton.cdiv(patch_h, stride), "WORD_COLUMNS": triton.cdiv(patch_w, stride),
        "STRIDE": stride, "LEGACY": legacy,
    }  # fmt: skip


def can_launch(
    image: Tensor,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    words: int,  # of an image
) -> bool:
    """Whether the kernels can do it; other dtypes and sizes are left to plain PyTorch."""
    return {image.dtype, dtype, out_dtype} <= DTYPES and image.shape[0] * words <= _MOST_WORDS


def strides(image: Tensor) -> dict[str, int]:
    names = ("batch_stride", "channel_stride", "row_stride", "column_stride")
    return dict(zip(names, image.stride(), strict=True))


def tile_width(channels: int) -> int:
    return min(_COLUMNS, max(16, triton.next_power_of_2(channels)))


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
    options = (patch_h, patch_w, stride, legacy)
    n, m, c = _checks.check_pixel_embed(image, weight, bias, position, *options, compute_dtype, mean, std)
    image = reference.normalized(image, weight.dtype, mean, std)
    out_dtype = reference.pixel_embed_dtype(image, weight, position, compute_dtype)
    dtype = image.dtype if compute_dtype is None else compute_dtype
    if not can_launch(image, dtype, out_dtype, n * m):
        return reference.pixel_embed_in(image, weight, bias, position, *options, compute_dtype)
    out = image.new_empty((image.shape[0] * n, m, c), dtype=out_dtype)
    if out.numel() == 0:
        return out
    config = config_of("pixel_embed", architecture(image.device), dtype, c)
    columns = tile_width(c)
    rows = image.shape[0] * n * m
    launch(
        _pixel_embed_kernel,
        (triton.cdiv(rows, config.rows) * triton.cdiv(c, columns),),
        {
            "image_ptr": image, "weight_ptr": weight.to(dtype).contiguous(), "bias_ptr": contiguous(bias),
            "position_ptr": contiguous(position), "out_ptr": out, "rows": rows, "c": c,
            **strides(image),
        },
        {
            "PRECISION": dot_precision(dtype), "ROWS": config.rows, "COLUMNS": columns,
            "DEPTH": DEPTH, **geometry(image, weight, *options),
        },
        config,
    )  # fmt: skip
    return out
