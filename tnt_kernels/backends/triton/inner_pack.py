"""Parameters of an inner block as its kernels read them: padded, with what can be folded into them folded.

LayerNorm's gain goes into the weights behind it, its bias through them into their bias; the scale of the
scores and log2(e) into those of the queries. A bias of the keys moves all scores of a query alike and is left
out; since probabilities sum to one, that of the values passes into the projection's. This runs before every
call, a launch of a few microseconds: a copy kept between calls could be out of date.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_kernels.backends.triton.configs import Config
from tnt_kernels.backends.triton.inner_shapes import InnerShape, Packing
from tnt_kernels.backends.triton.runtime import contiguous, launch

__all__ = ["LOG2_E", "PARAMETERS", "pack", "vector"]

_ROWS = 16  # of a packed matrix that a program writes
LOG2_E = 1.4426950408889634

# Of a block, in the order of its operator's schema.
PARAMETERS = (
    "norm1_weight", "norm1_bias", "qk_weight", "qk_bias", "v_weight", "v_bias", "proj_weight", "proj_bias",
    "norm2_weight", "norm2_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias",
)  # fmt: skip


@triton.jit
def vector(ptr, index, mask):
    """Elements of a vector that may be absent, in float32."""
    value = tl.zeros(index.shape, tl.float32)
    if ptr is not None:
        value = tl.load(ptr + index, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def _pack_linear_after_norm(
    out_ptr,  # [rows, CP]
    bias_out_ptr,  # [rows] or None
    w_ptr,  # [outputs, c]
    b_ptr,  # [outputs] or None
    gain_ptr,  # [c]
    shift_ptr,  # [c]
    row,  # [R] rows of the packed matrix
    source,  # [R] the row of w that each of them holds
    valid,  # [R] whether it holds one
    factor,
    c: tl.constexpr,
    CP: tl.constexpr,
    CX: tl.constexpr,  # CP up to a power of two
    BIAS: tl.constexpr,  # whether the column of ones gets one
):
    col = tl.arange(0, CX)
    inside = col < c
    w = tl.load(
        w_ptr + source[:, None] * c + col[None, :], mask=valid[:, None] & inside[None, :], other=0.0
    ).to(tl.float32)
    shift = vector(shift_ptr, col, inside)
    bias = (vector(b_ptr, source, valid) + tl.sum(w * shift[None, :], 1)) * factor
    w = w * vector(gain_ptr, col, inside)[None, :] * factor
    if BIAS:
        w = tl.where((col == c)[None, :], bias[:, None], w)
    tl.store(out_ptr + row[:, None] * CP + col[None, :], w, mask=(col < CP)[None, :])
    if bias_out_ptr is not None:
        tl.store(bias_out_ptr + row, bias)


@triton.jit
def _pack_kernel(
    out_ptr,  # Packing.weights
    bias_ptr,  # Packing.biases
    norm1_weight_ptr,  # [c]
    norm1_bias_ptr,  # [c]
    qk_weight_ptr,  # [2c, c]
    qk_bias_ptr,  # [2c] or None
    v_weight_ptr,  # [c, c]
    v_bias_ptr,  # [c] or None
    proj_weight_ptr,  # [c, c]
    proj_bias_ptr,  # [c] or None
    norm2_weight_ptr,  # [c]
    norm2_bias_ptr,  # [c]
    fc1_weight_ptr,  # [hidden, c]
    fc1_bias_ptr,  # [hidden] or None
    fc2_weight_ptr,  # [c, hidden]
    fc2_bias_ptr,  # [c] or None
    score_scale,  # scale of the scores times log2(e)
    hidden,
    c: tl.constexpr,
    H: tl.constexpr,
    CP: tl.constexpr,
    CX: tl.constexpr,  # CP up to a power of two
    CA: tl.constexpr,
    DP: tl.constexpr,
    GW: tl.constexpr,
    QW: tl.constexpr,  # columns of all groups
    QX: tl.constexpr,  # QW up to a power of two
    HP: tl.constexpr,
    ATTENTION: tl.constexpr,
    MLP: tl.constexpr,
    R: tl.constexpr,
):
    D: tl.constexpr = c // H
    HPG: tl.constexpr = GW // DP
    QKV_BLOCKS: tl.constexpr = 3 * QW // R if ATTENTION else 0
    PROJ_BLOCKS: tl.constexpr = CP // R if ATTENTION else 0
    FC1_BLOCKS: tl.constexpr = HP // R
    FC2_BLOCKS: tl.constexpr = CP // R if MLP else 0
    block = tl.program_id(0)
    row = tl.arange(0, R)
    col = tl.arange(0, CX)

    if ATTENTION:
        if block < QKV_BLOCKS:
            row = block * R + row
            part = block * R // QW  # queries, keys, values
            place = row - part * QW
            head = (place // GW) * HPG + (place % GW) // DP
            channel = place % DP
            valid = (head < H) & (channel < D)
            source = head * D + channel
            if part == 0:
                _pack_linear_after_norm(
                    out_ptr, bias_ptr, qk_weight_ptr, qk_bias_ptr, norm1_weight_ptr, norm1_bias_ptr,
                    row, source, valid, score_scale, c, CP, CX, True,
                )  # fmt: skip
            elif part == 1:
                _pack_linear_after_norm(
                    out_ptr, None, qk_weight_ptr, None, norm1_weight_ptr, norm1_bias_ptr,
                    row, c + source, valid, 1.0, c, CP, CX, False,
                )  # fmt: skip
            else:
                _pack_linear_after_norm(
                    out_ptr, None, v_weight_ptr, None, norm1_weight_ptr, norm1_bias_ptr,
                    row, source, valid, 1.0, c, CP, CX, False,
                )  # fmt: skip
        out_ptr += 3 * QW * CP
        bias_ptr += QW
        block -= QKV_BLOCKS
        if (block >= 0) & (block < PROJ_BLOCKS):
            row = block * R + row
            place = tl.arange(0, QX)
            head = (place // GW) * HPG + (place % GW) // DP
            channel = place % DP
            valid = (place < QW) & (head < H) & (channel < D)
            source = head * D + channel
            w = tl.load(
                proj_weight_ptr + row[:, None] * c + source[None, :],
                mask=(row < c)[:, None] & valid[None, :],
                other=0.0,
            ).to(tl.float32)
            tl.store(out_ptr + row[:, None] * QW + place[None, :], w, mask=(place < QW)[None, :])
            v = tl.load(
                v_weight_ptr + source[:, None] * c + col[None, :],
                mask=valid[:, None] & (col < c)[None, :],
                other=0.0,
            ).to(tl.float32)
            shift = vector(norm1_bias_ptr, col, col < c)
            v_bias = vector(v_bias_ptr, source, valid) + tl.sum(v * shift[None, :], 1)
            bias = vector(proj_bias_ptr, row, row < c) + tl.sum(w * v_bias[None, :], 1)
            tl.store(bias_ptr + row, bias)
        out_ptr += CP * QW
        bias_ptr += CP
        block -= PROJ_BLOCKS

    if MLP:
        if (block >= 0) & (block < FC1_BLOCKS):
            row = block * R + row
            _pack_linear_after_norm(
                out_ptr, bias_ptr, fc1_weight_ptr, fc1_bias_ptr, norm2_weight_ptr, norm2_bias_ptr,
                row, row, row < hidden, 1.0, c, CP, CX, True,
            )  # fmt: skip
        out_ptr += HP * CP
        bias_ptr += HP
        block -= FC1_BLOCKS
        if (block >= 0) & (block < FC2_BLOCKS):
            row = block * R + row
            for start in range(0, HP, 32):
                place = start + tl.arange(0, 32)
                w = tl.load(
                    fc2_weight_ptr + row[:, None] * hidden + place[None, :],
                    mask=(row < c)[:, None] & (place < hidden)[None, :],
                    other=0.0,
                )
                tl.store(out_ptr + row[:, None] * HP + place[None, :], w)
            tl.store(bias_ptr + row, vector(fc2_bias_ptr, row, row < c))
        out_ptr += CP * HP
        block -= FC2_BLOCKS

    if (block >= 0) & (block < CA // R):
        row = block * R + row
        one = tl.where(row[:, None] == col[None, :], 1.0, 0.0)
        tl.store(out_ptr + row[:, None] * CA + col[None, :], one, mask=(col < CA)[None, :])


def pack(
    parameters: Sequence[Tensor | None],  # the 14 of a block, those of an absent half None
    shape: InnerShape,
    score_scale: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Packing:
    """Returns the packed parameters; `dtype` is that of the products' operands."""
    attention, mlp = parameters[0] is not None, parameters[8] is not None
    cp, qw, hp = shape.CP, shape.QW, shape.HP
    rows = (3 * qw + cp if attention else 0) + (hp + cp if mlp else 0) + shape.CA
    size = (4 * qw * cp if attention else 0) + 2 * hp * cp + shape.CA**2
    weights = torch.empty(size, dtype=dtype, device=device)
    biases = torch.empty(
        (qw + cp if attention else 0) + (hp + cp if mlp else 0), dtype=torch.float32, device=device
    )
    pointers = {f"{name}_ptr": contiguous(p) for name, p in zip(PARAMETERS, parameters, strict=True)}
    launch(
        _pack_kernel,
        (rows // _ROWS,),
        {
            "out_ptr": weights, "bias_ptr": biases, **pointers, "score_scale": score_scale * LOG2_E,
            "hidden": shape.hidden,
        },
        {
            "c": shape.c, "H": shape.heads, "CP": cp, "CX": triton.next_power_of_2(cp), "CA": shape.CA,
            "DP": shape.DP, "GW": shape.GW, "QW": qw, "QX": triton.next_power_of_2(qw), "HP": hp,
            "ATTENTION": attention, "MLP": mlp, "R": _ROWS,
        },
        Config(_ROWS, 4),
    )  # fmt: skip
    return Packing(weights, biases)
