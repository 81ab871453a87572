"""The outer block in training, on the CPU: a forward pass that keeps what the backward pass needs.

Kept for each token, in widths d of the block: q, k and v (3), what attention puts out (1), z = tokens +
attention's branch (1), and the hidden layer before its GELU (hidden / d). Attention's probabilities and the
outputs of the LayerNorms and of the GELU are computed again (backward.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tnt_kernels import _ops, dispatch
from tnt_kernels.outer import products
from tnt_kernels.outer.arguments import POSITIONS, Block
from tnt_kernels.outer.cpu import (
    group_size,
    keep_freed_memory,
    launch_attention,
    launch_layer_norm,
    norm_parameters,
    scaled,
)

__all__ = ["images_at_a_time", "outer_block_train"]


def images_at_a_time(block: Block) -> int:
    batch, n, _ = block.tokens.shape
    return group_size(batch, n * block.fc1_weight.shape[0] * block.held.itemsize)


def outer_block_train(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the block's result [B, N, d], and qkv, attended, z and h for outer_block_backward."""
    block = Block(*args)
    block.check()
    tensors = [args[i] for i in POSITIONS if i < len(args)]
    reason = dispatch.can_run_cpu("outer_block", *tensors)
    if reason is not None:
        raise RuntimeError(f"outer_block_train: the cpu backend cannot run this call: {reason}")
    keep_freed_memory()
    held, x = block.held, block.source
    y = torch.empty(x.shape, dtype=held)
    launch_layer_norm(x, None, None, norm_parameters(*block.norm1), block.eps1, y)
    joined = products.joined((block.qk_weight, block.v_weight), (block.qk_bias, block.v_bias), held)
    qkv = products.linear(y, *joined)
    attended = torch.empty(x.shape, dtype=held)
    launch_attention(qkv, attended, block.num_heads, block.scale)
    branch = products.linear(attended, block.proj_weight.to(held), block.proj_bias)
    z = torch.empty_like(x)
    norm2 = norm_parameters(*block.norm2)
    launch_layer_norm(x, scaled(branch, block.drop_path1, 0), z, norm2, block.eps2, y)
    h = products.linear(y, block.fc1_weight.to(held), block.fc1_bias)
    out = torch.empty_like(x)
    fc2_weight, size = block.fc2_weight.to(held), images_at_a_time(block)
    for start in range(0, x.shape[0], size):
        images = slice(start, start + size)
        branch = products.linear(F.gelu(h[images]), fc2_weight, block.fc2_bias)
        torch.add(z[images], scaled(branch, block.drop_path2, start), out=out[images])
    return out.to(block.tokens.dtype), qkv, attended, z, h


_ops.lib.impl("outer_block_train", outer_block_train, "CPU")
