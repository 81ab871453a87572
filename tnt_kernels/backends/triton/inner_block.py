"""The inner block on a GPU: attention and MLP of every sentence in one kernel, words read and written once.

A program takes a few sentences through the whole block in registers. What decides its speed is the number of
instructions for each sentence, more than memory or the tensor cores; docs/design.md says what that led to.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_kernels import _checks, dispatch
from tnt_kernels.backends import reference
from tnt_kernels.backends.triton.configs import Config, config_of
from tnt_kernels.backends.triton.inner_pack import pack
from tnt_kernels.backends.triton.inner_shapes import InnerShape, Packing, inner_shape
from tnt_kernels.backends.triton.math import batched_dot, gelu
from tnt_kernels.backends.triton.runtime import architecture, contiguous, dot_precision, launch

__all__ = ["inner_attention", "inner_block", "inner_mlp"]


@triton.jit
def normalised(xa, xb, eps, c: tl.constexpr, CA: tl.constexpr, CB: tl.constexpr, T: tl.constexpr):
    """LayerNorm of words without gain and bias, in dtype T, and a column of ones behind the last channel.

    xa [BS, MP, CA] and xb [BS, MP, CB] are the channels in float32; without a CB, xb is xa. Also returns the
    means and the reciprocal deviations [BS, MP].
    """
    mean = tl.sum(xa, 2)
    if CB:
        mean += tl.sum(xb, 2)
    mean *= 1.0 / c
    cola = tl.arange(0, CA)[None, None, :]
    da = tl.where(cola < c, xa - mean[:, :, None], 0.0)
    variance = tl.sum(da * da, 2)
    if CB:
        colb = CA + tl.arange(0, CB)[None, None, :]
        db = tl.where(colb < c, xb - mean[:, :, None], 0.0)
        variance += tl.sum(db * db, 2)
    rstd = tl.rsqrt(variance * (1.0 / c) + eps)
    na = tl.where(cola == c, 1.0, da * rstd[:, :, None]).to(T)
    nb = na
    if CB:
        nb = tl.where(colb == c, 1.0, db * rstd[:, :, None]).to(T)
    return na, nb, mean, rstd


@triton.jit
def linear(
    na,  # [BS, MP, CA]
    nb,  # [BS, MP, CB]
    w_ptr,  # [N, CA + CB], the first of N rows
    bias_ptr,  # [N] float32, or None
    N: tl.constexpr,
    CA: tl.constexpr,
    CB: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """n w^T + bias: [BS, MP, N]."""
    n = tl.arange(0, N)[None, :]
    y = tl.zeros([na.shape[0], na.shape[1], N], tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + tl.arange(0, N))[None, None, :]
    w = tl.load(w_ptr + n * (CA + CB) + tl.arange(0, CA)[:, None])
    y = batched_dot(na, w, y, PRECISION)
    if CB:
        w = tl.load(w_ptr + n * (CA + CB) + CA + tl.arange(0, CB)[:, None])
        y = batched_dot(nb, w, y, PRECISION)
    return y


@triton.jit
def linear_transposed(
    na, nb, w_ptr, N: tl.constexpr, CA: tl.constexpr, CB: tl.constexpr, PRECISION: tl.constexpr
):
    """(n w^T)^T: [BS, N, MP]. Transposed it is a right operand as it lies in registers; n w^T is not."""
    BS: tl.constexpr = na.shape[0]
    w_ptr += tl.arange(0, N)[:, None] * (CA + CB)
    w = tl.broadcast_to(tl.load(w_ptr + tl.arange(0, CA)[None, :])[None], [BS, N, CA])
    y = tl.dot(w, tl.trans(na, 0, 2, 1), input_precision=PRECISION)
    if CB:
        w = tl.broadcast_to(tl.load(w_ptr + CA + tl.arange(0, CB)[None, :])[None], [BS, N, CB])
        y = tl.dot(w, tl.trans(nb, 0, 2, 1), y, input_precision=PRECISION)
    return y


@triton.jit
def split_groups(x, NB: tl.constexpr, GW: tl.constexpr):
    """[BS, MP, NB GW] -> [NB BS, MP, GW]: the groups join the sentences, within a warp."""
    BS: tl.constexpr = x.shape[0]
    MP: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, [BS, MP, NB, GW]), 2, 0, 1, 3), [NB * BS, MP, GW])


@triton.jit
def join_groups(x, NB: tl.constexpr, GW: tl.constexpr):
    """The inverse of split_groups."""
    BS: tl.constexpr = x.shape[0] // NB
    MP: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, [NB, BS, MP, GW]), 1, 2, 0, 3), [BS, MP, NB * GW])


@triton.jit
def probabilities(
    q, k, h: tl.constexpr, m: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr
):
    """Softmax of head h of each group before its division: 2^(scores - their largest), and 1 / their sum.

    q [B, MP, GW] float32, with log2(e) and the scale in it; k [B, GW, MP] in dtype T. Returns [B, MP, MP]
    and [B, MP] in float32.
    """
    GW: tl.constexpr = q.shape[2]
    if DP < GW:
        # Where a head's channels fill registers, as at DP = 8, this costs nothing.
        column = tl.arange(0, GW)[None, None, :]
        q = tl.where((column >= h * DP) & (column < (h + 1) * DP), q, 0.0)
    scores = tl.dot(q.to(T), k, input_precision=PRECISION)
    MP: tl.constexpr = q.shape[1]
    if m < MP:
        scores = tl.where(tl.arange(0, MP)[None, None, :] < m, scores, float("-inf"))
    p = tl.exp2(scores - tl.max(scores, 2)[:, :, None])
    # Cheaper than a division, and within 3e-7.
    root = tl.rsqrt(tl.sum(p, 2))
    return p, root * root


@triton.jit
def attention(
    q,  # [B, MP, GW] float32
    k,  # [B, GW, MP] in dtype T
    v,  # [B, MP, GW] float32
    m: tl.constexpr,
    DP: tl.constexpr,
    T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """softmax(q k) v of the heads of each group: [B, MP, GW] float32."""
    GW: tl.constexpr = q.shape[2]
    column = tl.arange(0, GW)[None, None, :]
    out = tl.zeros(q.shape, tl.float32)
    inverse = tl.zeros(q.shape, tl.float32)
    for h in tl.static_range(GW // DP):
        p, inverse_sum = probabilities(q, k, h, m, DP, T, PRECISION)
        mine = (column >= h * DP) & (column < (h + 1) * DP)
        out = tl.dot(p.to(T), tl.where(mine, v, 0.0).to(T), out, input_precision=PRECISION)
        inverse = tl.where(mine, inverse_sum[:, :, None], inverse)
    return out * inverse


@triton.jit
def load_words(
    x_ptr,  # [BS, m, c], the program's first sentence
    eye_ptr,  # [CA, CA] identity
    left,  # sentences from that one on
    m: tl.constexpr,
    c: tl.constexpr,
    BS: tl.constexpr,
    MP: tl.constexpr,
    CA: tl.constexpr,
    CB: tl.constexpr,
    T: tl.constexpr,
):
    """Words [BS, MP, CA] and [BS, MP, CB] in float32, zero beyond m, c and `left`, in a product's layout."""
    sentence = tl.arange(0, BS)[:, None, None]
    word = tl.arange(0, MP)[None, :, None]
    ptr = x_ptr + sentence * (m * c) + word * c
    inside = (sentence < left) & (word < m)
    # Multiplied by the identity, 16-bit words become exact float32 sums where the products want them:
    # fewer instructions than to convert them and to move them there.
    BY_PRODUCT: tl.constexpr = (x_ptr.dtype.element_ty == T) and (tl.float32 != T)
    cola = tl.arange(0, CA)
    xa = tl.load(ptr + cola[None, None, :], mask=inside & (cola < c)[None, None, :], other=0.0)
    if BY_PRODUCT:
        eye = tl.load(eye_ptr + cola[None, :] * CA + cola[:, None])
        xa = batched_dot(xa, eye, tl.zeros([BS, MP, CA], tl.float32), "tf32")
    else:
        xa = xa.to(tl.float32)
    xb = xa
    if CB:
        colb = tl.arange(0, CB)
        xb = tl.load(ptr + CA + colb[None, None, :], mask=inside & (CA + colb < c)[None, None, :], other=0.0)
        if BY_PRODUCT:
            eye = tl.load(eye_ptr + colb[None, :] * CA + colb[:, None])
            xb = batched_dot(xb, eye, tl.zeros([BS, MP, CB], tl.float32), "tf32")
        else:
            xb = xb.to(tl.float32)
    return xa, xb


