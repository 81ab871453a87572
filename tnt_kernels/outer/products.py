"""Matrix products of training, by weights as they lie.

A weight that changes at every step is used three times between changes: reordering it for oneDNN, as
packed.py does for inference, costs what it saves. oneDNN's operator also takes a plain, even a transposed
weight, and is up to twice as fast as the product behind F.linear where that is not oneDNN's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tnt_kernels.outer.packed import onednn_runs

__all__ = ["joined", "linear", "weight_gradient"]


def joined(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Returns the weight [all outputs, inputs] and bias [all outputs] of linear layers of the same input."""
    weight = torch.cat([weight.to(dtype) for weight in weights])
    if all(bias is None for bias in biases):
        return weight, None
    parts = [
        torch.zeros(weight.shape[0]) if bias is None else bias.float()
        for weight, bias in zip(weights, biases, strict=True)
    ]
    return weight, torch.cat(parts)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x weight^T + bias in the dtype of x.

    x: [..., inputs], weight: [outputs, inputs], both of any strides; bias: [outputs] or None.
    """
    if onednn_runs(x.dtype):
        bias = None if bias is None else bias.to(torch.float32).contiguous()
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    with torch.autocast("cpu", enabled=False):
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Returns grad^T x: grad [tokens, outputs] of any strides, x [tokens, inputs] -> [outputs, inputs]."""
    if grad.dtype == torch.float32:
        return linear(grad.t(), x.t())
    with torch.autocast("cpu", enabled=False):
        return torch.mm(grad.t(), x)  # oneDNN's too, and takes both operands as they lie
