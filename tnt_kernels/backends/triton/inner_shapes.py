"""How the inner block is laid out for the tensor cores: padded widths and the packed parameters.

Channels are padded to CA + CB columns, a power of two each (CB may be 0): 24 -> 32, 40 and 48 -> 32 + 16. A
head's channels are padded to DP, and heads are grouped so that a group fills GW >= 16 columns, the least that
a product takes: 4 heads of 6 channels are 2 groups of 2 heads of 8.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

__all__ = ["InnerShape", "Packing", "inner_shape"]


def _power_of_two(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())


@dataclass(frozen=True)
class InnerShape:
    """Sizes of an inner block and of the tiles that its kernels work on; made by :func:`inner_shape`."""

    m: int  # words of a sentence
    c: int  # channels of a word
    heads: int
    hidden: int  # of the MLP; 0 without one

    @cached_property
    def MP(self) -> int:
        return _power_of_two(self.m, 16)

    @cached_property
    def CA(self) -> int:
        # With a column to spare a bias is the weight of a column of ones: no vector to load and add.
        if self.c < 16:
            return 16
        return 32 if self.c <= 48 else 64

    @cached_property
    def CB(self) -> int:
        return 16 if 32 < self.c <= 48 else 0

    @cached_property
    def CP(self) -> int:
        return self.CA + self.CB

    @cached_property
    def DP(self) -> int:
        return _power_of_two(self.c // self.heads, 4)

    @cached_property
    def GW(self) -> int:
        return max(16, self.DP)

    @cached_property
    def heads_per_group(self) -> int:
        return self.GW // self.DP

    @cached_property
    def groups(self) -> int:
        return -(-self.heads // self.heads_per_group)

    @cached_property
    def QW(self) -> int:
        return self.groups * self.GW

    @cached_property
    def attention_sums(self) -> int:
        """Floats of the packed gradients: qkv [3 QW, CP], proj [CP, QW], q's bias [QW], proj's bias [CP]."""
        return 4 * self.QW * self.CP + self.QW + self.CP

    @cached_property
    def mlp_sums(self) -> int:
        """fc1 [HP, CP], fc2 [CP, HP], fc1's bias [HP], fc2's bias [CP]."""
        return 2 * self.HP * self.CP + self.HP + self.CP

    @cached_property
    def HC(self) -> int:
        """Hidden channels at a time."""
        return 32

    @cached_property
    def HP(self) -> int:
        return -(-self.hidden // self.HC) * self.HC

    @cached_property
    def loops(self) -> int:
        """Steps in which attention takes the groups: all at once takes fewer instructions, more registers."""
        few = self.CP <= 32 and self.groups & (self.groups - 1) == 0 and self.groups <= 2
        return 1 if few else self.groups

    @cached_property
    def constants(self) -> dict[str, Any]:
        """Constexpr parameters that all kernels of the inner block have."""
        return {
            "m": self.m, "c": self.c, "H": self.heads, "MP": self.MP, "CA": self.CA, "CB": self.CB,
            "DP": self.DP, "GW": self.GW, "NG": self.groups, "HP": self.HP, "HC": self.HC,
            "LOOPS": self.loops,
        }  # fmt: skip


@functools.cache
def inner_shape(m: int, c: int, heads: int, hidden: int) -> InnerShape:
    """Returns the one InnerShape of these sizes, so that what follows from them is computed once."""
    return InnerShape(m, c, heads, hidden)


class Packing(NamedTuple):
    """The packed parameters of a block, made by inner_pack.pack."""

    # In the dtype of the products' operands, one behind the other:
    # qkv [3 QW, CP], proj [CP, QW], fc1 [HP, CP], fc2 [CP, HP], identity [CA, CA]
    weights: torch.Tensor
    # float32: q [QW], proj [CP], fc1 [HP], fc2 [CP]
    biases: torch.Tensor
