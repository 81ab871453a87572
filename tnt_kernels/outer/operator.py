"""The operator ``outer_block``: schema, fake and the check of its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tnt_kernels import _checks, _ops
from tnt_kernels.backends import reference

__all__ = ["check_heads", "check_outer_block", "outer_block"]

TOKENS = "images, tokens, d"

outer_block = _ops._define(
    "outer_block",
    "(Tensor tokens, Tensor norm1_weight, Tensor norm1_bias, Tensor qk_weight, Tensor? qk_bias, "
    "Tensor v_weight, Tensor? v_bias, Tensor proj_weight, Tensor? proj_bias, "
    "Tensor norm2_weight, Tensor norm2_bias, Tensor fc1_weight, Tensor? fc1_bias, "
    "Tensor fc2_weight, Tensor? fc2_bias, int num_heads, float scale, float eps1, float eps2, "
    "ScalarType? compute_dtype) -> Tensor",
    reference.inner_block_in,
)


def check_heads(tokens: Tensor, num_heads: int) -> None:
    n, d = tokens.shape[1:]
    if n < 1 or d < 1:
        raise _checks.error(
            "outer_block", "tokens", "of at least one token and one channel", f"shape {list(tokens.shape)}"
        )
    if not isinstance(num_heads, (int, torch.SymInt)) or num_heads < 1 or d % num_heads != 0:
        raise _checks.error(
            "outer_block", "num_heads", f"a positive divisor of the {d} channels of tokens", num_heads
        )


def check_outer_block(
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
    num_heads: int,
    compute_dtype: torch.dtype | None,
) -> None:
    op = "outer_block"
    _checks.check_tensor(op, "tokens", tokens, TOKENS)
    _checks.check_compute_dtype(op, tokens, compute_dtype)
    check_heads(tokens, num_heads)
    d = tokens.shape[2]
    if not isinstance(fc1_weight, Tensor) or fc1_weight.dim() != 2 or fc1_weight.shape[0] < 1:
        given = f"shape {list(fc1_weight.shape)}" if isinstance(fc1_weight, Tensor) else fc1_weight
        raise _checks.error(op, "fc1_weight", f"of shape [hidden, {d}] with at least one hidden unit", given)
    hidden = fc1_weight.shape[0]
    _checks.check_parameters(
        op,
        tokens,
        (
            ("norm1_weight", norm1_weight, (d,)),
            ("norm1_bias", norm1_bias, (d,)),
            ("qk_weight", qk_weight, (2 * d, d)),
            ("v_weight", v_weight, (d, d)),
            ("proj_weight", proj_weight, (d, d)),
            ("norm2_weight", norm2_weight, (d,)),
            ("norm2_bias", norm2_bias, (d,)),
            ("fc1_weight", fc1_weight, (hidden, d)),
            ("fc2_weight", fc2_weight, (d, hidden)),
        ),
        (
            ("qk_bias", qk_bias, (2 * d,)),
            ("v_bias", v_bias, (d,)),
            ("proj_bias", proj_bias, (d,)),
            ("fc1_bias", fc1_bias, (hidden,)),
            ("fc2_bias", fc2_bias, (d,)),
        ),
        compute_dtype,
    )


@torch.library.register_fake("tnt_kernels::outer_block", lib=_ops.lib)
def _(tokens: Tensor, *args: Any) -> Tensor:
    checked = (*args[:-4], args[-1])
    check_outer_block(tokens, *checked)
    return tokens.new_empty(tokens.shape)
