"""The outer block in training, on the CPU: a forward pass that keeps what the backward pass needs.

Kept for each token, in widths d of the block: q, k and v (3), what attention puts out (1), z = tokens +
attention's branch (1), and the hidden layer before its GELU (hidden / d). Attention's probabilities and the
outputs of the LayerNorms and of the GELU are computed again (backward.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tnt_kernels import _checks, _ops, dispatch
from tnt_kernels._autograd import tensor_positions
from tnt_kernels.outer import products
from tnt_kernels.outer.cpu import (
    group_size,
    keep_freed_memory,
    launch_attention,
    launch_layer_norm,
    norm_parameters,
    scaled,
)

__all__ = ["Block", "outer_block_train"]


class Block(NamedTuple):
    """Arguments of a call, in the order of the operator's schema."""

    tokens: Tensor  # [B, N, d]
    norm1_weight: Tensor
    norm1_bias: Tensor
    qk_weight: Tensor
    qk_bias: Tensor | None
    v_weight: Tensor
    v_bias: Tensor | None
    proj_weight: Tensor
    proj_bias: Tensor | None
    norm2_weight: Tensor
    norm2_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    num_heads: int
    scale: float
    eps1: float
    eps2: float
    compute_dtype: torch.dtype | None
    drop_path1: Tensor | None = None  # [B]
    drop_path2: Tensor | None = None

    def check(self) -> None:
        _checks.check_outer_block(*self[:16], self.compute_dtype)
        _checks.check_drop_path(
            "outer_block", self.tokens, "tokens", drop_path1=self.drop_path1, drop_path2=self.drop_path2
        )

    @property
    def held(self) -> torch.dtype:
        return _ops.held_dtype(self.tokens, self.compute_dtype)

    @property
    def source(self) -> Tensor:
        """The tokens as the kernels read them."""
        return (self.tokens.float() if self.tokens.dtype == torch.float16 else self.tokens).contiguous()

    @property
    def norm1(self) -> tuple[Tensor, Tensor]:
        return norm_parameters(self.norm1_weight, self.norm1_bias)

    @property
    def norm2(self) -> tuple[Tensor, Tensor]:
        return norm_parameters(self.norm2_weight, self.norm2_bias)

    @property
    def images_at_a_time(self) -> int:
        batch, n, _ = self.tokens.shape
        return group_size(batch, n * self.fc1_weight.shape[0] * self.held.itemsize)


def outer_block_train(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the block's result [B, N, d], and qkv, attended, z and h for outer_block_backward."""
    block = Block(*args)
    block.check()
    tensors = [args[i] for i in tensor_positions(_ops.outer_block) if i < len(args)]
    reason = dispatch.can_run_cpu("outer_block", *tensors)
    if reason is not None:
        raise RuntimeError(f"outer_block_train: the cpu backend cannot run this call: {reason}")
    keep_freed_memory()
    held, x = block.held, block.source
    y = torch.empty(x.shape, dtype=held)
    launch_layer_norm(x, None, None, block.norm1, block.eps1, y)
    joined = products.joined((block.qk_weight, block.v_weight), (block.qk_bias, block.v_bias), held)
    qkv = products.linear(y, *joined)
    attended = torch.empty(x.shape, dtype=held)
    launch_attention(qkv, attended, block.num_heads, block.scale)
    branch = products.linear(attended, block.proj_weight.to(held), block.proj_bias)
    z = torch.empty_like(x)
    launch_layer_norm(x, scaled(branch, block.drop_path1, 0), z, block.norm2, block.eps2, y)
    h = products.linear(y, block.fc1_weight.to(held), block.fc1_bias)
    out = torch.empty_like(x)
    fc2_weight, size = block.fc2_weight.to(held), block.images_at_a_time
    for start in range(0, x.shape[0], size):
        images = slice(start, start + size)
        branch = products.linear(F.gelu(h[images]), fc2_weight, block.fc2_bias)
        torch.add(z[images], scaled(branch, block.drop_path2, start), out=out[images])
    return out.to(block.tokens.dtype), qkv, attended, z, h


_ops.lib.impl("outer_block_train", outer_block_train, "CPU")
