"""Functions that the kernels share. Exact GELU and LayerNorm without libdevice or inline assembly."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["batched_dot", "gelu", "gelu_and_derivative", "normal_tail"]


@triton.jit
def normal_tail(a, DEGREE: tl.constexpr):
    """Phi(-a) of the normal distribution, a >= 0: 2 to a polynomial fitted to log2 Phi(-a).

    Largest absolute error of a Phi(-a): 9e-5 for degree 3, 7e-7 for degree 5 and 6e-8 for degree 8, the last
    two of Phi(-a) itself, too. For every finite a beyond the fit, 2 to the polynomial is below 2^-68.
    """
    if DEGREE == 3:
        p = -0.02764565 * a - 0.48822161
        p = p * a - 1.14093674
        p = p * a - 1.0
    elif DEGREE == 5:
        p = -0.000500277143 * a + 0.00728247706
        p = p * a - 0.0523434308
        p = p * a - 0.459413928
        p = p * a - 1.15105209
        p = p * a - 1.00000185
    else:
        p = -2.27605237e-6 * a + 3.29701342e-5
        p = p * a - 0.000157288722
        p = p * a - 0.000202454958
        p = p * a + 0.00714275
        p = p * a - 0.0525464131
        p = p * a - 0.459193066
        p = p * a - 1.15110694
        p = p * a - 0.999999959
    return tl.exp2(p)


@triton.jit
def gelu(x, T: tl.constexpr):
    """x Phi(x) = max(x, 0) - |x| Phi(-|x|), to the accuracy of dtype T: a twentieth of its rounding error."""
    a = tl.abs(x)
    tail = normal_tail(a, 8 if tl.float32 == T else (5 if tl.float16 == T else 3))
    return tl.maximum(x, 0.0) - a * tail


@triton.jit
def gelu_and_derivative(x, T: tl.constexpr):
    """GELU, and its derivative Phi(x) + x phi(x), to the accuracy of dtype T."""
    a = tl.abs(x)
    tail = normal_tail(a, 8 if tl.float32 == T else 5)
    # phi(x) = exp(-x^2 / 2) / sqrt(2 pi)
    density = 0.3989422804 * tl.exp2(-0.7213475204 * a * a)
    value = tl.maximum(x, 0.0) - a * tail
    return value, tl.where(x > 0.0, 1.0 - tail, tail) + x * density


@triton.jit
def batched_dot(x, w, acc, PRECISION: tl.constexpr):
    """acc + x w for each of a batch: x [B, M, K], w [K, N], acc [B, M, N] float32.

    A three-dimensional product gives every warp sentences of its own, so that what one product puts out is
    the operand of the next without leaving the warp's registers.
    """
    shape: tl.constexpr = [x.shape[0], w.shape[0], w.shape[1]]
    return tl.dot(x, tl.broadcast_to(w[None], shape), acc, input_precision=PRECISION)
