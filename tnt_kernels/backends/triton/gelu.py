"""The exact GELU between two linear layers, in place or not, and its backward with the first layer's bias.

Passes of their own, for the GELU in cuBLASLt's epilogue is the tanh approximation. In 16-bit dtypes the
forward pass is the epilogue of the product before (linear_gelu.py).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_kernels.backends.triton.configs import config_of
from tnt_kernels.backends.triton.math import normal_tail
from tnt_kernels.backends.triton.runtime import architecture, launch

__all__ = ["launch_gelu", "launch_gelu_backward", "normal"]

_COLUMNS = 128  # of a tile; the forward kernel takes its tile's elements as they lie in memory
_PROGRAMS = 8 * 132  # of the backward kernel, at most: it decides the order of the sums


@triton.jit
def normal(x, T: tl.constexpr):
    """Phi(x) of the normal distribution, to the accuracy of dtype T, at the infinities too."""
    a = tl.abs(x)
    tail = normal_tail(tl.where(a < 20.0, a, 20.0), 8 if T == tl.float32 else 5)  # noqa: SIM300
    return tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def _gelu_kernel(
    h_ptr,  # [size]
    out_ptr,  # [size], h_ptr where it runs in place
    size,
    BLOCK: tl.constexpr,
):
    # From the end: the product before has left that in the cache, and the next one begins with the rest.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BLOCK
    left = tl.minimum(size - first, BLOCK).to(tl.int32)
    at = tl.arange(0, BLOCK)
    x = tl.load(h_ptr + first + at, at < left, other=0.0).to(tl.float32)
    y = x * normal(x, h_ptr.dtype.element_ty)
    tl.store(out_ptr + first + at, y.to(out_ptr.dtype.element_ty), at < left)


@triton.jit
def _gelu_backward_kernel(
    h_ptr,  # [rows, columns]
    grad_ptr,  # [rows, columns], of the GELU's output, which becomes that of h
    out_ptr,  # [rows, columns] or None: receives the GELU's output
    partial_ptr,  # [parts, columns] or None: receives sums of the gradient over each part's rows
    rows,
    columns,
    parts,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    part, block = tl.program_id(0) % parts, tl.program_id(0) // parts
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(part, tl.cdiv(rows, ROWS), parts):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]  # [ROWS, COLUMNS]
        x = tl.load(h_ptr + at, inside, other=0.0).to(tl.float32)
        cumulative = normal(x, h_ptr.dtype.element_ty)
        if out_ptr is not None:
            tl.store(out_ptr + at, (x * cumulative).to(out_ptr.dtype.element_ty), inside)
        density = tl.exp2(x * x * -0.7213475204444817) * 0.3989422804014327  # log2(e) / 2, 1 / sqrt(2 pi)
        grad = tl.load(grad_ptr + at, inside, other=0.0).to(tl.float32) * (cumulative + x * density)
        tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), inside)
        total += grad
    if partial_ptr is not None:
        at = part.to(tl.int64) * columns + column
        tl.store(partial_ptr + at, tl.sum(total, axis=0), column < columns)


def launch_gelu(
    h: Tensor,  # [tokens, hidden], contiguous
    out: Tensor,  # likewise; may be h
) -> None:
    """Writes the GELU of h into out."""
    config = config_of("gelu", architecture(h.device), h.dtype, h.shape[1])
    block = config.rows * _COLUMNS
    launch(
        _gelu_kernel,
        (triton.cdiv(h.numel(), block),),
        {"h_ptr": h, "out_ptr": out, "size": h.numel()},
        {"BLOCK": block},
        config,
    )


def launch_gelu_backward(
    h: Tensor,  # [tokens, hidden]; everything contiguous
    grad: Tensor,  # [tokens, hidden]
    out: Tensor | None,  # [tokens, hidden]
    bias: bool,
) -> Tensor | None:  # [parts, hidden] float32: sums to the gradient of the bias
    """Turns the gradient of gelu(h) in grad into that of h, in place, and writes gelu(h) into out, if given;
    returns what the gradient of h's bias is the sum of, if it is asked for."""
    rows, columns = h.shape
    config = config_of("gelu_backward", architecture(h.device), h.dtype, columns)
    blocks = triton.cdiv(columns, _COLUMNS)
    parts = min(triton.cdiv(rows, config.rows), max(1, _PROGRAMS // blocks))
    partial = h.new_empty((parts, columns), dtype=torch.float32) if bias else None
    launch(
        _gelu_backward_kernel,
        (parts * blocks,),
        {
            "h_ptr": h, "grad_ptr": grad, "out_ptr": out, "partial_ptr": partial, "rows": rows,
            "columns": columns, "parts": parts,
        },
        {"ROWS": config.rows, "COLUMNS": _COLUMNS},
        config,
    )  # fmt: skip
    return partial
