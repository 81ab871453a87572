"""From gradients of an inner block's packed parameters to those of its parameters: the chain rule of pack.

With gain g and shift s of a LayerNorm, packed are w' = f w g and b' = f (b + w s), f the scale of the scores
for queries and 1 elsewhere. So dw = f (dw' g + db' s), db = f db', dg = f sum dw' w, ds = f sum db' w.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_kernels.backends.triton.configs import Config
from tnt_kernels.backends.triton.inner_pack import LOG2_E, PARAMETERS, vector
from tnt_kernels.backends.triton.inner_shapes import InnerShape
from tnt_kernels.backends.triton.runtime import contiguous, launch

__all__ = ["unpack"]

_ROWS = 16  # of a parameter that a program writes


@triton.jit
def _store(ptr, offsets, value, mask):
    if ptr is not None:
        tl.store(ptr + offsets, value, mask=mask)


@triton.jit
def _matrix(ptr, row, col, stride, mask):
    return tl.load(ptr + row[:, None] * stride + col[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _qkv_rows(
    sum_ptr,
    w_ptr,  # [rows, c], queries', keys' or values'
    proj_weight_ptr,
    part: tl.constexpr,  # 0 queries, 1 keys, 2 values
    block,
    score_scale,
    c: tl.constexpr,
    H: tl.constexpr,
    CP: tl.constexpr,
    CX: tl.constexpr,
    DP: tl.constexpr,
    GW: tl.constexpr,
    QW: tl.constexpr,
    R: tl.constexpr,
):
    """A block of rows: their weights [R, CX], f dw' [R, CX] and f db' [R]."""
    D: tl.constexpr = c // H
    HPG: tl.constexpr = GW // DP
    row = block * R + tl.arange(0, R)
    col = tl.arange(0, CX)
    inside = row < c
    mask = inside[:, None] & (col < c)[None, :]
    head = row // D
    place = part * QW + (head // HPG) * GW + (head % HPG) * DP + row % D
    w = _matrix(w_ptr, row, col, c, mask)
    dw = _matrix(sum_ptr, place, col, CP, mask)
    if part == 0:
        if c < CP:
            db = tl.load(sum_ptr + place * CP + c, mask=inside, other=0.0)
        else:
            db = tl.load(sum_ptr + 4 * QW * CP + place, mask=inside, other=0.0)
        dw *= score_scale
        db *= score_scale
    elif part == 1:
        # A bias of the keys has no effect.
        db = tl.zeros([R], tl.float32)
    else:
        # That of the values reaches the result through the projection's bias.
        proj = _matrix(proj_weight_ptr, col, row, c, (col < c)[:, None] & inside[None, :])
        dproj_bias = tl.load(sum_ptr + 4 * QW * CP + QW + col, mask=col < c, other=0.0)
        db = tl.sum(proj * dproj_bias[:, None], 0)
    return w, dw, db


@triton.jit
def _store_rows(
    grad_weight_ptr, grad_bias_ptr, first, block, gain_ptr, shift_ptr, dw, db, c: tl.constexpr
):  # fmt: skip
    """Writes a block of rows, which `first` rows of the parameter precede."""
    row = block * dw.shape[0] + tl.arange(0, dw.shape[0])
    col = tl.arange(0, dw.shape[1])
    gain = vector(gain_ptr, col, col < c)
    shift = vector(shift_ptr, col, col < c)
    value = dw * gain[None, :] + db[:, None] * shift[None, :]
    inside = row < c
    _store(
        grad_weight_ptr,
        (first + row)[:, None] * c + col[None, :],
        value,
        inside[:, None] & (col < c)[None, :],
    )
    _store(grad_bias_ptr, first + row, db, inside)


@triton.jit
def _unpack_attention_kernel(
    sum_ptr,  # qkv [3 QW, CP], proj [CP, QW], q's bias [QW], proj's bias [CP]
    norm1_weight_ptr,  # [c]
    norm1_bias_ptr,  # [c]
    qk_weight_ptr,  # [2c, c]
    v_weight_ptr,  # [c, c]
    v_bias_ptr,  # [c] or None
    proj_weight_ptr,  # [c, c]
    grad_norm1_weight_ptr,  # gradients, each of its parameter's shape or None
    grad_norm1_bias_ptr,
    grad_qk_weight_ptr,
    grad_qk_bias_ptr,
    grad_v_weight_ptr,
    grad_v_bias_ptr,
    grad_proj_weight_ptr,
    grad_proj_bias_ptr,
    score_scale,  # scale of the scores times log2(e)
    c: tl.constexpr,
    H: tl.constexpr,
    CP: tl.constexpr,
    CX: tl.constexpr,  # CP up to a power of two
    DP: tl.constexpr,
    GW: tl.constexpr,
    QW: tl.constexpr,
    R: tl.constexpr,
):
    BLOCKS: tl.constexpr = (c + R - 1) // R
    HPG: tl.constexpr = GW // DP
    D: tl.constexpr = c // H
    program = tl.program_id(0)
    block = program % BLOCKS
    job = program // BLOCKS
    if job == 0:
        w, dw, db = _qkv_rows(
            sum_ptr, qk_weight_ptr, proj_weight_ptr, 0, block, score_scale, c, H, CP, CX, DP, GW, QW, R
        )
        _store_rows(
            grad_qk_weight_ptr, grad_qk_bias_ptr, 0, block, norm1_weight_ptr, norm1_bias_ptr, dw, db, c
        )
    elif job == 1:
        w, dw, db = _qkv_rows(
            sum_ptr,
            qk_weight_ptr + c * c,
            proj_weight_ptr,
            1,
            block,
            score_scale,
            c,
            H,
            CP,
            CX,
            DP,
            GW,
            QW,
            R,
        )
        _store_rows(
            grad_qk_weight_ptr, grad_qk_bias_ptr, c, block, norm1_weight_ptr, norm1_bias_ptr, dw, db, c
        )
    elif job == 2:
        w, dw, db = _qkv_rows(
            sum_ptr, v_weight_ptr, proj_weight_ptr, 2, block, score_scale, c, H, CP, CX, DP, GW, QW, R
        )
        _store_rows(grad_v_weight_ptr, grad_v_bias_ptr, 0, block, norm1_weight_ptr, norm1_bias_ptr, dw, db, c)
    elif job == 3:
        # dproj = dy^T (o + b_v), where o lacks the values' bias b_v = v_bias + v_weight norm1_bias.
        row = block * R + tl.arange(0, R)
        col = tl.arange(0, CX)
        square = (col < c)[:, None] & (col < c)[None, :]
        v = _matrix(v_weight_ptr, col, col, c, square)
        v_bias = vector(v_bias_ptr, col, col < c)
        v_bias += tl.sum(v * vector(norm1_bias_ptr, col, col < c)[None, :], 1)
        db = tl.load(sum_ptr + 4 * QW * CP + QW + row, mask=row < c, other=0.0)
        place = (col // D // HPG) * GW + (col // D % HPG) * DP + col % D
        mask = (row < c)[:, None] & (col < c)[None, :]
        dw = _matrix(sum_ptr + 3 * QW * CP, row, place, QW, mask) + db[:, None] * v_bias[None, :]
        _store(grad_proj_weight_ptr, row[:, None] * c + col[None, :], dw, mask)
        _store(grad_proj_bias_ptr, row, db, row < c)
    else:
        col = tl.arange(0, CX)
        dgain = tl.zeros([CX], tl.float32)
        dshift = tl.zeros([CX], tl.float32)
        for block in range(BLOCKS):
            for part in tl.static_range(3):
                ptr = qk_weight_ptr + part * c * c if part < 2 else v_weight_ptr
                w, dw, db = _qkv_rows(
                    sum_ptr, ptr, proj_weight_ptr, part, block, score_scale, c, H, CP, CX, DP, GW, QW, R
                )
                dgain += tl.sum(dw * w, 0)
                dshift += tl.sum(db[:, None] * w, 0)
        _store(grad_norm1_weight_ptr, col, dgain, col < c)
        _store(grad_norm1_bias_ptr, col, dshift, col < c)


@triton.jit
def _fc1_rows(
    sum_ptr, fc1_weight_ptr, block, hidden, c: tl.constexpr, CP: tl.constexpr, CX: tl.constexpr,
    HP: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A block of rows of fc1: its weights [R, CX], dw' [R, CX] and db' [R]."""
    row = block * R + tl.arange(0, R)
    col = tl.arange(0, CX)
    inside = row < hidden
    mask = inside[:, None] & (col < c)[None, :]
    w = _matrix(fc1_weight_ptr, row, col, c, mask)
    dw = _matrix(sum_ptr, row, col, CP, mask)
    if c < CP:
        db = tl.load(sum_ptr + row * CP + c, mask=inside, other=0.0)
    else:
        db = tl.load(sum_ptr + 2 * HP * CP + row, mask=inside, other=0.0)
    return w, dw, db


