"""A linear layer with the exact GELU in its epilogue: the hidden layer is written once, and not read for it.

cuBLASLt's epilogue has the tanh approximation alone.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tnt_kernels.backends.triton.configs import config_of
from tnt_kernels.backends.triton.gelu import normal
from tnt_kernels.backends.triton.runtime import architecture, contiguous, dot_precision, launch

__all__ = ["launch_linear_gelu"]

_COLUMNS = 128  # of a tile


@triton.jit
def _linear_gelu_kernel(
    x_ptr,  # [rows, K]
    weight_ptr,  # [columns, K]
    bias_ptr,  # [columns] or None
    h_ptr,  # [rows, columns] or None: receives what the GELU is taken of
    out_ptr,  # [rows, columns]
    rows,
    columns,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T: tl.constexpr = out_ptr.dtype.element_ty
    # Programs side by side share the rows of x; the weight stays in the cache.
    blocks = tl.cdiv(columns, COLUMNS)
    first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    left = tl.minimum(rows - first, ROWS).to(tl.int32)
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    x_at = x_ptr + first * K + row[:, None] * K + depth[None, :]  # [ROWS, DEPTH]
    weight_at = weight_ptr + column[None, :] * K + depth[:, None]  # [DEPTH, COLUMNS]
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, K, DEPTH):
        x_inside, weight_inside = (row < left)[:, None], (column < columns)[None, :]
        if K % DEPTH != 0:
            x_inside &= (k + depth < K)[None, :]
            weight_inside &= (k + depth < K)[:, None]
        x = tl.load(x_at + k, x_inside, other=0.0)
        weight = tl.load(weight_at + k, weight_inside, other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, column < columns, other=0.0).to(tl.float32)[None, :]
    inside = (row < left)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]  # [ROWS, COLUMNS]
    if h_ptr is not None:
        tl.store(h_ptr + first * columns + at, acc.to(T), inside)
        acc = acc.to(T).to(tl.float32)  # as backward reads it
    tl.store(out_ptr + first * columns + at, (acc * normal(acc, T)).to(T), inside)


def launch_linear_gelu(
    x: Tensor,  # [tokens, inputs], contiguous
    weight: Tensor,  # [hidden, inputs], in the dtype of x
    bias: Tensor | None,  # [hidden]
    out: Tensor,  # [tokens, hidden], contiguous
    h: Tensor | None = None,  # likewise
) -> None:
    """Writes x weight^T + bias into h, if given, and the GELU of it into out."""
    (rows, inputs), columns = x.shape, weight.shape[0]
    arch = architecture(x.device)
    config = config_of("linear_gelu", arch, x.dtype, inputs)
    launch(
        _linear_gelu_kernel,
        (triton.cdiv(rows, config.rows) * triton.cdiv(columns, _COLUMNS),),
        {
            "x_ptr": x, "weight_ptr": weight.contiguous(), "bias_ptr": contiguous(bias), "h_ptr": h,
            "out_ptr": out, "rows": rows, "columns": columns,
        },
        {
            "K": inputs,
            "ROWS": config.rows,
            "COLUMNS": _COLUMNS,
            # 128 bytes for the tensor cores of sm_90 and sm_100; others have less shared memory.
            "DEPTH": 64 if 90 <= arch < 120 else 32,
            "PRECISION": dot_precision(x.dtype),
        },
        config,
    )  # fmt: skip
