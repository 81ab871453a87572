"""Small kernels of known shape, and some that are badly made, for the tests of the offline compiler."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale_kernel(
    x_ptr,  # [n]
    out_ptr,  # [n]
    n,
    rounds,
    bias_ptr,  # [n] or None
    ROWS: tl.constexpr,
):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x = tl.load(x_ptr + i, i < n)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + i, i < n)
    for _ in range(rounds):
        x = tl.exp2(x)
    tl.store(out_ptr + i, x, i < n)


@triton.jit
def product_kernel(
    x_ptr,  # [rows, K]
    w_ptr,  # [K, K]
    out_ptr,  # [rows, K]
    ROWS: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, K)
    x = tl.load(x_ptr + i[:, None] * K + k)  # [ROWS, K]
    w = tl.load(w_ptr + k[:, None] * K + k)  # [K, K]
    tl.store(out_ptr + i[:, None] * K + k, tl.dot(x, w, input_precision=PRECISION).to(x.dtype))


@triton.jit
def broken_kernel(out_ptr, ROWS: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, ROWS), 1)  # where ROWS is no power of two