@triton.jit
def store_words(out_ptr, ya, yb, left, m: tl.constexpr, c: tl.constexpr, CA: tl.constexpr, CB: tl.constexpr):
    """Writes [BS, MP, CA] and [BS, MP, CB] to the program's sentences of out [S, m, c]."""
    sentence = tl.arange(0, ya.shape[0])[:, None, None]
    word = tl.arange(0, ya.shape[1])[None, :, None]
    ptr = out_ptr + sentence * (m * c) + word * c
    inside = (sentence < left) & (word < m)
    cola = tl.arange(0, CA)[None, None, :]
    tl.store(ptr + cola, ya, mask=inside & (cola < c))
    if CB:
        colb = CA + tl.arange(0, CB)[None, None, :]
        tl.store(ptr + colb, yb, mask=inside & (colb < c))


@triton.jit
def attention_half(
    xa, xb, w_ptr, bias_ptr, drop_path_ptr, left, eps,
    m: tl.constexpr, c: tl.constexpr, CA: tl.constexpr, CB: tl.constexpr, DP: tl.constexpr, GW: tl.constexpr,
    NG: tl.constexpr, LOOPS: tl.constexpr, V_TRANSPOSED: tl.constexpr, T: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x + proj(attention(LN(x))), of words as load_words returns them."""
    CP: tl.constexpr = CA + CB
    QW: tl.constexpr = NG * GW
    NB: tl.constexpr = NG // LOOPS  # groups at a time
    LW: tl.constexpr = NB * GW
    na, nb, _, _ = normalised(xa, xb, eps, c, CA, CB, T)
    # What the branch is added to: x itself, or zero where a factor stands between.
    ya, yb = residual_start(xa, xb, bias_ptr + QW, drop_path_ptr, CA, CB)
    for loop in tl.static_range(LOOPS):
        n = loop * LW
        if c < CP:
            q = linear(na, nb, w_ptr + n * CP, None, LW, CA, CB, PRECISION)
        else:
            q = linear(na, nb, w_ptr + n * CP, bias_ptr + n, LW, CA, CB, PRECISION)
        k = linear(na, nb, w_ptr + (QW + n) * CP, None, LW, CA, CB, PRECISION).to(T)
        v_ptr = w_ptr + (2 * QW + n) * CP
        if V_TRANSPOSED:
            v = tl.trans(linear_transposed(na, nb, v_ptr, LW, CA, CB, PRECISION), 0, 2, 1)
        else:
            v = linear(na, nb, v_ptr, None, LW, CA, CB, PRECISION)
        out = attention(
            split_groups(q, NB, GW), tl.trans(split_groups(k, NB, GW), 0, 2, 1), split_groups(v, NB, GW),
            m, DP, T, PRECISION,
        )  # fmt: skip
        out = join_groups(out.to(T), NB, GW)
        ya, yb = linear_onto(out, w_ptr + 3 * QW * CP + n, QW, ya, yb, CA, CB, PRECISION)
    return residual_end(xa, xb, ya, yb, drop_path_ptr, left, CB)


@triton.jit
def residual_start(xa, xb, bias_ptr, drop_path_ptr, CA: tl.constexpr, CB: tl.constexpr):
    ba = tl.load(bias_ptr + tl.arange(0, CA))[None, None, :]
    bb = ba
    if CB:
        bb = tl.load(bias_ptr + CA + tl.arange(0, CB))[None, None, :]
    if drop_path_ptr is None:
        ya = xa + ba
        yb = ya
        if CB:
            yb = xb + bb
    else:
        ya = tl.broadcast_to(ba, xa.shape)
        yb = tl.broadcast_to(bb, xb.shape)
    return ya, yb


@triton.jit
def residual_end(xa, xb, ya, yb, drop_path_ptr, left, CB: tl.constexpr):
    if drop_path_ptr is not None:
        sentence = tl.arange(0, xa.shape[0])
        factor = tl.load(drop_path_ptr + sentence, mask=sentence < left, other=0.0)[:, None, None]
        ya = xa + factor * ya
        if CB:
            yb = xb + factor * yb
    if not CB:
        yb = ya
    return ya, yb


@triton.jit
def linear_onto(
    x,  # [BS, MP, K]
    w_ptr,  # [CA + CB, stride], the first of K columns
    stride,
    ya,  # [BS, MP, CA]
    yb,  # [BS, MP, CB]
    CA: tl.constexpr,
    CB: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y + x w^T."""
    w_ptr += tl.arange(0, x.shape[2])[:, None]
    w = tl.load(w_ptr + tl.arange(0, CA)[None, :] * stride)
    ya = batched_dot(x, w, ya, PRECISION)
    if CB:
        w = tl.load(w_ptr + (CA + tl.arange(0, CB))[None, :] * stride)
        yb = batched_dot(x, w, yb, PRECISION)
    return ya, yb


@triton.jit
def mlp_half(
    xa, xb, w_ptr, bias_ptr, drop_path_ptr, left, eps,
    c: tl.constexpr, CA: tl.constexpr, CB: tl.constexpr, HP: tl.constexpr, HC: tl.constexpr,
    T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x + fc2(gelu(fc1(LN(x))))."""
    CP: tl.constexpr = CA + CB
    na, nb, _, _ = normalised(xa, xb, eps, c, CA, CB, T)
    ya, yb = residual_start(xa, xb, bias_ptr + HP, drop_path_ptr, CA, CB)
    for n in tl.static_range(0, HP, HC):
        if c < CP:
            h = linear(na, nb, w_ptr + n * CP, None, HC, CA, CB, PRECISION)
        else:
            h = linear(na, nb, w_ptr + n * CP, bias_ptr + n, HC, CA, CB, PRECISION)
        h = gelu(h, T).to(T)
        ya, yb = linear_onto(h, w_ptr + HP * CP + n, HP, ya, yb, CA, CB, PRECISION)
    return residual_end(xa, xb, ya, yb, drop_path_ptr, left, CB)


@triton.jit
def _inner_block_kernel(
    x_ptr,  # [S, m, c]
    out_ptr,  # [S, m, c]
    w_ptr,  # Packing.weights
    bias_ptr,  # Packing.biases
    drop_path1_ptr,  # [S] or None
    drop_path2_ptr,  # [S] or None
    S,
    eps1,
    eps2,
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
    ATTENTION: tl.constexpr,
    MLP: tl.constexpr,
    PRECISION: tl.constexpr,
    BS: tl.constexpr,  # sentences of a program
):
    T: tl.constexpr = w_ptr.dtype.element_ty
    CP: tl.constexpr = CA + CB
    QW: tl.constexpr = NG * GW
    ATTENTION_SIZE: tl.constexpr = 4 * QW * CP if ATTENTION else 0
    MLP_SIZE: tl.constexpr = 2 * HP * CP if MLP else 0
    first = tl.program_id(0).to(tl.int64) * BS
    left = (S - first).to(tl.int32)
    eye_ptr = w_ptr + ATTENTION_SIZE + MLP_SIZE
    xa, xb = load_words(x_ptr + first * (m * c), eye_ptr, left, m, c, BS, MP, CA, CB, T)
    if ATTENTION:
        if drop_path1_ptr is not None:
            drop_path1_ptr += first
        xa, xb = attention_half(
            xa, xb, w_ptr, bias_ptr, drop_path1_ptr, left, eps1, m, c, CA, CB, DP, GW, NG, LOOPS,
            DP < GW, T, PRECISION,
        )  # fmt: skip
        bias_ptr += QW + CP
    if MLP:
        if drop_path2_ptr is not None:
            drop_path2_ptr += first
        xa, xb = mlp_half(
            xa, xb, w_ptr + ATTENTION_SIZE, bias_ptr, drop_path2_ptr, left, eps2, c, CA, CB, HP, HC, T,
            PRECISION,
        )  # fmt: skip
    store_words(out_ptr + first * (m * c), xa, xb, left, m, c, CA, CB)


# Below so many programs a GPU is not full: smaller ones are launched.
_FEW_PROGRAMS = 264


def product_dtype(x: Tensor, compute_dtype: torch.dtype | None) -> torch.dtype:
    """Dtype of the operands of the products."""
    return x.dtype if compute_dtype is None else compute_dtype


def config_for(kernel: str, x: Tensor, shape: InnerShape, dtype: torch.dtype) -> Config:
    arch = architecture(x.device)
    config = config_of(kernel, arch, dtype, shape.c)
    if x.shape[0] * shape.MP < _FEW_PROGRAMS * config.rows:
        config = config_of(f"{kernel} few", arch, dtype, shape.c)
    return config


def launch_forward(
    x: Tensor,  # [S, m, c], contiguous and not empty
    packed: Packing,
    shape: InnerShape,
    attention: bool,
    mlp: bool,
    eps1: float,
    eps2: float,
    drop_path1: Tensor | None,
    drop_path2: Tensor | None,
) -> Tensor:
    out = torch.empty_like(x)
    dtype = packed.weights.dtype
    config = config_for("inner_block", x, shape, dtype)
    sentences = max(config.rows // shape.MP, 1)
    arguments = {
        "x_ptr": x, "out_ptr": out, "w_ptr": packed.weights, "bias_ptr": packed.biases,
        "drop_path1_ptr": contiguous(drop_path1), "drop_path2_ptr": contiguous(drop_path2), "S": x.shape[0],
        "eps1": eps1, "eps2": eps2,
    }  # fmt: skip
    constants = {
        **shape.constants,
        "ATTENTION": attention, "MLP": mlp, "PRECISION": dot_precision(dtype), "BS": sentences,
    }  # fmt: skip
    launch(_inner_block_kernel, (triton.cdiv(x.shape[0], sentences),), arguments, constants, config)
    return out


def _launch(
    x: Tensor,
    parameters: Sequence[Tensor | None],  # the 14 of a block, those of an absent half None
    num_heads: int,
    scale: float,
    eps1: float,
    eps2: float,
    compute_dtype: torch.dtype | None,
    drop_path1: Tensor | None,
    drop_path2: Tensor | None,
) -> Tensor:
    x = x.contiguous()
    if x.numel() == 0:
        return torch.empty_like(x)
    attention, mlp = parameters[0] is not None, parameters[8] is not None
    fc1_weight = parameters[10]
    shape = inner_shape(x.shape[1], x.shape[2], num_heads, 0 if fc1_weight is None else fc1_weight.shape[0])
    packed = pack(parameters, shape, scale, product_dtype(x, compute_dtype), x.device)
    return launch_forward(x, packed, shape, attention, mlp, eps1, eps2, drop_path1, drop_path2)


def runs(op: str, x: Tensor, compute_dtype: torch.dtype | None, drops: Sequence[float]) -> bool:
    """Whether the kernels can do it; dropout, other dtypes and sizes are left to plain PyTorch."""
    dtypes_known = {x.dtype, product_dtype(x, compute_dtype)} <= dispatch.DTYPES
    return dtypes_known and not any(drops) and dispatch.over_limits(op, (x,)) is None


def noise(given: Sequence[Any], tensors: int, rates: int) -> list[Any]:
    """Drop path, seed and rates, of which the dispatcher leaves out trailing ones at their defaults."""
    defaults: list[Any] = [*[None] * tensors, *[0.0] * rates]
    return [*given, *defaults[len(given) :]]


def inner_block(x: Tensor, *args: Any) -> Tensor:
    parameters, options = args[:14], args[14:]
    num_heads, scale, eps1, eps2, compute_dtype = options[:5]
    drop_path1, drop_path2, seed, *drops = noise(options[5:], 3, 4)
    _checks.check_inner_block(x, *parameters, num_heads, compute_dtype)
    _checks.check_drop_path("inner_block", x, drop_path1=drop_path1, drop_path2=drop_path2)
    _checks.check_dropout("inner_block", x, (seed, *drops), _checks.DROPS)
    if not runs("inner_block", x, compute_dtype, drops):
        return reference.inner_block_in(x, *args)
    return _launch(x, parameters, num_heads, scale, eps1, eps2, compute_dtype, drop_path1, drop_path2)


def inner_attention(x: Tensor, *args: Any) -> Tensor:
    parameters, options = args[:8], args[8:]
    num_heads, scale, eps, compute_dtype = options[:4]
    drop_path, seed, *drops = noise(options[4:], 2, 2)
    _checks.check_inner_attention(x, *(*parameters, num_heads, compute_dtype))
    _checks.check_drop_path("inner_attention", x, drop_path=drop_path)
    _checks.check_dropout("inner_attention", x, (seed, *drops), _checks.ATTENTION_DROPS)
    if not runs("inner_attention", x, compute_dtype, drops):
        return reference.inner_attention_in(x, *args)
    absent = (None,) * 6
    return _launch(x, (*parameters, *absent), num_heads, scale, eps, eps, compute_dtype, drop_path, None)


def inner_mlp(x: Tensor, *args: Any) -> Tensor:
    parameters, options = args[:6], args[6:]
    eps, compute_dtype = options[:2]
    drop_path, seed, *drops = noise(options[2:], 2, 2)
    _checks.check_inner_mlp(x, *(*parameters, compute_dtype))
    _checks.check_drop_path("inner_mlp", x, drop_path=drop_path)
    _checks.check_dropout("inner_mlp", x, (seed, *drops), _checks.MLP_DROPS)
    if not runs("inner_mlp", x, compute_dtype, drops):
        return reference.inner_mlp_in(x, *args)
    absent = (None,) * 8
    return _launch(x, (*absent, *parameters), 1, 1.0, eps, eps, compute_dtype, None, drop_path)
