"""CPU implementations of the operators of the outer half."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from tnt_kernels import _checks, _ops, native
from tnt_kernels.backends import reference
from tnt_kernels.backends.cpu import CODES
from tnt_kernels.outer.packed import pack_linear

__all__ = ["add_layer_norm", "outer_block", "packed_linear"]

# Images pass through the block in groups whose MLP activations stay below this.
_GROUP_BYTES = 16 << 20


@functools.cache
def keep_freed_memory() -> None:
    """Has glibc keep buffers of the size of a group for the next use.

    It maps a large block anew at each allocation, or trims its heap at each release, until it has seen a
    mapped block of that size come back (at most 32 MiB: M_MMAP_THRESHOLD in mallopt(3) is dynamic). Without
    this, page faults take 5 to 10 % of the time of a model. Nothing is touched or kept here.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)


def group_size(batch: int, image_bytes: int) -> int:
    """Returns how many images to take at a time where each needs `image_bytes` for its MLP."""
    groups = -(-batch * image_bytes // _GROUP_BYTES)
    return -(-batch // max(groups, 1)) or 1


def norm_parameters(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    if weight.dtype != bias.dtype or weight.dtype not in CODES:
        weight, bias = weight.float(), bias.float()
    return weight.contiguous(), bias.contiguous()


def launch_layer_norm(
    x: Tensor, y: Tensor | None, total: Tensor | None, norm: tuple[Tensor, Tensor], eps: float, out: Tensor
) -> None:
    """Writes the LayerNorm of x + y into out and, where there is a y, x + y into total; all contiguous."""
    module = native.load()
    assert module is not None
    weight, bias = norm
    d, y_dtype = x.shape[-1], x.dtype if y is None else y.dtype
    module.add_layer_norm(
        x.data_ptr(), 0 if y is None else y.data_ptr(), 0 if total is None else total.data_ptr(),
        CODES[x.dtype], CODES[y_dtype], weight.data_ptr(), bias.data_ptr(), CODES[weight.dtype],
        out.data_ptr(), CODES[out.dtype], x.numel() // d, d, eps, torch.get_num_threads(),
    )  # fmt: skip


def launch_attention(qkv: Tensor, out: Tensor, num_heads: int, scale: float) -> None:
    """Writes the attention of qkv [images, N, 3d] into out [images, N, d]; both contiguous, of one dtype."""
    module = native.load()
    assert module is not None
    images, n, d = out.shape
    code = CODES[out.dtype]
    module.outer_attention(
        qkv.data_ptr(), out.data_ptr(), code, code, images, n, num_heads, d // num_heads, scale,
        torch.get_num_threads(),
    )  # fmt: skip


def add_layer_norm(
    x: Tensor,  # [..., d]
    y: Tensor | None,  # [..., d]
    weight: Tensor,  # [d]
    bias: Tensor,  # [d]
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # x + y in the dtype of x ([0] without y), its LayerNorm in out_dtype
    _checks.check_add_layer_norm(x, y, weight, bias)
    if out_dtype is None:
        out_dtype = x.dtype
    if native.load() is None or torch.float64 in (x.dtype, weight.dtype, bias.dtype, out_dtype):
        return reference.add_layer_norm(x, y, weight, bias, eps, out_dtype)
    source = (x.float() if x.dtype == torch.float16 else x).contiguous()
    if y is not None:
        y = (y if y.dtype in CODES else y.float()).contiguous()
    total = torch.empty((0,) if y is None else x.shape, dtype=source.dtype)
    out = torch.empty(x.shape, dtype=torch.float32 if out_dtype == torch.float16 else out_dtype)
    norm = norm_parameters(weight, bias)
    launch_layer_norm(source, y, None if y is None else total, norm, eps, out)
    return total.to(x.dtype), out.to(out_dtype)


def packed_linear(
    x: Tensor,  # [..., inputs]
    weights: Sequence[Tensor],  # each [its outputs, inputs]
    biases: Sequence[Tensor | None],
    gelu: bool,
) -> Tensor:  # [..., outputs of all weights], in the dtype of x
    _checks.check_packed_linear(x, weights, biases)
    if x.dtype == torch.float64 or any(weight.numel() == 0 for weight in weights):
        with torch.autocast("cpu", enabled=False):
            return reference.packed_linear(x, weights, biases, gelu)
    held = torch.float32 if x.dtype == torch.float16 else x.dtype
    return pack_linear(weights, biases, held)(x.to(held), gelu).to(x.dtype)


def scaled(branch: Tensor, factors: Tensor | None, start: int) -> Tensor:
    """Scales, in place, the branch [images, N, d] of each image from number `start` on by its factor."""
    if factors is None:
        return branch
    return branch.mul_(factors[start : start + branch.shape[0], None, None])


def outer_block(
    tokens: Tensor,  # [B, N, d]
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    qk_weight: Tensor,
    qk_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    num_heads: int,
    scale: float,
    eps1: float,
    eps2: float,
    compute_dtype: torch.dtype | None,
    drop_path1: Tensor | None = None,  # [B] factor of each image's attention, and of its MLP
    drop_path2: Tensor | None = None,
) -> Tensor:  # [B, N, d]
    parameters = (
        norm1_weight, norm1_bias, qk_weight, qk_bias, v_weight, v_bias, proj_weight, proj_bias,
        norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
    )  # fmt: skip
    _checks.check_outer_block(tokens, *parameters, num_heads, compute_dtype)
    _checks.check_drop_path("outer_block", tokens, "tokens", drop_path1=drop_path1, drop_path2=drop_path2)
    if native.load() is None or tokens.dtype == torch.float64:
        options = (num_heads, scale, eps1, eps2, compute_dtype, drop_path1, drop_path2)
        return reference.inner_block_in(tokens, *parameters, *options)
    held = _ops.held_dtype(tokens, compute_dtype)
    norm1, norm2 = norm_parameters(norm1_weight, norm1_bias), norm_parameters(norm2_weight, norm2_bias)
    qkv_linear = pack_linear((qk_weight, v_weight), (qk_bias, v_bias), held)
    proj = pack_linear((proj_weight,), (proj_bias,), held)
    fc1 = pack_linear((fc1_weight,), (fc1_bias,), held)
    fc2 = pack_linear((fc2_weight,), (fc2_bias,), held)

    keep_freed_memory()
    batch, n, d = tokens.shape
    x = (tokens.float() if tokens.dtype == torch.float16 else tokens).contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    size = group_size(batch, n * fc1_weight.shape[0] * held.itemsize)
    buffer = torch.empty((min(size, batch), n, d), dtype=held)
    for start in range(0, batch, size):
        images = x[start : start + size]
        z = out[start : start + size]
        y = buffer[: images.shape[0]]
        launch_layer_norm(images, None, None, norm1, eps1, y)
        qkv = qkv_linear(y)
        launch_attention(qkv, y, num_heads, scale)
        del qkv
        launch_layer_norm(images, scaled(proj(y), drop_path1, start), z, norm2, eps2, y)
        z.add_(scaled(fc2(fc1(y, gelu=True)), drop_path2, start))
    return out.to(tokens.dtype)


for _implementation in (add_layer_norm, packed_linear, outer_block):
    _ops.lib.impl(_implementation.__name__, _implementation, "CPU")
