"""Fast kernels for TNT, Transformer in Transformer (arXiv 2103.00112).

:class:`FastTNT` is the model; :func:`accelerate` makes a TNT that you already have faster in place,
:func:`restore` undoes it, :func:`explain` says which parts run where, and why. :mod:`tnt_kernels.ops` has
the operators alone, :class:`TNT` is the reference in plain PyTorch.
"""

from tnt_kernels import ops
from tnt_kernels._version import __version__
from tnt_kernels.dispatch import use_backend
from tnt_kernels.models import TNT, tnt_b_patch16_224, tnt_s_patch16_224, tnt_ti_patch16_224
from tnt_kernels.models.accelerate import accelerate, restore
from tnt_kernels.models.checkpoint import from_checkpoint, load_checkpoint
from tnt_kernels.models.explain import explain
from tnt_kernels.models.fast_tnt import (
    FastTNT,
    fast_tnt_b_patch16_224,
    fast_tnt_s_patch16_224,
    fast_tnt_ti_patch16_224,
)
from tnt_kernels.outer import clear_caches

__all__ = [
    "TNT",
    "FastTNT",
    "__version__",
    "accelerate",
    "clear_caches",
    "explain",
    "fast_tnt_b_patch16_224",
    "fast_tnt_s_patch16_224",
    "fast_tnt_ti_patch16_224",
    "from_checkpoint",
    "load_checkpoint",
    "ops",
    "restore",
    "tnt_b_patch16_224",
    "tnt_s_patch16_224",
    "tnt_ti_patch16_224",
    "use_backend",
]
