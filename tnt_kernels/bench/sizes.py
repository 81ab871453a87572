"""Sizes of the TNT models that are measured, and the DeiT of the same size for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

IMAGE_SIZE = 224
SENTENCES = 196
WORDS = 16


@dataclass(frozen=True)
class Size:
    """inner, outer: widths c and d; the names are those of this package's factory and of timm's models."""

    title: str
    inner: int
    outer: int
    inner_heads: int
    outer_heads: int
    deit: str

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments of this package's TNT."""
        return {
            "inner_dim": self.inner,
            "outer_dim": self.outer,
            "inner_num_heads": self.inner_heads,
            "outer_num_heads": self.outer_heads,
        }

    def timm_arguments(self) -> dict[str, Any]:
        """Constructor arguments of timm's TNT."""
        return {
            "inner_dim": self.inner,
            "embed_dim": self.outer,
            "num_heads_inner": self.inner_heads,
            "num_heads_outer": self.outer_heads,
        }


SIZES = {
    "tnt_ti": Size("TNT-Ti", 12, 192, 2, 3, "deit_tiny_patch16_224"),
    "tnt_s": Size("TNT-S", 24, 384, 4, 6, "deit_small_patch16_224"),
    "tnt_b": Size("TNT-B", 40, 640, 4, 10, "deit_base_patch16_224"),
    "tnt_default": Size("TNT (constructor defaults)", 48, 768, 4, 12, "deit_base_patch16_224"),
}


def size_of(model: str) -> Size:
    if model not in SIZES:
        raise ValueError(f"model must be one of {', '.join(SIZES)}, got {model!r}")
    return SIZES[model]
