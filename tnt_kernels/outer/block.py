"""The outer transformer block, and the linear and LayerNorm layers of the stem and the head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tnt_kernels import _checks, _ops, dispatch
from tnt_kernels.backends import reference
from tnt_kernels.ops._autocast import compute_dtype_of

__all__ = ["layer_norm", "linear", "outer_block"]


def outer_block(
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
    scale: float | None = None,
    eps1: float = 1e-5,
    eps2: float = 1e-5,
    drop_path1: Tensor | None = None,
    drop_path2: Tensor | None = None,
) -> Tensor:
    """Transforms the tokens of each image: z = tokens + Attention(LN(tokens)); returns z + MLP(LN(z)).

    Args:
        tokens: [B, N, d], B images (zero allowed) of N tokens.
        norm1_weight, norm1_bias: [d].
        qk_weight, qk_bias: [2d, d] and [2d] or None; queries first, then keys, heads outermost in each.
        v_weight, v_bias: [d, d] and [d] or None.
        proj_weight, proj_bias: [d, d] and [d] or None.
        norm2_weight, norm2_bias: [d].
        fc1_weight, fc1_bias: [hidden, d] and [hidden] or None.
        fc2_weight, fc2_bias: [d, hidden] and [d] or None.
        num_heads: divides d.
        scale: factor of the scores; None means (d / num_heads) ** -0.5.
        eps1, eps2: added to the variance in the two LayerNorms.
        drop_path1, drop_path2: [B] float32 or None, the factor of each image's attention, and of its MLP:
            stochastic depth passes 0 where a branch is dropped and 1 / keep probability elsewhere.

    Returns:
        [B, N, d] in the dtype of tokens. Parameters are of that dtype (those of a LayerNorm may be
        float32); under torch.autocast they may be of another, and products run in autocast's dtype.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype or device.
        RuntimeError: a backend is forced and cannot run the call.

    Source: "Transformer in Transformer", arXiv 2103.00112, equations 8 and 9.
    """
    parameters = (
        norm1_weight, norm1_bias, qk_weight, qk_bias, v_weight, v_bias, proj_weight, proj_bias,
        norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
    )  # fmt: skip
    _checks.check_tensor("outer_block", "tokens", tokens, _checks.OUTER)
    backend = dispatch.choose("outer_block", tokens, *parameters, drop_path1, drop_path2)
    compute_dtype = compute_dtype_of(tokens)
    scale = _checks.scale_of("outer_block", tokens, num_heads, scale, "tokens")
    if backend != "reference":
        return _ops.outer_block(
            tokens, *parameters, num_heads, scale, eps1, eps2, compute_dtype, drop_path1, drop_path2
        )
    _checks.check_outer_block(tokens, *parameters, num_heads, compute_dtype)
    _checks.check_drop_path("outer_block", tokens, "tokens", drop_path1=drop_path1, drop_path2=drop_path2)
    return reference.inner_block(
        tokens, *parameters, num_heads, scale, eps1, eps2, drop_path1, drop_path2
    ).to(tokens.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """Returns x weight^T + bias, through the exact GELU where gelu is True.

    Args:
        x: [..., inputs].
        weight: [outputs, inputs].
        bias: [outputs] or None.

    Returns:
        [..., outputs], in the dtype of x, or of autocast where one is active.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype or device.
        RuntimeError: a backend is forced and cannot run the call.
    """
    compute_dtype = compute_dtype_of(x)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        given = f"shape {list(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise _checks.error("linear", "weight", "a tensor of shape [outputs, inputs]", given)
    outputs, inputs = weight.shape
    if x.dim() < 1 or x.shape[-1] != inputs:
        raise _checks.error("linear", "x", f"of shape [..., {inputs}]", f"shape {list(x.shape)}")
    _checks.check_parameters(
        "linear", x, (("weight", weight, (outputs, inputs)),), (("bias", bias, (outputs,)),), compute_dtype
    )
    if x.is_cuda or dispatch.choose("linear", x, weight, bias) == "reference":
        y = F.linear(x, weight, bias)
        return F.gelu(y) if gelu else y
    if compute_dtype is None:
        return _ops.packed_linear(x, [weight], [bias], gelu)
    held = torch.float32 if compute_dtype == torch.float16 else compute_dtype
    return _ops.packed_linear(x.to(held), [weight], [bias], gelu).to(compute_dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Returns the LayerNorm of x over its trailing dimension, in the dtype of x.

    Args:
        x: [..., d].
        weight, bias: [d], in the dtype of x or wider.
        eps: added to the variance.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype or device.
        RuntimeError: a backend is forced and cannot run the call.
    """
    _checks.check_add_layer_norm(x, None, weight, bias)
    if x.is_cuda or dispatch.choose("layer_norm", x, weight, bias) == "reference":
        return reference.layer_norm(x, weight, bias, eps)
    return _ops.add_layer_norm(x, None, weight, bias, eps, None)[1]
