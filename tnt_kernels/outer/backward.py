"""Gradients of the outer block on the CPU, from the activations that training.py keeps.

Images go through in groups, so that what is computed again stays small; gradients of parameters add up over
the groups in order. The same bits on every run with one number of threads, and on any number as far as
oneDNN's matrix products give the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tnt_kernels import _ops, native
from tnt_kernels._autograd import composite_backward
from tnt_kernels.backends import reference
from tnt_kernels.backends.cpu import CODES
from tnt_kernels.outer import products
from tnt_kernels.outer.arguments import NAMES, POSITIONS, Block, Wanted, check_kept, gradient_of
from tnt_kernels.outer.cpu import launch_layer_norm, norm_parameters
from tnt_kernels.outer.training import images_at_a_time

__all__ = ["outer_block_backward"]


class _Backward:
    """The backward pass of one call. Gradients of parameters gather in `sums`, by name."""

    def __init__(self, block: Block, needed: dict[str, bool]) -> None:
        self.block = block
        self.needed = needed
        self.wanted = Wanted.of(needed)
        self.sums: dict[str, Tensor] = {}
        held = self.held = block.held
        qkv_weight, _ = products.joined((block.qk_weight, block.v_weight), (None, None), held)
        # As weights of the products that lead back: [inputs, outputs]
        self.qkv_back = qkv_weight.t()
        self.proj_back = block.proj_weight.to(held).t()
        self.fc1_back = block.fc1_weight.to(held).t()
        self.fc2_back = block.fc2_weight.to(held).t()

    def add(self, name: str, part: Tensor) -> None:
        """Adds a group's part of the gradient of a parameter."""
        before = self.sums.get(name)
        self.sums[name] = part if before is None else before.float().add_(part)

    def add_linear(self, name: str, grad: Tensor, x: Tensor | None) -> None:
        """Adds the parts of a linear layer: grad [tokens, outputs] of its output, x [tokens, inputs]."""
        if self.needed[f"{name}_weight"]:
            assert x is not None
            self.add(f"{name}_weight", products.weight_gradient(grad, x))
        if self.needed[f"{name}_bias"]:
            self.add(f"{name}_bias", grad.sum(0))

    def mlp(
        self,
        grad: Tensor,  # [images, N, d]
        z: Tensor,  # [images, N, d]
        h: Tensor,  # [images, N, hidden]
        factors: Tensor | None,  # [images]
    ) -> Tensor | None:  # gradient of z, if it is wanted
        branch = self.branch(grad, factors)
        if not self.wanted.fc1:
            self.add_linear("fc2", branch, F.gelu(h).flatten(0, 1) if self.needed["fc2_weight"] else None)
            return None
        grad_h = products.linear(branch, self.fc2_back)  # [tokens, hidden], so far of the GELU's output
        gelu = torch.empty_like(grad_h) if self.needed["fc2_weight"] else None
        bias = torch.empty(grad_h.shape[1], dtype=torch.float32)
        _native().gelu_backward(
            h.data_ptr(), grad_h.data_ptr(), _address(gelu), CODES[self.held], bias.data_ptr(),
            *grad_h.shape, torch.get_num_threads(),
        )  # fmt: skip
        self.add_linear("fc2", branch, gelu)
        del gelu
        if self.needed["fc1_bias"]:
            self.add("fc1_bias", bias)
        grad_z = torch.empty_like(z) if self.wanted.proj else None
        grad_y = products.linear(grad_h, self.fc1_back) if self.wanted.norm2 else None
        y = self.layer_norm("norm2", z, grad, grad_y, grad_z, output=self.needed["fc1_weight"])
        if y is not None:
            self.add("fc1_weight", products.weight_gradient(grad_h, y))
        return grad_z

    def attention(
        self,
        grad: Tensor,  # [images, N, d]
        x: Tensor,  # [images, N, d]
        qkv: Tensor,  # [images, N, 3d]
        attended: Tensor,  # [images, N, d]
        factors: Tensor | None,  # [images]
        grad_x: Tensor | None,  # [images, N, d] receives the gradient of x
    ) -> None:
        branch = self.branch(grad, factors)
        self.add_linear("proj", branch, attended.flatten(0, 1))
        if not self.wanted.qkv:
            return
        images, n, d = x.shape
        heads, code = self.block.num_heads, CODES[self.held]
        grad_attended = products.linear(branch, self.proj_back)
        grad_qkv = torch.empty((images * n, 3 * d), dtype=self.held)
        _native().outer_attention_backward(
            qkv.data_ptr(), grad_attended.data_ptr(), grad_qkv.data_ptr(), code, code, images, n, heads,
            d // heads, self.block.scale, torch.get_num_threads(),
        )  # fmt: skip
        grad_y = products.linear(grad_qkv, self.qkv_back) if self.wanted.norm1 else None
        output = self.needed["qk_weight"] or self.needed["v_weight"]
        y = self.layer_norm("norm1", x, grad, grad_y, grad_x, output)
        self.add_linear("qk", grad_qkv[:, : 2 * d], y)
        self.add_linear("v", grad_qkv[:, 2 * d :], y)

    def branch(self, grad: Tensor, factors: Tensor | None) -> Tensor:
        """Gradient [tokens, d] of a branch [images, N, d] that was scaled for each image and then added."""
        if factors is not None:
            grad = grad * factors[:, None, None]
        return grad.to(self.held).flatten(0, 1)

    def layer_norm(
        self,
        name: str,
        x: Tensor,  # [images, N, d]
        residual: Tensor,  # [images, N, d] the gradient that goes past the branch
        grad: Tensor | None,  # [tokens, d] gradient of the LayerNorm's output, if it is wanted
        grad_x: Tensor | None,  # [images, N, d] receives residual + the gradient through the LayerNorm
        output: bool,
    ) -> Tensor | None:  # [tokens, d] the LayerNorm's output, if it is asked for
        block = self.block
        weight, bias = norm_parameters(*(block.norm1 if name == "norm1" else block.norm2))
        eps = block.eps1 if name == "norm1" else block.eps2
        d = x.shape[2]
        y = torch.empty((x.shape[0] * x.shape[1], d), dtype=self.held) if output else None
        if grad is None:
            if y is not None:
                launch_layer_norm(x, None, None, (weight, bias), eps, y)
            return y
        grad_weight, grad_bias = torch.empty(d, dtype=torch.float32), torch.empty(d, dtype=torch.float32)
        _native().layer_norm_backward(
            x.data_ptr(), residual.data_ptr(), grad.data_ptr(), CODES[x.dtype], CODES[grad.dtype],
            weight.data_ptr(), bias.data_ptr(), CODES[weight.dtype], _address(grad_x), _address(y),
            grad_weight.data_ptr(), grad_bias.data_ptr(), *grad.shape, eps, torch.get_num_threads(),
        )  # fmt: skip
        for kind, part in (("weight", grad_weight), ("bias", grad_bias)):
            if self.needed[f"{name}_{kind}"]:
                self.add(f"{name}_{kind}", part)
        return y


