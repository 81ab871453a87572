"""Models: the reference TNT and its published sizes."""

from .tnt import TNT, tnt_b_patch16_224, tnt_s_patch16_224, tnt_ti_patch16_224

__all__ = ["TNT", "tnt_b_patch16_224", "tnt_s_patch16_224", "tnt_ti_patch16_224"]
