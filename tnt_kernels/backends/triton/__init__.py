"""The Triton backend: registered operators on kernels for NVIDIA GPUs (and others that Triton compiles for).

Triton is imported, and a kernel compiled, when an operator first meets a tensor on a GPU.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from tnt_kernels._autograd import COMPOSITES
from tnt_kernels._ops import lib
from tnt_kernels.dispatch import CUDA_OPS

# Where the launcher of each operator is: a function of the operator's name in a module of this package.
LAUNCHERS = {
    "add_layer_norm": "add_layer_norm",
    "inner_attention": "inner_block",
    "inner_attention_backward": "inner_block_backward",
    "inner_block": "inner_block",
    "inner_block_backward": "inner_block_backward",
    "inner_mlp": "inner_block",
    "inner_mlp_backward": "inner_block_backward",
    "outer_block": "outer_block",
    "outer_block_backward": "outer_block_backward",
    "outer_block_train": "outer_block",
    "pixel_embed": "pixel_embed",
    "pixel_embed_backward": "pixel_embed_backward",
    "word_to_sentence": "word_to_sentence",
    "word_to_sentence_backward": "word_to_sentence_backward",
}


@functools.cache
def launcher(op: str) -> Any:
    """Returns what computes an operator on a GPU: its launcher, without Triton its plain PyTorch."""
    try:
        return getattr(importlib.import_module(f"{__name__}.{LAUNCHERS[op]}"), op)
    except ImportError:  # no Triton; gpu.why_unusable has the reason
        return COMPOSITES[op]


def _register(op: str) -> None:
    lib.impl(op, lambda *args: launcher(op)(*args), "CUDA")


for _op in LAUNCHERS:
    if not _op.startswith(tuple(CUDA_OPS)):  # those are registered by backends/cuda.py
        _register(_op)
