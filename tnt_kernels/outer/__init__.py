"""The outer half of a TNT block, an ordinary vision transformer block; here its kernels for the CPU.

One product for q, k and v, attention on its result as it lies, linears with prepacked weights and the exact
GELU in their epilogue, residual and LayerNorm in one pass. The block has a backward pass of its own
(training.py, backward.py). Other layers that need a gradient, and whatever the CPU backend cannot run, take
the reference path.
"""

from tnt_kernels.outer import backward as _backward  # noqa: F401  registers the CPU implementations
from tnt_kernels.outer import cpu as _cpu  # noqa: F401
from tnt_kernels.outer.block import layer_norm, linear, outer_block
from tnt_kernels.outer.packed import cache_info, clear_caches

__all__ = ["cache_info", "clear_caches", "layer_norm", "linear", "outer_block"]
