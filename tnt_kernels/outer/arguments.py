"""Arguments of the outer block's operators, and which gradients of them are wanted."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tnt_kernels import _checks, _ops
from tnt_kernels._autograd import tensor_positions

__all__ = ["NAMES", "POSITIONS", "Block", "Wanted", "check_kept", "gradient_of"]


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
        return self.tokens.to(_ops.stream_dtype(self.tokens)).contiguous()

    @property
    def norm1(self) -> tuple[Tensor, Tensor]:
        return self.norm1_weight, self.norm1_bias

    @property
    def norm2(self) -> tuple[Tensor, Tensor]:
        return self.norm2_weight, self.norm2_bias


POSITIONS = tensor_positions(_ops.outer_block)
NAMES = [Block._fields[i] for i in POSITIONS]


class Wanted(NamedTuple):
    """Which layers' outputs need a gradient so that every gradient asked for is there."""

    norm1: bool
    qkv: bool
    proj: bool
    norm2: bool
    fc1: bool

    @classmethod
    def of(cls, needed: dict[str, bool]) -> Wanted:
        def parameters(*layers: str) -> bool:
            return any(needed[f"{layer}_{kind}"] for layer in layers for kind in ("weight", "bias"))

        norm1 = needed["tokens"] or parameters("norm1")
        qkv = norm1 or parameters("qk", "v")
        proj = qkv or parameters("proj")
        norm2 = proj or parameters("norm2")
        return cls(norm1, qkv, proj, norm2, fc1=norm2 or parameters("fc1"))


def check_kept(block: Block, **given: Tensor) -> None:
    """Checks the gradient of the result and the activations that a backward operator is given."""
    batch, n, d = block.tokens.shape
    expected = {
        "grad": (d, block.tokens.dtype),
        "qkv": (3 * d, block.held),
        "attended": (d, block.held),
        "z": (d, _ops.stream_dtype(block.tokens)),
        "h": (block.fc1_weight.shape[0], block.held),
    }
    for name, tensor in given.items():
        width, dtype = expected[name]
        shape = (batch, n, width)
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != block.tokens.device:
            found = f"{tensor.dtype} of shape {list(tensor.shape)} on {tensor.device}"
            needed = f"{dtype} of shape {list(shape)} on {block.tokens.device}"
            raise _checks.error("outer_block_backward", name, needed, found)


def gradient_of(tensor: Tensor, gradient: Tensor | None) -> Tensor:
    return torch.zeros_like(tensor) if gradient is None else gradient.to(tensor.dtype)