def _native() -> Any:
    module = native.load()
    assert module is not None
    return module


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def outer_block_backward(
    grad: Tensor,  # [B, N, d]
    needed: Sequence[bool],
    qkv: Tensor,  # [B, N, 3d]
    attended: Tensor,  # [B, N, d]
    z: Tensor,  # [B, N, d]
    h: Tensor,  # [B, N, hidden]
    *args: Any,
) -> list[Tensor]:
    block = Block(*args)
    block.check()
    check_kept(block, grad=grad, qkv=qkv, attended=attended, z=z, h=h)
    by_name = dict(zip(NAMES, needed, strict=True))
    if native.load() is None or by_name["drop_path1"] or by_name["drop_path2"]:
        return composite_backward(reference.inner_block_in, POSITIONS, grad, needed, args)
    x = block.source
    grad = grad.to(x.dtype).contiguous()
    qkv, attended, z, h = (tensor.contiguous() for tensor in (qkv, attended, z, h))
    grad_x = torch.empty_like(x) if by_name["tokens"] else None
    backward = _Backward(block, by_name)

    def part(tensor: Tensor | None, images: slice) -> Any:
        return None if tensor is None else tensor[images]

    size = images_at_a_time(block)
    for start in range(0, x.shape[0], size):
        images = slice(start, start + size)
        grad_z = backward.mlp(grad[images], z[images], h[images], part(block.drop_path2, images))
        if grad_z is not None:
            backward.attention(
                grad_z, x[images], qkv[images], attended[images], part(block.drop_path1, images),
                part(grad_x, images),
            )  # fmt: skip
    found = {"tokens": grad_x, **backward.sums}
    return [gradient_of(getattr(block, name), found.get(name)) for name in NAMES if by_name[name]]


_ops.lib.impl("outer_block_backward", outer_block_backward, "CPU")
