"""The outer block on GPUs: cuBLAS's products, PyTorch's attention, and between them one pass each for
residual with LayerNorm and for the GELU.

Biases are added in the products' epilogues. Weights are joined and cast in every call: whether a copy kept
over calls is out of date, the GPU alone could tell, and a CUDA graph would never ask.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tnt_kernels import _checks
from tnt_kernels.backends import reference
from tnt_kernels.backends.triton.add_layer_norm import launch_add_layer_norm
from tnt_kernels.backends.triton.gelu import launch_gelu
from tnt_kernels.backends.triton.linear_gelu import launch_linear_gelu
from tnt_kernels.outer.arguments import Block

__all__ = ["cast", "heads_of", "outer_block", "outer_block_train"]


def cast(block: Block, names: Iterable[str], into: dict[str, Tensor] | None = None) -> Block:
    """Returns the block with these parameters in the dtype of its products, copied by a single kernel where
    they are of one dtype; those in `into` are copied there in any case."""
    copies: dict[str, Any] = {} if into is None else into
    for name in names:
        parameter: Tensor | None = getattr(block, name)
        if name not in copies and parameter is not None and parameter.dtype != block.held:
            copies[name] = torch.empty(parameter.shape, dtype=block.held, device=parameter.device)
    if copies:
        torch._foreach_copy_(list(copies.values()), [getattr(block, name) for name in copies])
    return block._replace(**copies)


def _with_joined(block: Block) -> tuple[Block, Tensor, Tensor | None]:
    """The block's linear layers in the dtype of its products; weight [3d, d] and bias [3d] of q, k and v."""
    d = block.tokens.shape[2]
    weight = block.tokens.new_empty((3 * d, d), dtype=block.held)
    parts = {"qk_weight": weight[: 2 * d], "v_weight": weight[2 * d :]}
    bias = None
    if block.qk_bias is not None or block.v_bias is not None:
        bias = block.tokens.new_zeros(3 * d, dtype=block.held)
        parts |= {} if block.qk_bias is None else {"qk_bias": bias[: 2 * d]}
        parts |= {} if block.v_bias is None else {"v_bias": bias[2 * d :]}
    others = ("proj_weight", "proj_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    return cast(block, others, parts), weight, bias


def heads_of(
    qkv: Tensor,  # [images, N, 3d]
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # views of q, k and v, [images, heads, N, d / heads] each
    images, n, width = qkv.shape
    q, k, v = qkv.view(images, n, 3, num_heads, width // 3 // num_heads).permute(2, 0, 3, 1, 4)
    return q, k, v


def _attention(
    block: Block,
    x: Tensor,  # [images, N, d]
) -> tuple[Block, Tensor, Tensor]:  # the block cast; qkv [images, N, 3d]; attention's branch [tokens, d]
    images, n, d = x.shape
    block, weight, bias = _with_joined(block)
    y = x.new_empty((images * n, d), dtype=block.held)
    launch_add_layer_norm(x, norm=block.norm1, eps=block.eps1, out=y)
    qkv = F.linear(y, weight, bias).view(images, n, 3 * d)
    q, k, v = heads_of(qkv, block.num_heads)
    attended = F.scaled_dot_product_attention(q, k, v, scale=block.scale)
    attended = attended.transpose(1, 2).reshape(images * n, d)  # as it lies, if a fused kernel wrote it
    return block, qkv, F.linear(attended, block.proj_weight, block.proj_bias)


def _residual(
    block: Block,
    x: Tensor,  # [images, N, d]
    branch: Tensor,  # [tokens, d]
    shift: Tensor | None = None,  # [d]
) -> tuple[Tensor, Tensor]:  # z + shift [images, N, d]; the second LayerNorm of z [tokens, d]
    z, y = torch.empty_like(x), torch.empty_like(branch)
    launch_add_layer_norm(
        x, branch, factors=block.drop_path1, norm=block.norm2, eps=block.eps2, shift=shift, total=z, out=y
    )
    return z, y


def _fuses(dtype: torch.dtype) -> bool:
    """Whether the GELU joins fc1's product; in float32 that is cuBLAS's, in TF32 or not as torch is set."""
    return dtype != torch.float32


def _hidden(
    block: Block,
    y: Tensor,  # [tokens, d]
    keep: bool,
) -> tuple[Tensor, Tensor]:  # the hidden layer before its GELU, if it is kept, and after it; [tokens, hidden]
    if not _fuses(y.dtype):
        h = F.linear(y, block.fc1_weight, block.fc1_bias)
        gelu = torch.empty_like(h) if keep else h
        launch_gelu(h, gelu)
        return h, gelu
    gelu = y.new_empty((y.shape[0], block.fc1_weight.shape[0]))
    h = torch.empty_like(gelu) if keep else gelu
    launch_linear_gelu(y, block.fc1_weight, block.fc1_bias, gelu, h if keep else None)
    return h, gelu


def _block_of(args: Sequence[Any]) -> Block:
    block = Block(*args)
    block.check()
    return block


def outer_block(*args: Any) -> Tensor:
    """Returns the block's result [B, N, d]; the arguments are those of Block."""
    block = _block_of(args)
    x = block.source
    if x.numel() == 0 or x.dtype == torch.float64:
        return reference.inner_block_in(*args)
    with reference.autocast_to(x.device.type, None):
        block, qkv, branch = _attention(block, x)
        del qkv
        # Then fc2's product adds to the residual, which its bias has reached before.
        adds = block.drop_path2 is None and x.dtype == block.held
        z, y = _residual(block, x, branch, block.fc2_bias if adds else None)
        gelu = _hidden(block, y, keep=False)[1]
        if adds:
            return z.view(-1, z.shape[2]).addmm_(gelu, block.fc2_weight.t()).view_as(z)
        branch = F.linear(gelu, block.fc2_weight, block.fc2_bias)
        launch_add_layer_norm(z, branch, factors=block.drop_path2, total=z)
        return z


def outer_block_train(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the block's result, and qkv, nothing for attended, z and h for outer_block_backward."""
    block = _block_of(args)
    x = block.source
    if x.dtype == torch.float64:
        raise _checks.error("outer_block_train", "tokens", "float32, bfloat16 or float16", x.dtype)
    images, n, d = x.shape
    absent = x.new_empty(0, dtype=block.held)
    if images == 0:
        hidden = block.fc1_weight.shape[0]
        qkv, h = (x.new_empty((0, n, width), dtype=block.held) for width in (3 * d, hidden))
        return torch.empty_like(x), qkv, absent, torch.empty_like(x), h
    with reference.autocast_to(x.device.type, None):
        block, qkv, branch = _attention(block, x)
        z, y = _residual(block, x, branch)
        h, gelu = _hidden(block, y, keep=True)
        out = torch.empty_like(x)
        branch = F.linear(gelu, block.fc2_weight, block.fc2_bias)
        launch_add_layer_norm(z, branch, factors=block.drop_path2, total=out)
        return out, qkv, absent, z, h.view(images, n, -1)
