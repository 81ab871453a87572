"""Gradients of the inner block on a GPU, a half at a time, each computed again from its input.

A block's backward pass is three kernels: the forward pass of the attention half, for the words between the
halves; the backward pass of the MLP half; that of the attention half. Programs loop over sentences. Gradients
of the weights are summed in float32, by each program in a partial sum of its own in global memory, where it
stays in the caches: registers have no room for it. A last kernel turns the sums of the packed parameters
into gradients of the parameters. The number of programs depends on the problem alone, and so do the bits.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_kernels import _checks
from tnt_kernels._autograd import COMPOSITES
from tnt_kernels.backends.triton.inner_block import (
    batched_dot,
    config_for,
    join_groups,
    launch_forward,
    linear,
    load_words,
    noise,
    normalised,
    probabilities,
    product_dtype,
    runs,
    split_groups,
    store_words,
)
from tnt_kernels.backends.triton.inner_pack import pack
from tnt_kernels.backends.triton.inner_shapes import InnerShape, Packing, inner_shape
from tnt_kernels.backends.triton.inner_unpack import unpack
from tnt_kernels.backends.triton.math import gelu_and_derivative
from tnt_kernels.backends.triton.runtime import contiguous, dot_precision, launch

__all__ = ["inner_attention_backward", "inner_block_backward", "inner_mlp_backward"]

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def rows_of(x):
    """[BS, MP, N] -> [BS MP, N]"""
    return tl.reshape(x, [x.shape[0] * x.shape[1], x.shape[2]])


@triton.jit
def add_product(
    sum_ptr,  # [N, stride] float32, its first of K columns
    stride,
    a,  # [R, N]
    b,  # [R, K]
    started,  # whether the sum holds anything yet
    PRECISION: tl.constexpr,
):
    """sum += a^T b."""
    product = tl.dot(tl.trans(a), b, input_precision=PRECISION)
    ptr = sum_ptr + tl.arange(0, a.shape[1])[:, None] * stride + tl.arange(0, b.shape[1])[None, :]
    before = tl.load(ptr, mask=tl.full(product.shape, 1, tl.int1) & started, other=0.0)
    tl.store(ptr, before + product)


@triton.jit
def add_columns(sum_ptr, a, started, PRECISION: tl.constexpr):
    """sum [N] += the sum of the rows of a [R, N], as a product with ones."""
    N: tl.constexpr = a.shape[1]
    sums = tl.dot(tl.trans(a), tl.full([a.shape[0], 16], 1.0, a.dtype), input_precision=PRECISION)
    column = tl.arange(0, 16)[None, :]
    ptr = sum_ptr + tl.arange(0, N)[:, None] + 0 * column
    # A block first: in Triton 3.9's interpreter (column == 0) & started is of int32.
    loaded = (column == 0) & (tl.full(column.shape, 1, tl.int1) & started)
    before = tl.load(ptr, mask=loaded, other=0.0)
    tl.store(ptr, before + sums, mask=tl.broadcast_to(column == 0, [N, 16]))


@triton.jit
def linear_input_gradient(
    grad,  # [BS, MP, K]
    w_ptr,  # [K, CA + CB]
    da,  # [BS, MP, CA]
    db,  # [BS, MP, CB]
    CA: tl.constexpr,
    CB: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d + grad w."""
    w_ptr += tl.arange(0, grad.shape[2])[:, None] * (CA + CB)
    da = batched_dot(grad, tl.load(w_ptr + tl.arange(0, CA)[None, :]), da, PRECISION)
    if CB:
        db = batched_dot(grad, tl.load(w_ptr + CA + tl.arange(0, CB)[None, :]), db, PRECISION)
    return da, db


