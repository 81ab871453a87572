"""Gradients of the outer block on GPUs, from the activations that outer_block_train keeps.

Attention runs again under autograd, so that PyTorch's own backward of it follows with whatever that needs.
The kernels here and cuBLAS's products give the same bits on every run. PyTorch's attention is held to that by
torch.use_deterministic_algorithms(True) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tnt_kernels._autograd import autograd_on, composite_backward
from tnt_kernels.backends import reference
from tnt_kernels.backends.triton.add_layer_norm import launch_add_layer_norm
from tnt_kernels.backends.triton.gelu import launch_gelu, launch_gelu_backward
from tnt_kernels.backends.triton.layer_norm_backward import launch_layer_norm_backward
from tnt_kernels.backends.triton.outer_block import cast, heads_of
from tnt_kernels.outer.arguments import NAMES, POSITIONS, Block, Wanted, check_kept, gradient_of

__all__ = ["outer_block_backward"]


class _Backward:
    """The backward pass of one call. Gradients of parameters gather in `found`, by name."""

    def __init__(self, block: Block, needed: dict[str, bool]) -> None:
        self.block = cast(block, ("qk_weight", "v_weight", "proj_weight", "fc1_weight", "fc2_weight"))
        self.needed = needed
        self.wanted = Wanted.of(needed)
        self.found: dict[str, Tensor] = {}

    def add_linear(self, name: str, grads: Sequence[Tensor], x: Tensor | None) -> None:
        """Keeps the gradients of a linear layer: grads [tokens, outputs] of parts of its output, all as wide;
        x [tokens, inputs]."""
        if self.needed[f"{name}_weight"]:
            assert x is not None
            weight = x.new_empty((len(grads), grads[0].shape[1], x.shape[1]))
            for part, grad in zip(weight, grads, strict=True):
                torch.mm(grad.t(), x, out=part)
            self.found[f"{name}_weight"] = weight.flatten(0, 1)
        if self.needed[f"{name}_bias"]:
            self.found[f"{name}_bias"] = torch.cat([grad.sum(0, dtype=torch.float32) for grad in grads])

    def mlp(
        self,
        grad: Tensor,  # [images, N, d]
        z: Tensor,  # [images, N, d]
        h: Tensor,  # [tokens, hidden]
    ) -> tuple[Tensor | None, Tensor | None]:  # of z [images, N, d], of attention's branch [tokens, d]
        block, needed = self.block, self.needed
        branch = self.scaled(grad, block.drop_path2)
        gelu = torch.empty_like(h) if needed["fc2_weight"] else None
        if not self.wanted.fc1:
            if gelu is not None:
                launch_gelu(h, gelu)
            self.add_linear("fc2", [branch], gelu)
            return None, None
        grad_h = branch @ block.fc2_weight  # so far of the GELU's output
        bias = launch_gelu_backward(h, grad_h, gelu, needed["fc1_bias"])
        self.add_linear("fc2", [branch], gelu)
        del branch, gelu
        if bias is not None:
            self.found["fc1_bias"] = bias.sum(0)
        grad_y = grad_h @ block.fc1_weight if self.wanted.norm2 else None
        same = block.drop_path1 is None and z.dtype == block.held
        grad_z = torch.empty_like(z) if needed["tokens"] or (self.wanted.proj and same) else None
        grad_branch = torch.empty_like(z, dtype=block.held) if self.wanted.proj and not same else None
        y = self.layer_norm(
            "norm2", z, grad_y, grad, factors=block.drop_path1, grad_x=grad_z, branch=grad_branch,
            output=needed["fc1_weight"],
        )  # fmt: skip
        if y is not None:
            self.found["fc1_weight"] = grad_h.t() @ y
        grad_branch = grad_z if same else grad_branch
        return grad_z, None if grad_branch is None else grad_branch.flatten(0, 1)

    def attention(
        self,
        branch: Tensor,  # [tokens, d], gradient of attention's branch
        residual: Tensor | None,  # [images, N, d], gradient of z, where that of x is wanted
        x: Tensor,  # [images, N, d]
        qkv: Tensor,  # [images, N, 3d]
    ) -> Tensor | None:  # [images, N, d], gradient of x
        block, needed, wanted = self.block, self.needed, self.wanted
        images, n, d = x.shape
        with autograd_on(), torch.set_grad_enabled(wanted.qkv):
            q, k, v = (part.detach().requires_grad_(wanted.qkv) for part in heads_of(qkv, block.num_heads))
            attended = F.scaled_dot_product_attention(q, k, v, scale=block.scale)
        self.add_linear("proj", [branch], attended.detach().transpose(1, 2).reshape(images * n, d))
        if not wanted.qkv:
            return None
        grad = (branch @ block.proj_weight).view(images, n, block.num_heads, -1).transpose(1, 2)
        with autograd_on():
            found = torch.autograd.grad(attended, (q, k, v), grad)
        del attended, grad
        # Not joined into one [tokens, 3d]: the copy would cost more than to add up three products.
        grads = [part.transpose(1, 2).reshape(images * n, d) for part in found]
        grad_y = None
        if wanted.norm1:
            q_weight, k_weight = block.qk_weight.chunk(2)
            grad_y = (grads[0] @ q_weight).addmm_(grads[1], k_weight).addmm_(grads[2], block.v_weight)
        grad_x = torch.empty_like(x) if needed["tokens"] else None
        output = needed["qk_weight"] or needed["v_weight"]
        y = self.layer_norm("norm1", x, grad_y, residual, grad_x=grad_x, output=output)
        self.add_linear("qk", grads[:2], y)
        self.add_linear("v", grads[2:], y)
        return grad_x

    def scaled(self, grad: Tensor, factors: Tensor | None) -> Tensor:
        """Gradient [tokens, d] of a branch that is scaled for each image and then added, from that of the sum
        [images, N, d]."""
        if factors is None:
            return grad.to(self.block.held).flatten(0, 1)
        branch = torch.empty_like(grad, dtype=self.block.held)
        return torch.mul(grad, factors[:, None, None], out=branch).flatten(0, 1)

    def layer_norm(
        self,
        name: str,
        x: Tensor,  # [images, N, d]
        grad: Tensor | None,  # [tokens, d], of the LayerNorm's output, if it is wanted
        residual: Tensor | None,  # [images, N, d], the gradient that goes past the branch
        *,
        output: bool,
        **results: Tensor | None,
    ) -> Tensor | None:  # [tokens, d], the LayerNorm's output, if it is asked for
        block = self.block
        norm, eps = (block.norm1, block.eps1) if name == "norm1" else (block.norm2, block.eps2)
        y = x.new_empty((x.shape[0] * x.shape[1], x.shape[2]), dtype=block.held) if output else None
        if grad is None:
            if y is not None:
                launch_add_layer_norm(x, norm=norm, eps=eps, out=y)
            return y
        names = [f"{name}_weight", f"{name}_bias"]
        parameters = any(self.needed[name] for name in names)
        partial = launch_layer_norm_backward(
            x, grad, residual, norm, eps, y=y, parameters=parameters, **results
        )
        if partial is not None:
            self.found |= {name: part.sum(0) for name, part in zip(names, partial, strict=True)}
        return y


def outer_block_backward(
    grad: Tensor,  # [B, N, d]
    needed: Sequence[bool],
    qkv: Tensor,  # [B, N, 3d]
    attended: Tensor,  # not kept, not used
    z: Tensor,  # [B, N, d]
    h: Tensor,  # [B, N, hidden]
    *args: Any,
) -> list[Tensor]:
    block = Block(*args)
    block.check()
    check_kept(block, grad=grad, qkv=qkv, z=z, h=h)
    by_name = dict(zip(NAMES, needed, strict=True))
    if grad.dtype == torch.float64 or by_name["drop_path1"] or by_name["drop_path2"]:
        return composite_backward(reference.inner_block_in, POSITIONS, grad, needed, args)
    backward = _Backward(block, by_name)
    grad_x = None
    if grad.numel() > 0:
        with reference.autocast_to(grad.device.type, None):
            grad_z, branch = backward.mlp(grad.contiguous(), z.contiguous(), h.contiguous().flatten(0, 1))
            if branch is not None:
                grad_x = backward.attention(branch, grad_z, block.source, qkv.contiguous())
    found = {"tokens": grad_x, **backward.found}
    return [gradient_of(getattr(block, name), found.get(name)) for name in NAMES if by_name[name]]
