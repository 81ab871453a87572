"""Weights in oneDNN's own layout, and the cache that keeps them.

oneDNN multiplies faster by a weight that lies in a blocked layout of its own choice. The reordered copy,
joined and cast where needed, is kept here, apart from modules, state dicts and pickles, for as long as
the weight's storage lives. It is used only while the weight is the one that was packed: same storage,
address, shape, strides and dtype, same version counter (every in-place operation of PyTorch advances it)
and same fingerprint of 64 samples, which catches what writes past the counter (``tensor.data``, a NumPy
view) unless it changes only a few values. :func:`clear_caches` is for that.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tnt_kernels import native

__all__ = ["PackedLinear", "cache_info", "clear_caches", "onednn_runs", "pack_linear"]

_SAMPLES = 64
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


class PackedLinear(NamedTuple):
    """One or more linear layers of the same input, ready to run in one dtype."""

    weight: Tensor  # [outputs, inputs]; in oneDNN's layout, opaque to PyTorch, where onednn is True
    bias: Tensor | None  # [outputs]
    onednn: bool

    def __call__(self, x: Tensor, gelu: bool = False) -> Tensor:
        if self.onednn:
            # The algorithm "none" is the exact GELU.
            epilogue, algorithm = ("gelu", "none") if gelu else ("none", "")
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, epilogue, [], algorithm)
        with torch.autocast("cpu", enabled=False):
            y = F.linear(x, self.weight, self.bias)
            return F.gelu(y) if gelu else y


class _Entry(NamedTuple):
    packed: PackedLinear
    state: tuple[tuple[int, int], ...]  # version and fingerprint of each source
    deaths: tuple[weakref.ref[torch.UntypedStorage], ...]  # their callbacks remove the entry


# Without a lock: an entry is read, stored and removed by single dictionary operations, and of two threads
# that pack the same weight at once either may win.
_cache: dict[tuple[object, ...], _Entry] = {}


@functools.cache
def _onednn_runs(dtype: torch.dtype) -> bool:
    """Returns whether torch's oneDNN operators can pack a weight of this dtype and multiply by it here."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.ones(2, 2, dtype=dtype))
        x, bias = torch.ones(1, 2, dtype=dtype), torch.ones(2)
        torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "none")
    except (AttributeError, RuntimeError):
        return False
    return True


def onednn_runs(dtype: torch.dtype) -> bool:
    """Returns whether linear layers of this dtype go to oneDNN's operator here and now."""
    return torch._C._get_mkldnn_enabled() and _onednn_runs(dtype)


def _pack(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], dtype: torch.dtype, onednn: bool
) -> PackedLinear:
    # What is kept must not be an inference tensor only because its first user is in inference mode.
    with torch.inference_mode(False), torch.no_grad():
        weight = torch.cat([weight.to(dtype) for weight in weights])
        if onednn:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        if all(bias is None for bias in biases):
            return PackedLinear(weight, None, onednn)
        parts = [
            weight.new_zeros(weight.shape[0]) if bias is None else bias
            for weight, bias in zip(weights, biases, strict=True)
        ]
        # oneDNN adds the bias to float32 sums.
        bias = torch.cat([part.to(torch.float32 if onednn else dtype) for part in parts])
        return PackedLinear(weight, bias, onednn)


def _fingerprint(tensor: Tensor) -> int:
    count = tensor.numel()
    if not tensor.is_contiguous():  # from the first element in memory to the last
        count = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    module = native.load()
    if module is not None:
        return module.sample(tensor.data_ptr(), count * tensor.element_size())
    flat = tensor.detach().as_strided((count,), (1,)).view(_INTEGERS[tensor.element_size()])
    return hash(tuple(flat[:: -(-count // _SAMPLES)].tolist()))


def _identity(tensor: Tensor) -> tuple[object, ...]:
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _cached(
    sources: Sequence[Tensor], dtype: torch.dtype, onednn: bool, pack: Callable[[], PackedLinear]
) -> PackedLinear:
    if any(source.is_inference() for source in sources):
        return pack()  # without a version counter nothing could tell that it has changed
    key = (dtype, onednn, *map(_identity, sources))
    # Read before packing: a change during it makes the entry out of date, not wrong.
    state = tuple((source._version, _fingerprint(source)) for source in sources)
    entry = _cache.get(key)
    if entry is None or entry.state != state:

        def forget(_: object, remove: Callable[..., object] = _cache.pop) -> None:
            remove(key, None)

        deaths = tuple(weakref.ref(source.untyped_storage(), forget) for source in sources)
        entry = _cache[key] = _Entry(pack(), state, deaths)
    return entry.packed


def pack_linear(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], dtype: torch.dtype
) -> PackedLinear:
    """Returns linear layers, joined along their outputs, that take input of this dtype.

    Args:
        weights: each [its outputs, inputs], not empty.
        biases: for each weight [its outputs] or None.
        dtype: float32 or bfloat16.
    """
    onednn = onednn_runs(dtype)
    if len(weights) > 1:
        sources = [*weights, *(bias for bias in biases if bias is not None)]
        return _cached(sources, dtype, onednn, lambda: _pack(weights, biases, dtype, onednn))
    weight, bias = weights[0], biases[0]
    # A lone bias is used as it is, so that nothing of it can become out of date.
    if bias is not None:
        bias = bias.contiguous()  # oneDNN's operator does not look at its stride
        if bias.dtype != dtype and not (onednn and bias.dtype == torch.float32):
            bias = bias.to(dtype)
    if not onednn and weight.dtype == dtype:
        return PackedLinear(weight, bias, onednn)
    packed = _cached(weights, dtype, onednn, lambda: _pack(weights, (None,), dtype, onednn))
    return packed._replace(bias=bias)


def clear_caches() -> None:
    """Forgets every packed weight; each layer packs its own anew at its next call."""
    _cache.clear()


def cache_info() -> dict[str, int]:
    """Returns how many packed weights are kept ("entries") and their size in memory ("bytes")."""
    kept = [entry.packed for entry in _cache.copy().values()]
    tensors = [tensor for packed in kept for tensor in (packed.weight, packed.bias) if tensor is not None]
    return {"entries": len(kept), "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors)}
