"""Gradients of the pixel embedding. Those of bias and position are sums of the words' gradients."""

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
from tnt_kernels.backends.triton.configs import config_of
from tnt_kernels.backends.triton.pixel_embed import (
    DEPTH,
    can_launch,
    geometry,
    pixels,
    place_of,
    strides,
    tile_width,
)
from tnt_kernels.backends.triton.runtime import architecture, dot_precision, launch

__all__ = ["pixel_embed_backward"]

# Their number decides the order of the sums: it must not depend on the GPU. Four for each SM of a large one.
_PROGRAMS = 4 * 132


@triton.jit
def _weight_kernel(
    image_ptr,  # [batch, CHANNELS, height, width], any strides
    grad_ptr,  # [rows, c], of the dtype of the product
    partial_ptr,  # [parts, c, CHANNELS, KERNEL, KERNEL]: receives each part's sums
    rows,
    c,
    parts,
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
    K: tl.constexpr = CHANNELS * KERNEL * KERNEL
    part, block = tl.program_id(0) % parts, tl.program_id(0) // parts
    blocks: tl.constexpr = (K + DEPTH - 1) // DEPTH
    k = block % blocks * DEPTH + tl.arange(0, DEPTH)
    column = block // blocks * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((COLUMNS, DEPTH), tl.float32)
    for tile in range(part, tl.cdiv(rows, ROWS), parts):
        row = tile * ROWS + tl.arange(0, ROWS)
        window = pixels(
            image_ptr, row, row < rows, k, batch_stride, channel_stride, row_stride, column_stride, CHANNELS,
            KERNEL, PATCH_H, PATCH_W, PATCH_ROWS, PATCH_COLUMNS, WORD_ROWS, WORD_COLUMNS, STRIDE, LEGACY,
        )  # fmt: skip
        grad = tl.load(
            grad_ptr + row[:, None].to(tl.int64) * c + column[None, :],
            (row < rows)[:, None] & (column < c)[None, :],
            other=0.0,
        )  # [ROWS, COLUMNS]
        acc = tl.dot(tl.trans(grad), window.to(grad.dtype), acc, input_precision=PRECISION)
    at = (part.to(tl.int64) * c + column)[:, None] * K + k[None, :]
    tl.store(partial_ptr + at, acc, (column < c)[:, None] & (k < K)[None, :])


@triton.jit
def _image_kernel(
    grad_ptr,  # [rows, c]
    weight_ptr,  # [c, CHANNELS, KERNEL, KERNEL], of the same dtype
    out_ptr,  # [batch, CHANNELS, height, width]
    rows,
    c,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # channels of the image in a tile
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
    K: tl.constexpr = CHANNELS * KERNEL * KERNEL
    HEIGHT: tl.constexpr = PATCH_H * PATCH_ROWS
    WIDTH: tl.constexpr = PATCH_W * PATCH_COLUMNS
    # A row is the pixel (dy, dx) of the STRIDE x STRIDE ones at a word: the words whose windows reach it
    # lie alike for all rows, and it has the same place in those windows.
    pixel = tl.program_id(0) % (STRIDE * STRIDE)
    tile = tl.program_id(0) // (STRIDE * STRIDE)
    blocks: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
    channel = tile % blocks * COLUMNS + tl.arange(0, COLUMNS)
    row = tile // blocks * ROWS + tl.arange(0, ROWS)
    dy, dx = pixel // STRIDE, pixel % STRIDE
    image, patch_y, patch_x, word_y, word_x = place_of(
        row, PATCH_ROWS, PATCH_COLUMNS, WORD_ROWS, WORD_COLUMNS
    )
    y, x = word_y * STRIDE + dy, word_x * STRIDE + dx  # in the patch
    inside = (row < rows) & (y < PATCH_H) & (x < PATCH_W)
    if LEGACY:
        word_y += patch_y * WORD_ROWS
        word_x += patch_x * WORD_COLUMNS
    last_y: tl.constexpr = WORD_ROWS * (PATCH_ROWS if LEGACY else 1) - 1
    last_x: tl.constexpr = WORD_COLUMNS * (PATCH_COLUMNS if LEGACY else 1) - 1
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for ky in range((dy + KERNEL // 2) % STRIDE, KERNEL, STRIDE):
        for kx in range((dx + KERNEL // 2) % STRIDE, KERNEL, STRIDE):
            from_y = word_y + (dy + KERNEL // 2) // STRIDE - ky // STRIDE
            from_x = word_x + (dx + KERNEL // 2) // STRIDE - kx // STRIDE
            reaches = inside & (from_y >= 0) & (from_y <= last_y) & (from_x >= 0) & (from_x <= last_x)
            if LEGACY:
                patch = (image * PATCH_ROWS + from_y // WORD_ROWS) * PATCH_COLUMNS + from_x // WORD_COLUMNS
                word = from_y % WORD_ROWS * WORD_COLUMNS + from_x % WORD_COLUMNS
            else:
                patch = (image * PATCH_ROWS + patch_y) * PATCH_COLUMNS + patch_x
                word = from_y * WORD_COLUMNS + from_x
            source = patch * (WORD_ROWS * WORD_COLUMNS) + word
            for start in range(0, c, DEPTH):
                column = start + tl.arange(0, DEPTH)
                grad = tl.load(
                    grad_ptr + source[:, None].to(tl.int64) * c + column[None, :],
                    reaches[:, None] & (column < c)[None, :],
                    other=0.0,
                )  # [ROWS, DEPTH]
                place = channel * (KERNEL * KERNEL) + ky * KERNEL + kx
                weight = tl.load(
                    weight_ptr + column[:, None].to(tl.int64) * K + place[None, :],
                    (column < c)[:, None] & (channel < CHANNELS)[None, :],
                    other=0.0,
                )  # [DEPTH, COLUMNS]
                acc = tl.dot(grad, weight, acc, input_precision=PRECISION)
    line = (image[:, None].to(tl.int64) * CHANNELS + channel[None, :]) * HEIGHT + (patch_y * PATCH_H + y)[
        :, None
    ]
    at = line * WIDTH + (patch_x * PATCH_W + x)[:, None]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), inside[:, None] & (channel < CHANNELS)[None, :])


def _weight_gradient(
    image: Tensor,
    grad: Tensor,  # [sentences, m, c], contiguous, of the dtype of the product
    sizes: dict[str, int],
) -> Tensor:  # [c, channels, kernel, kernel] float32
    sentences, m, c = grad.shape
    config = config_of("pixel_embed_weight", architecture(image.device), grad.dtype, c)
    columns, inputs = tile_width(c), sizes["CHANNELS"] * sizes["KERNEL"] ** 2
    blocks = triton.cdiv(inputs, DEPTH) * triton.cdiv(c, columns)
    parts = min(triton.cdiv(sentences * m, config.rows), max(1, _PROGRAMS // blocks))
    shape = (parts, c, sizes["CHANNELS"], sizes["KERNEL"], sizes["KERNEL"])
    partial = image.new_empty(shape, dtype=torch.float32)
    launch(
        _weight_kernel,
        (parts * blocks,),
        {
            "image_ptr": image, "grad_ptr": grad, "partial_ptr": partial, "rows": sentences * m, "c": c,
            "parts": parts, **strides(image),
        },
        {
            "PRECISION": dot_precision(grad.dtype), "ROWS": config.rows, "COLUMNS": columns, "DEPTH": DEPTH,
            **sizes,
        },
        config,
    )  # fmt: skip
    return partial.sum(0)


def _image_gradient(
    image: Tensor,
    grad: Tensor,  # [sentences, m, c], contiguous, of the dtype of the product
    weight: Tensor,
    sizes: dict[str, int],
) -> Tensor:
    sentences, m, c = grad.shape
    config = config_of("pixel_embed_image", architecture(image.device), grad.dtype, c)
    out, columns = image.new_empty(image.shape), tile_width(sizes["CHANNELS"])
    tiles = triton.cdiv(sentences * m, config.rows) * triton.cdiv(sizes["CHANNELS"], columns)
    launch(
        _image_kernel,
        (tiles * sizes["STRIDE"] ** 2,),
        {
            "grad_ptr": grad, "weight_ptr": weight.to(grad.dtype).contiguous(), "out_ptr": out,
            "rows": sentences * m, "c": c,
        },
        {
            "PRECISION": dot_precision(grad.dtype), "ROWS": config.rows, "COLUMNS": columns,
            "DEPTH": min(DEPTH, tile_width(c)), **sizes,
        },
        config,
    )  # fmt: skip
    return out


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
    out_dtype = reference.pixel_embed_dtype(image, weight, position, compute_dtype)
    shape = (image.shape[0] * n, m, c)
    _checks.check_gradient("pixel_embed_backward", grad, shape, out_dtype, image.device)
    dtype = image.dtype if compute_dtype is None else compute_dtype
    if not can_launch(image, dtype, out_dtype, n * m):
        return COMPOSITES["pixel_embed_backward"](
            grad, needed, image, weight, bias, position, *options, compute_dtype
        )
    tensors = (image, weight, bias, position)
    wanted = [tensor if wants else None for wants, tensor in zip(needed, tensors, strict=True)]
    if image.numel() == 0:
        return [torch.zeros_like(tensor) for tensor in wanted if tensor is not None]
    sizes = geometry(image, weight, *options)
    operand = grad.contiguous().to(dtype)
    found: list[Tensor | None] = [None] * 4
    if wanted[0] is not None:
        found[0] = _image_gradient(image, operand, weight, sizes)
    if wanted[1] is not None:
        found[1] = _weight_gradient(image, operand, sizes)
    if wanted[2] is not None or wanted[3] is not None:
        words = grad.sum(0, dtype=torch.float32)  # [m, c]
        found[2] = words.sum(0)
        found[3] = words[None]
    return [
        gradient.to(tensor.dtype)
        for gradient, tensor in zip(found, wanted, strict=True)
        if gradient is not None and tensor is not None
    ]