@triton.jit
def _unpack_mlp_kernel(
    sum_ptr,  # fc1 [HP, CP], fc2 [CP, HP], fc1's bias [HP], fc2's bias [CP]
    norm2_weight_ptr,  # [c]
    norm2_bias_ptr,  # [c]
    fc1_weight_ptr,  # [hidden, c]
    grad_norm2_weight_ptr,  # gradients, each of its parameter's shape or None
    grad_norm2_bias_ptr,
    grad_fc1_weight_ptr,
    grad_fc1_bias_ptr,
    grad_fc2_weight_ptr,
    grad_fc2_bias_ptr,
    hidden,
    c: tl.constexpr,
    CP: tl.constexpr,
    CX: tl.constexpr,  # CP up to a power of two
    HP: tl.constexpr,
    R: tl.constexpr,
):
    BLOCKS: tl.constexpr = HP // R
    program = tl.program_id(0)
    col = tl.arange(0, CX)
    if program < BLOCKS:
        # A block of fc1's rows and of fc2's columns.
        w, dw, db = _fc1_rows(sum_ptr, fc1_weight_ptr, program, hidden, c, CP, CX, HP, R)
        row = program * R + tl.arange(0, R)
        gain = vector(norm2_weight_ptr, col, col < c)
        shift = vector(norm2_bias_ptr, col, col < c)
        mask = (row < hidden)[:, None] & (col < c)[None, :]
        value = dw * gain[None, :] + db[:, None] * shift[None, :]
        _store(grad_fc1_weight_ptr, row[:, None] * c + col[None, :], value, mask)
        _store(grad_fc1_bias_ptr, row, db, row < hidden)
        mask = (col < c)[:, None] & (row < hidden)[None, :]
        value = _matrix(sum_ptr + HP * CP, col, row, HP, mask)
        _store(grad_fc2_weight_ptr, col[:, None] * hidden + row[None, :], value, mask)
    else:
        dgain = tl.zeros([CX], tl.float32)
        dshift = tl.zeros([CX], tl.float32)
        for block in range(BLOCKS):
            w, dw, db = _fc1_rows(sum_ptr, fc1_weight_ptr, block, hidden, c, CP, CX, HP, R)
            dgain += tl.sum(dw * w, 0)
            dshift += tl.sum(db[:, None] * w, 0)
        _store(grad_norm2_weight_ptr, col, dgain, col < c)
        _store(grad_norm2_bias_ptr, col, dshift, col < c)
        dbias = tl.load(sum_ptr + 2 * HP * CP + HP + col, mask=col < c, other=0.0)
        _store(grad_fc2_bias_ptr, col, dbias, col < c)


