"""The operations of TNT as stateless functions: tensors in, tensors out."""

from tnt_kernels.backends import cpu as _cpu  # noqa: F401  registers the CPU kernels
from tnt_kernels.backends import cpu_backward as _cpu_backward  # noqa: F401
from tnt_kernels.backends import cpu_inner_backward as _cpu_inner_backward  # noqa: F401
from tnt_kernels.backends import cuda as _cuda  # noqa: F401  registers those for GPUs
from tnt_kernels.backends import triton as _triton  # noqa: F401
from tnt_kernels.ops.inner_attention import inner_attention
from tnt_kernels.ops.inner_block import inner_block
from tnt_kernels.ops.inner_mlp import inner_mlp
from tnt_kernels.ops.pixel_embed import pixel_embed
from tnt_kernels.ops.word_to_sentence import word_to_sentence

__all__ = ["inner_attention", "inner_block", "inner_mlp", "pixel_embed", "word_to_sentence"]
