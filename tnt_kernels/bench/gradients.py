"""Gradients in the groups that they are judged by, and the memory held to compute them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from tnt_kernels.models.checkpoint import to_timm
from tnt_kernels.models.tnt import TNT

# Of fewer values even the mean error is luck: they are judged together.
SMALL = 1000


def by_size(gradients: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """Every large gradient alone, the small ones together."""
    groups: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        groups.setdefault(name if gradient.numel() >= SMALL else "small parameters", []).append(gradient)
    return groups


def of_model(model: nn.Module) -> dict[str, list[Tensor]]:
    """The gradients of a model's parameters, those of a part of the block from all blocks together.

    A TNT's groups are the same whatever names its parameters have.
    """
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if isinstance(model, TNT):
        found = to_timm(found)
    groups: dict[str, list[Tensor]] = {}
    for name, gradient in sorted(found.items()):
        part = re.match(r"blocks\.\d+\.(\w+)", name)
        groups.setdefault(f"blocks.*.{part[1]}" if part else "outside the blocks", []).append(gradient)
    return groups


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that are held for backward once `forward` has returned, `parameters` not counted.

    Whole storages, each once; what an autograd function hides outside its saved tensors is not seen.
    """
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    for parameter in parameters:
        held.pop(parameter.untyped_storage().data_ptr(), None)
    del out  # until here: a freed storage would lend its address to another
    return sum(held.values())