@triton.jit
def linear_output_gradient(
    ga,  # [BS, MP, CA]
    gb,  # [BS, MP, CB]
    w_ptr,  # [CA + CB, stride], its first of N columns
    stride,
    N: tl.constexpr,
    CA: tl.constexpr,
    CB: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """g w: the gradient of the input [BS, MP, N] of a linear layer that puts out words."""
    w_ptr += tl.arange(0, N)[None, :]
    d = tl.zeros([ga.shape[0], ga.shape[1], N], tl.float32)
    d = batched_dot(ga, tl.load(w_ptr + tl.arange(0, CA)[:, None] * stride), d, PRECISION)
    if CB:
        d = batched_dot(gb, tl.load(w_ptr + (CA + tl.arange(0, CB))[:, None] * stride), d, PRECISION)
    return d


@triton.jit
def norm_backward(ga, gb, da, db, xa, xb, mean, rstd, c: tl.constexpr, CA: tl.constexpr, CB: tl.constexpr):
    """g + the gradient of x, given that d of its LayerNorm (without gain); all [BS, MP, CA or CB]."""
    cola = tl.arange(0, CA)[None, None, :]
    na = (xa - mean[:, :, None]) * rstd[:, :, None]
    da = tl.where(cola < c, da, 0.0)
    sum_d = tl.sum(da, 2)
    sum_dn = tl.sum(da * na, 2)
    if CB:
        colb = CA + tl.arange(0, CB)[None, None, :]
        nb = (xb - mean[:, :, None]) * rstd[:, :, None]
        db = tl.where(colb < c, db, 0.0)
        sum_d += tl.sum(db, 2)
        sum_dn += tl.sum(db * nb, 2)
    sum_d = (sum_d * (1.0 / c))[:, :, None]
    sum_dn = (sum_dn * (1.0 / c))[:, :, None]
    ya = ga + rstd[:, :, None] * (da - sum_d - na * sum_dn)
    yb = ya
    if CB:
        yb = gb + rstd[:, :, None] * (db - sum_d - nb * sum_dn)
    return ya, yb


@triton.jit
def branch_gradient(ga, gb, drop_path_ptr, left, CB: tl.constexpr, T: tl.constexpr):
    """The gradient of a branch's output, in dtype T: that of the half's output by drop path's factor."""
    if drop_path_ptr is not None:
        sentence = tl.arange(0, ga.shape[0])
        factor = tl.load(drop_path_ptr + sentence, mask=sentence < left, other=0.0)[:, None, None]
        ga *= factor
        gb *= factor
    if not CB:
        gb = ga
    return ga.to(T), gb.to(T)


@triton.jit
def _mlp_backward_kernel(
    x_ptr,  # [S, m, c]
    grad_ptr,  # [S, m, c]
    grad_x_ptr,  # [S, m, c] or None
    w_ptr,  # Packing.weights, without an attention half
    bias_ptr,  # Packing.biases, likewise
    sums_ptr,  # [programs, InnerShape.mlp_sums] float32, or None
    drop_path_ptr,  # [S] or None
    S,
    tiles,
    size,
    eps,
    m: tl.constexpr,
    c: tl.constexpr,
    H: tl.constexpr,
    MP: tl.constexpr,
    CA: tl.constexpr,
    CB: tl.constexpr,
    DP: tl.constexpr,
    GW: tl.constexpr,
    NG: tl.constexpr,
    HP: tl.constexpr,
    HC: tl.constexpr,
    LOOPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BS: tl.constexpr,
):
    T: tl.constexpr = w_ptr.dtype.element_ty
    CP: tl.constexpr = CA + CB
    ONES: tl.constexpr = c < CP
    eye_ptr = w_ptr + 2 * HP * CP
    program = tl.program_id(0).to(tl.int64)
    if sums_ptr is not None:
        sums_ptr += program * size
    for tile in range(program, tiles, tl.num_programs(0)):
        started = tile >= tl.num_programs(0)
        first = tile * BS
        left = S - first
        xa, xb = load_words(x_ptr + first * (m * c), eye_ptr, left, m, c, BS, MP, CA, CB, T)
        na, nb, mean, rstd = normalised(xa, xb, eps, c, CA, CB, T)
        ga, gb = load_words(grad_ptr + first * (m * c), eye_ptr, left, m, c, BS, MP, CA, CB, T)
        factor_ptr = drop_path_ptr
        if drop_path_ptr is not None:
            factor_ptr += first
        ta, tb = branch_gradient(ga, gb, factor_ptr, left, CB, T)
        da = tl.zeros([BS, MP, CA], tl.float32)
        db = tl.zeros([BS, MP, CB if CB else CA], tl.float32)
        for n in range(0, HP, HC):
            if ONES:
                h = linear(na, nb, w_ptr + n * CP, None, HC, CA, CB, PRECISION)
            else:
                h = linear(na, nb, w_ptr + n * CP, bias_ptr + n, HC, CA, CB, PRECISION)
            activation, derivative = gelu_and_derivative(h, T)
            dh = linear_output_gradient(ta, tb, w_ptr + HP * CP + n, HP, HC, CA, CB, PRECISION)
            dh = (dh * derivative).to(T)
            if grad_x_ptr is not None:
                da, db = linear_input_gradient(dh, w_ptr + n * CP, da, db, CA, CB, PRECISION)
            if sums_ptr is not None:
                dh = rows_of(dh)
                activation = rows_of(activation.to(T))
                fc1_ptr = sums_ptr + n * CP
                fc2_ptr = sums_ptr + HP * CP + n
                add_product(fc1_ptr, CP, dh, rows_of(na), started, PRECISION)
                add_product(fc2_ptr, HP, rows_of(ta), activation, started, PRECISION)
                if CB:
                    add_product(fc1_ptr + CA, CP, dh, rows_of(nb), started, PRECISION)
                    add_product(fc2_ptr + CA * HP, HP, rows_of(tb), activation, started, PRECISION)
                if not ONES:
                    add_columns(sums_ptr + 2 * HP * CP + n, dh, started, PRECISION)
        if sums_ptr is not None:
            bias_sum_ptr = sums_ptr + 2 * HP * CP + HP
            add_columns(bias_sum_ptr, rows_of(ta), started, PRECISION)
            if CB:
                add_columns(bias_sum_ptr + CA, rows_of(tb), started, PRECISION)
            # Another thread may add to the sums next time.
            tl.debug_barrier()
        if grad_x_ptr is not None:
            if not CB:
                db = da
            # Read again: kept in registers all the while, they would push others into local memory.
            xa, xb = load_words(x_ptr + first * (m * c), eye_ptr, left, m, c, BS, MP, CA, CB, T)
            ga, gb = load_words(grad_ptr + first * (m * c), eye_ptr, left, m, c, BS, MP, CA, CB, T)
            ya, yb = norm_backward(ga, gb, da, db, xa, xb, mean, rstd, c, CA, CB)
            store_words(grad_x_ptr + first * (m * c), ya, yb, left, m, c, CA, CB)


@triton.jit
def attention_backward(
    q,  # [B, MP, GW] float32
    k,  # [B, MP, GW] float32
    v,  # [B, MP, GW] float32
    grad,  # [B, MP, GW] float32, of the result
    m: tl.constexpr,
    DP: tl.constexpr,
    T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Returns softmax(q k) v and the gradients of q, k and v, all [B, MP, GW] float32."""
    GW: tl.constexpr = q.shape[2]
    column = tl.arange(0, GW)[None, None, :]
    k_transposed = tl.trans(k.to(T), 0, 2, 1)
    v_transposed = tl.trans(v.to(T), 0, 2, 1)
    out = tl.zeros(q.shape, tl.float32)
    dq = tl.zeros(q.shape, tl.float32)
    dk = tl.zeros(q.shape, tl.float32)
    dv = tl.zeros(q.shape, tl.float32)
    for h in tl.static_range(GW // DP):
        mine = (column >= h * DP) & (column < (h + 1) * DP)
        p, inverse_sum = probabilities(q, k_transposed, h, m, DP, T, PRECISION)
        p *= inverse_sum[:, :, None]
        g = tl.where(mine, grad, 0.0).to(T)
        dp = tl.dot(g, v_transposed, input_precision=PRECISION)
        # The scores are powers of two's exponents.
        ds = (p * (dp - tl.sum(p * dp, 2)[:, :, None]) * LN_2).to(T)
        p = p.to(T)
        out = tl.dot(p, tl.where(mine, v, 0.0).to(T), out, input_precision=PRECISION)
        dq = tl.dot(ds, tl.where(mine, k, 0.0).to(T), dq, input_precision=PRECISION)
        q_of_head = tl.where(mine, q, 0.0).to(T)
        dk = tl.dot(tl.trans(ds, 0, 2, 1), q_of_head, dk, input_precision=PRECISION)
        dv = tl.dot(tl.trans(p, 0, 2, 1), g, dv, input_precision=PRECISION)
    return out, dq, dk, dv


@triton.jit
def _attention_backward_kernel(
    x_ptr,  # [S, m, c]
    grad_ptr,  # [S, m, c]
    grad_x_ptr,  # [S, m, c] or None
    w_ptr,  # Packing.weights, whose first part is the attention half's
    bias_ptr,  # Packing.biases, likewise
    sums_ptr,  # [programs, InnerShape.attention_sums] float32, or None
    drop_path_ptr,  # [S] or None
    S,
    tiles,
    size,
    eye,  # where in the weights the identity is
    eps,
    m: tl.constexpr,
    c: tl.constexpr,
    H: tl.constexpr,
    MP: tl.constexpr,
    CA: tl.constexpr,
    CB: tl.constexpr,
    DP: tl.constexpr,
    GW: tl.constexpr,
    NG: tl.constexpr,
    HP: tl.constexpr,
    HC: tl.constexpr,
    LOOPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BS: tl.constexpr,
):
    T: tl.constexpr = w_ptr.dtype.element_ty
    CP: tl.constexpr = CA + CB
    ONES: tl.constexpr = c < CP
    QW: tl.constexpr = NG * GW
    NB: tl.constexpr = NG // LOOPS
    LW: tl.constexpr = NB * GW
    program = tl.program_id(0).to(tl.int64)
    if sums_ptr is not None:
        sums_ptr += program * size
    for tile in range(program, tiles, tl.num_programs(0)):
        started = tile >= tl.num_programs(0)
        first = tile * BS
        left = S - first
        xa, xb = load_words(x_ptr + first * (m * c), w_ptr + eye, left, m, c, BS, MP, CA, CB, T)
        na, nb, mean, rstd = normalised(xa, xb, eps, c, CA, CB, T)
        ga, gb = load_words(grad_ptr + first * (m * c), w_ptr + eye, left, m, c, BS, MP, CA, CB, T)
        factor_ptr = drop_path_ptr
        if drop_path_ptr is not None:
            factor_ptr += first
        ta, tb = branch_gradient(ga, gb, factor_ptr, left, CB, T)
        da = tl.zeros([BS, MP, CA], tl.float32)
        db = tl.zeros([BS, MP, CB if CB else CA], tl.float32)
        for loop in range(LOOPS):
            n = loop * LW
            q_ptr = w_ptr + n * CP
            k_ptr = q_ptr + QW * CP
            v_ptr = k_ptr + QW * CP
            proj_ptr = w_ptr + 3 * QW * CP + n
            if ONES:
                q = linear(na, nb, q_ptr, None, LW, CA, CB, PRECISION)
            else:
                q = linear(na, nb, q_ptr, bias_ptr + n, LW, CA, CB, PRECISION)
            k = linear(na, nb, k_ptr, None, LW, CA, CB, PRECISION)
            v = linear(na, nb, v_ptr, None, LW, CA, CB, PRECISION)
            grad = linear_output_gradient(ta, tb, proj_ptr, QW, LW, CA, CB, PRECISION)
            out, dq, dk, dv = attention_backward(
                split_groups(q, NB, GW), split_groups(k, NB, GW), split_groups(v, NB, GW),
                split_groups(grad, NB, GW), m, DP, T, PRECISION,
            )  # fmt: skip
            out = join_groups(out.to(T), NB, GW)
            dq = join_groups(dq.to(T), NB, GW)
            dk = join_groups(dk.to(T), NB, GW)
            dv = join_groups(dv.to(T), NB, GW)
            if grad_x_ptr is not None:
                da, db = linear_input_gradient(dq, q_ptr, da, db, CA, CB, PRECISION)
                da, db = linear_input_gradient(dk, k_ptr, da, db, CA, CB, PRECISION)
                da, db = linear_input_gradient(dv, v_ptr, da, db, CA, CB, PRECISION)
            if sums_ptr is not None:
                row_ptr = sums_ptr + n * CP
                add_product(row_ptr, CP, rows_of(dq), rows_of(na), started, PRECISION)
                add_product(row_ptr + QW * CP, CP, rows_of(dk), rows_of(na), started, PRECISION)
                add_product(row_ptr + 2 * QW * CP, CP, rows_of(dv), rows_of(na), started, PRECISION)
                column_ptr = sums_ptr + 3 * QW * CP + n
                add_product(column_ptr, QW, rows_of(ta), rows_of(out), started, PRECISION)
                if CB:
                    add_product(row_ptr + CA, CP, rows_of(dq), rows_of(nb), started, PRECISION)
                    add_product(row_ptr + QW * CP + CA, CP, rows_of(dk), rows_of(nb), started, PRECISION)
                    add_product(row_ptr + 2 * QW * CP + CA, CP, rows_of(dv), rows_of(nb), started, PRECISION)
                    add_product(column_ptr + CA * QW, QW, rows_of(tb), rows_of(out), started, PRECISION)
                if not ONES:
                    add_columns(sums_ptr + 4 * QW * CP + n, rows_of(dq), started, PRECISION)
        if sums_ptr is not None:
            bias_sum_ptr = sums_ptr + 4 * QW * CP + QW
            add_columns(bias_sum_ptr, rows_of(ta), started, PRECISION)
            if CB:
                add_columns(bias_sum_ptr + CA, rows_of(tb), started, PRECISION)
            tl.debug_barrier()
        if grad_x_ptr is not None:
            if not CB:
                db = da
            # Read again: kept in registers all the while, they would push others into local memory.
            xa, xb = load_words(x_ptr + first * (m * c), w_ptr + eye, left, m, c, BS, MP, CA, CB, T)
            ga, gb = load_words(grad_ptr + first * (m * c), w_ptr + eye, left, m, c, BS, MP, CA, CB, T)
            ya, yb = norm_backward(ga, gb, da, db, xa, xb, mean, rstd, c, CA, CB)
            store_words(grad_x_ptr + first * (m * c), ya, yb, left, m, c, CA, CB)


# Programs of a backward kernel: two for each multiprocessor of an H100. A constant, because it decides in
# which order gradients are summed.
_PROGRAMS = 264


def _launch_half(
    kernel: Any,
    x: Tensor,  # [S, m, c]
    grad: Tensor,  # [S, m, c]
    packed: Packing,
    shape: InnerShape,
    drop_path: Tensor | None,
    eps: float,
    size: int,  # of the sums
    words: bool,  # whether the gradient of x is wanted
    weights: bool,  # whether one of the half's parameters' is
    **more: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradient of x and the sums of the packed parameters' gradients, each if it is wanted."""
    dtype = packed.weights.dtype
    config = config_for(kernel.__name__.removeprefix("_").removesuffix("_kernel"), x, shape, dtype)
    sentences = max(config.rows // shape.MP, 1)
    tiles = triton.cdiv(x.shape[0], sentences)
    programs = min(tiles, _PROGRAMS)
    grad_x = torch.empty_like(x) if words else None
    sums = torch.empty((programs, size), dtype=torch.float32, device=x.device) if weights else None
    arguments = {
        "x_ptr": x, "grad_ptr": grad, "grad_x_ptr": grad_x, "w_ptr": packed.weights,
        "bias_ptr": packed.biases, "sums_ptr": sums, "drop_path_ptr": contiguous(drop_path),
        "S": x.shape[0], "tiles": tiles, "size": size, "eps": eps, **more,
    }  # fmt: skip
    constants = {**shape.constants, "PRECISION": dot_precision(dtype), "BS": sentences}
    launch(kernel, (programs,), arguments, constants, config)
    return grad_x, None if sums is None else sums.sum(0)


def _launch(
    grad: Tensor,  # [S, m, c]
    needed: Sequence[bool],  # of x and the 14 parameters
    x: Tensor,  # [S, m, c]
    parameters: Sequence[Tensor | None],
    num_heads: int,
    scale: float,
    eps1: float,
    eps2: float,
    compute_dtype: torch.dtype | None,
    drop_path1: Tensor | None,
    drop_path2: Tensor | None,
) -> list[Tensor]:
    wanted = [
        tensor for tensor, flag in zip((x, *parameters), needed, strict=True) if flag and tensor is not None
    ]
    if x.numel() == 0 or not wanted:
        return [torch.zeros_like(tensor) for tensor in wanted]
    fc1_weight = parameters[10]
    _, m, c = x.shape
    shape = inner_shape(m, c, num_heads, 0 if fc1_weight is None else fc1_weight.shape[0])
    dtype = product_dtype(x, compute_dtype)
    x, grad = x.contiguous(), grad.contiguous()
    attention, mlp = parameters[:8], parameters[8:]
    no_attention, no_mlp = (None,) * 8, (None,) * 6
    attention_sums = mlp_sums = None
    below = needed[0] or any(needed[1:9])  # whether the gradient reaches the attention half

    if parameters[0] is not None:
        attention_only = inner_shape(m, c, num_heads, 0)
        packed_attention = pack((*attention, *no_mlp), attention_only, scale, dtype, x.device)
    if parameters[8] is not None:
        between = x
        if parameters[0] is not None:
            between = launch_forward(
                x, packed_attention, attention_only, True, False, eps1, eps2, drop_path1, None
            )
        packed = pack((*no_attention, *mlp), shape, scale, dtype, x.device)
        grad_between, mlp_sums = _launch_half(
            _mlp_backward_kernel, between, grad, packed, shape, drop_path2, eps2, shape.mlp_sums,
            below, any(needed[9:]),
        )  # fmt: skip
        if grad_between is not None:
            grad = grad_between
    if parameters[0] is not None and below:
        grad_x, attention_sums = _launch_half(
            _attention_backward_kernel, x, grad, packed_attention, attention_only, drop_path1, eps1,
            shape.attention_sums, needed[0], any(needed[1:9]), eye=4 * shape.QW * shape.CP,
        )  # fmt: skip
        if grad_x is not None:
            grad = grad_x
    gradients = unpack(parameters, needed[1:], attention_sums, mlp_sums, shape, scale)
    return ([grad] if needed[0] else []) + gradients


def inner_block_backward(grad: Tensor, needed: Sequence[bool], x: Tensor, *args: Any) -> list[Tensor]:
    parameters, options = args[:14], args[14:]
    num_heads, scale, eps1, eps2, compute_dtype = options[:5]
    drop_path1, drop_path2, seed, *drops = noise(options[5:], 3, 4)
    _checks.check_inner_block(x, *parameters, num_heads, compute_dtype)
    _checks.check_drop_path("inner_block", x, drop_path1=drop_path1, drop_path2=drop_path2)
    _checks.check_dropout("inner_block", x, (seed, *drops), _checks.DROPS)
    _checks.check_gradient("inner_block_backward", grad, x.shape, x.dtype, x.device)
    # Drop path's factors have no gradient here.
    if any(needed[15:]) or not runs("inner_block", x, compute_dtype, drops):
        return COMPOSITES["inner_block_backward"](grad, needed, x, *args)
    return _launch(
        grad, needed[:15], x, parameters, num_heads, scale, eps1, eps2, compute_dtype, drop_path1, drop_path2
    )


def inner_attention_backward(grad: Tensor, needed: Sequence[bool], x: Tensor, *args: Any) -> list[Tensor]:
    parameters, options = args[:8], args[8:]
    num_heads, scale, eps, compute_dtype = options[:4]
    drop_path, seed, *drops = noise(options[4:], 2, 2)
    _checks.check_inner_attention(x, *(*parameters, num_heads, compute_dtype))
    _checks.check_drop_path("inner_attention", x, drop_path=drop_path)
    _checks.check_dropout("inner_attention", x, (seed, *drops), _checks.ATTENTION_DROPS)
    _checks.check_gradient("inner_attention_backward", grad, x.shape, x.dtype, x.device)
    if any(needed[9:]) or not runs("inner_attention", x, compute_dtype, drops):
        return COMPOSITES["inner_attention_backward"](grad, needed, x, *args)
    flags = (*needed[:9], *([False] * 6))
    absent = (None,) * 6
    return _launch(
        grad, flags, x, (*parameters, *absent), num_heads, scale, eps, eps, compute_dtype, drop_path, None
    )


def inner_mlp_backward(grad: Tensor, needed: Sequence[bool], x: Tensor, *args: Any) -> list[Tensor]:
    parameters, options = args[:6], args[6:]
    eps, compute_dtype = options[:2]
    drop_path, seed, *drops = noise(options[2:], 2, 2)
    _checks.check_inner_mlp(x, *(*parameters, compute_dtype))
    _checks.check_drop_path("inner_mlp", x, drop_path=drop_path)
    _checks.check_dropout("inner_mlp", x, (seed, *drops), _checks.MLP_DROPS)
    _checks.check_gradient("inner_mlp_backward", grad, x.shape, x.dtype, x.device)
    if any(needed[7:]) or not runs("inner_mlp", x, compute_dtype, drops):
        return COMPOSITES["inner_mlp_backward"](grad, needed, x, *args)
    flags = (needed[0], *([False] * 8), *needed[1:7])
    absent = (None,) * 8
    return _launch(grad, flags, x, (*absent, *parameters), 1, 1.0, eps, eps, compute_dtype, None, drop_path)
