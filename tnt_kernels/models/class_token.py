"""The class token of an outer block, without the others."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from tnt_kernels import dispatch, outer
from tnt_kernels.backends import reference
from tnt_kernels.ops._autocast import compute_dtype_of


def class_token_block(
    tokens: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    qk_weight: Tensor,
    qk_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    num_heads: int,
    scale: float | None,
    eps1: float,
    eps2: float,
    drop_path1: Tensor | None = None,
    drop_path2: Tensor | None = None,
) -> Tensor:
    """The class token that `outer.outer_block` gives, without the others: tokens [B, N, d] -> [B, 1, d].

    With a single query, keys and values need not be made: per head, (Wk y) q = y (Wk^T q), and the mean of
    the values is Wv times the mean of the y. A bias of the keys moves all scores alike, so that softmax
    loses it.
    """
    batch, _, d = tokens.shape
    width = d // num_heads

    def per_head(weight: Tensor) -> Tensor:  # [d, d] -> [heads, d / heads, d]
        return weight.float().unflatten(0, (num_heads, width))

    autocast = compute_dtype_of(tokens) is not None
    off = torch.autocast(tokens.device.type, enabled=False) if autocast else contextlib.nullcontext()
    with off:
        y = _layer_norm(tokens.float(), norm1_weight.float(), norm1_bias.float(), eps1)
        q = F.linear(y[:, 0], qk_weight[:d].float(), None if qk_bias is None else qk_bias[:d].float())
        q = q.unflatten(1, (num_heads, width)).transpose(0, 1)  # [heads, B, d / heads]
        keys = (q @ per_head(qk_weight[d:])).permute(1, 2, 0)  # [B, d, heads]
        weights = ((y @ keys) * (width**-0.5 if scale is None else scale)).softmax(dim=1)  # [B, N, heads]
        mean = (weights.transpose(1, 2) @ y).transpose(0, 1)  # [heads, B, d]
        out = (mean @ per_head(v_weight).transpose(1, 2)).transpose(0, 1).reshape(batch, 1, d)
        if v_bias is not None:
            out = out + v_bias.float()
    z = tokens[:, :1] + _scaled(_linear(out.to(tokens.dtype), proj_weight, proj_bias), drop_path1)
    y = _layer_norm(z, norm2_weight, norm2_bias, eps2)
    y = _linear(_linear(y, fc1_weight, fc1_bias, gelu=True), fc2_weight, fc2_bias)
    return z + _scaled(y, drop_path2)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if dispatch.gradient_needed(x, weight, bias):
        return reference.layer_norm(x, weight, bias, eps)
    return outer.layer_norm(x, weight, bias, eps)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    if dispatch.gradient_needed(x, weight, bias):
        y = F.linear(x, weight, bias)
        return F.gelu(y) if gelu else y
    return outer.linear(x, weight, bias, gelu)


def _scaled(branch: Tensor, factors: Tensor | None) -> Tensor:  # [B, 1, d] by [B]
    return branch if factors is None else branch * factors.to(branch.dtype)[:, None, None]