def unpack(
    parameters: Sequence[Tensor | None],  # the 14 of a block, those of an absent half None
    needed: Sequence[bool],  # one for each
    attention_sums: Tensor | None,  # [InnerShape.attention_sums]
    mlp_sums: Tensor | None,  # [InnerShape.mlp_sums]
    shape: InnerShape,
    scale: float,
) -> list[Tensor]:
    """Returns the needed gradients, each of its parameter's shape and dtype."""
    given = {f"{name}_ptr": contiguous(p) for name, p in zip(PARAMETERS, parameters, strict=True)}
    wanted = {
        f"grad_{name}_ptr": torch.empty_like(p, memory_format=torch.contiguous_format)
        if flag and p is not None
        else None
        for name, p, flag in zip(PARAMETERS, parameters, needed, strict=True)
    }
    widths = {"c": shape.c, "CP": shape.CP, "CX": triton.next_power_of_2(shape.CP), "R": _ROWS}
    if attention_sums is not None:
        launch(
            _unpack_attention_kernel,
            (4 * triton.cdiv(shape.c, _ROWS) + 1,),
            {
                "sum_ptr": attention_sums,
                **_named(given, _unpack_attention_kernel),
                **_named(wanted, _unpack_attention_kernel),
                "score_scale": scale * LOG2_E,
            },
            {**widths, "H": shape.heads, "DP": shape.DP, "GW": shape.GW, "QW": shape.QW},
            Config(_ROWS, 4),
        )
    if mlp_sums is not None:
        launch(
            _unpack_mlp_kernel,
            (shape.HP // _ROWS + 1,),
            {
                "sum_ptr": mlp_sums,
                **_named(given, _unpack_mlp_kernel),
                **_named(wanted, _unpack_mlp_kernel),
                "hidden": shape.hidden,
            },
            {**widths, "HP": shape.HP},
            Config(_ROWS, 4),
        )
    return [gradient for gradient in wanted.values() if gradient is not None]


def _named(values: Mapping[str, Tensor | None], kernel: Any) -> dict[str, Tensor | None]:
    """Those of the values that the kernel has a parameter for."""
    return {name: values[name] for name in kernel.arg_names if name in values}
