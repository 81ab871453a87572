"""Residual and LayerNorm in one pass: x + y as it goes on, and its LayerNorm for the next product."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_kernels import _checks
from tnt_kernels.backends import reference
from tnt_kernels.backends.triton.configs import config_of
from tnt_kernels.backends.triton.runtime import architecture, contiguous, launch

__all__ = ["add_layer_norm", "launch_add_layer_norm"]


@triton.jit
def _add_layer_norm_kernel(
    x_ptr,  # [rows, D]
    y_ptr,  # [rows, D] or None
    factors_ptr,  # [rows / n] or None: what y is multiplied by, for each n rows
    weight_ptr,  # [D]; None where only the sum is wanted
    bias_ptr,  # [D]
    shift_ptr,  # [D] or None: added to the sum that is written, not to the one that is normalised
    total_ptr,  # [rows, D] or None
    out_ptr,  # [rows, D]; None where only the sum is wanted
    rows,
    n,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # D rounded up to a power of two
):
    # Last rows first: the product before has left those in the cache; the next one begins with the others.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + column[None, :]  # [ROWS, BLOCK]
    total = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32)
    if y_ptr is not None:
        y = tl.load(y_ptr + at, inside, other=0.0).to(tl.float32)
        if factors_ptr is not None:
            y *= tl.load(factors_ptr + row // n, row < rows, other=0.0).to(tl.float32)[:, None]
        # Rounded as the sum that is kept, of which backward computes the LayerNorm again.
        total = (total + y).to(x_ptr.dtype.element_ty).to(tl.float32)
    if total_ptr is not None:
        kept = total
        if shift_ptr is not None:
            kept += tl.load(shift_ptr + column, column < D, other=0.0).to(tl.float32)[None, :]
        tl.store(total_ptr + at, kept.to(total_ptr.dtype.element_ty), inside)
    if out_ptr is not None:
        mean = tl.sum(total, axis=1) / D
        centred = tl.where(inside, total - mean[:, None], 0.0)
        reciprocal = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps)
        weight = tl.load(weight_ptr + column, column < D, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + column, column < D, other=0.0).to(tl.float32)
        out = centred * reciprocal[:, None] * weight[None, :] + bias[None, :]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), inside)


def launch_add_layer_norm(
    x: Tensor,  # [images, n, D]
    y: Tensor | None = None,  # as many elements
    *,
    factors: Tensor | None = None,  # [images]
    norm: tuple[Tensor, Tensor] | None = None,  # [D] each
    eps: float = 0.0,
    shift: Tensor | None = None,  # [D]
    total: Tensor | None = None,
    out: Tensor | None = None,
) -> None:
    """Writes x + factors y (+ shift) into total and the LayerNorm of x + factors y into out, where they are
    given; x, y and both results are contiguous."""
    d = x.shape[-1]
    rows = x.numel() // d
    written = total if out is None else out
    if rows == 0 or written is None:
        return
    weight, bias = (None, None) if norm is None else norm
    config = config_of("add_layer_norm", architecture(x.device), written.dtype, d)
    launch(
        _add_layer_norm_kernel,
        (triton.cdiv(rows, config.rows),),
        {
            "x_ptr": x, "y_ptr": y, "factors_ptr": contiguous(factors), "weight_ptr": contiguous(weight),
            "bias_ptr": contiguous(bias), "shift_ptr": contiguous(shift), "total_ptr": total, "out_ptr": out,
            "rows": rows, "n": x.shape[1] if x.dim() == 3 else 1, "eps": eps,
        },
        {"D": d, "ROWS": config.rows, "BLOCK": triton.next_power_of_2(d)},
        config,
    )  # fmt: skip


def add_layer_norm(
    x: Tensor,  # [..., d]
    y: Tensor | None,  # [..., d]
    weight: Tensor,  # [d]
    bias: Tensor,  # [d]
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # x + y in the dtype of x ([0] without y), its LayerNorm in out_dtype
    _checks.check_add_layer_norm(x, y, weight, bias)
    if out_dtype is None:
        out_dtype = x.dtype
    dtypes = (x.dtype, x.dtype if y is None else y.dtype, weight.dtype, bias.dtype, out_dtype)
    if torch.float64 in dtypes:
        return reference.add_layer_norm_in(x, y, weight, bias, eps, out_dtype)
    x, y = x.contiguous(), contiguous(y)
    total = None if y is None else torch.empty_like(x)
    out = torch.empty_like(x, dtype=out_dtype)
    launch_add_layer_norm(x, y, norm=(weight, bias), eps=eps, total=total, out=out)
    return x.new_empty(0) if total is None else total, out
