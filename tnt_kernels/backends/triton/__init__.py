"""The Triton backend: registered operators on kernels for NVIDIA GPUs (and others that Triton compiles for).

Triton is imported, and a kernel compiled, when an operator first meets a tensor on a GPU.
"""

from __future__ import annotations

import importlib
from typing import Any

from tnt_kernels._autograd import COMPOSITES
from tnt_kernels._ops import lib

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
    "word_to_sentence": "word_to_sentence",
    "word_to_sentence_backward": "word_to_sentence_backward",
}


def _register(op: str, module: str) -> None:
    launcher: Any = None

    def implementation(*args: Any) -> Any:
        nonlocal launcher
        if launcher is None:
            try:
                launcher = getattr(importlib.import_module(f"{__name__}.{module}"), op)
            except ImportError:  # no Triton; gpu.why_unusable has the reason
                launcher = COMPOSITES[op]
        return launcher(*args)

    lib.impl(op, implementation, "CUDA")


for _op, _module in LAUNCHERS.items():
    _register(_op, _module)
