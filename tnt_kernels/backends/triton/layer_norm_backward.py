"""Gradients of a LayerNorm that a residual goes past, and its output once more, in one pass."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_kernels.backends.triton.configs import config_of
from tnt_kernels.backends.triton.runtime import architecture, contiguous, launch

__all__ = ["launch_layer_norm_backward"]

# Their number decides the order of the sums: it must not depend on the GPU. Four for each SM of a large one.
_PROGRAMS = 4 * 132


@triton.jit
def _layer_norm_backward_kernel(
    x_ptr,  # [rows, D]
    grad_ptr,  # [rows, D], gradient of the LayerNorm's output
    residual_ptr,  # [rows, D] or None: the gradient that goes past the LayerNorm
    weight_ptr,  # [D]
    bias_ptr,  # [D]
    factors_ptr,  # [rows / n] or None
    grad_x_ptr,  # [rows, D] or None: receives residual + the gradient through the LayerNorm
    branch_ptr,  # [rows, D] or None: receives the same times factors
    y_ptr,  # [rows, D] or None: receives the LayerNorm's output
    partial_ptr,  # [2, programs, D] or None: receives each program's share of weight's and bias's gradients
    rows,
    n,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # D rounded up to a power of two
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, column < D, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    grad_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < D)[None, :]
        at = row.to(tl.int64)[:, None] * D + column[None, :]  # [ROWS, BLOCK]
        x = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, inside, other=0.0).to(tl.float32)
        mean = tl.sum(x, axis=1) / D
        centred = tl.where(inside, x - mean[:, None], 0.0)
        reciprocal = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps)
        # With eps zero a row beyond the last, which is constant, would be no number.
        normed = tl.where(inside, centred * reciprocal[:, None], 0.0)
        if partial_ptr is not None:
            grad_weight += grad * normed
            grad_bias += grad
        if y_ptr is not None:
            bias = tl.load(bias_ptr + column, column < D, other=0.0).to(tl.float32)
            y = normed * weight[None, :] + bias[None, :]
            tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), inside)
        if (grad_x_ptr is not None) or (branch_ptr is not None):
            grad *= weight[None, :]
            along_mean = tl.sum(grad, axis=1) / D
            along_normed = tl.sum(grad * normed, axis=1) / D
            grad_x = (grad - along_mean[:, None] - normed * along_normed[:, None]) * reciprocal[:, None]
            if residual_ptr is not None:
                grad_x += tl.load(residual_ptr + at, inside, other=0.0).to(tl.float32)
            if grad_x_ptr is not None:
                tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), inside)
            if branch_ptr is not None:
                if factors_ptr is not None:
                    factors = tl.load(factors_ptr + row // n, row < rows, other=0.0).to(tl.float32)
                    grad_x *= factors[:, None]
                tl.store(branch_ptr + at, grad_x.to(branch_ptr.dtype.element_ty), inside)
    if partial_ptr is not None:
        at = program.to(tl.int64) * D + column
        tl.store(partial_ptr + at, tl.sum(grad_weight, axis=0), column < D)
        at += programs.to(tl.int64) * D
        tl.store(partial_ptr + at, tl.sum(grad_bias, axis=0), column < D)


def launch_layer_norm_backward(
    x: Tensor,  # [images, n, D]
    grad: Tensor,  # as many elements, like all below; everything contiguous
    residual: Tensor | None,
    norm: tuple[Tensor, Tensor],  # [D] each
    eps: float,
    *,
    factors: Tensor | None = None,  # [images]
    grad_x: Tensor | None = None,
    branch: Tensor | None = None,
    y: Tensor | None = None,
    parameters: bool = True,
) -> Tensor | None:  # [2, programs, D] float32: to be summed over the programs
    """Writes residual + the gradient of x into grad_x, that times factors into branch, and LayerNorm(x) into
    y, where they are given; returns what the parameters' gradients are the sums of, if they are asked for."""
    images, n, d = x.shape
    config = config_of("layer_norm_backward", architecture(x.device), grad.dtype, d)
    programs = min(triton.cdiv(images * n, config.rows), _PROGRAMS)
    partial = x.new_empty((2, programs, d), dtype=torch.float32) if parameters else None
    launch(
        _layer_norm_backward_kernel,
        (programs,),
        {
            "x_ptr": x, "grad_ptr": grad, "residual_ptr": residual, "weight_ptr": contiguous(norm[0]),
            "bias_ptr": contiguous(norm[1]), "factors_ptr": contiguous(factors), "grad_x_ptr": grad_x,
            "branch_ptr": branch, "y_ptr": y, "partial_ptr": partial, "rows": images * n, "n": n, "eps": eps,
        },
        {"D": d, "ROWS": config.rows, "BLOCK": triton.next_power_of_2(d)},
        config,
    )  # fmt: skip
    return partial
