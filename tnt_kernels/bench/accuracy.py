"""Errors against float64, and the limits that a result must keep."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EAGER_FACTOR = 1.5
FLOOR = 1e-6

# Gradients (and what else a backward pass is judged by), in groups that are judged one by one.
Gradients = Mapping[str, Sequence[Tensor]]
Result = Tensor | Gradients
Limit = Callable[[float, float], float]  # of eager's error and the exact result's scale


@dataclass(frozen=True)
class Accuracy:
    """Errors of a result, and of eager PyTorch in the same precision, against float64.

    Of a tensor the largest absolute error, `scale` being the largest exact value. Of gradients those of the
    group that is nearest to its limit, or farthest beyond it, in units of its scale (`rms_error`).
    """

    error: float
    eager_error: float
    scale: float
    limit: float
    group: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.limit

    @property
    def ratio(self) -> float:
        return self.error / self.eager_error if self.eager_error > 0 else math.inf if self.error > 0 else 1.0


def max_error(result: Tensor, exact: Tensor) -> float:
    """Largest |result - exact|; NaN where either has one, infinity where the shapes differ."""
    if result.shape != exact.shape:
        return math.inf
    return (result.detach().double() - exact).abs().max().item() if exact.numel() else 0.0


def rms_error(gradients: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Root mean square error of a group of gradients; infinity where one is missing or of another shape.

    Each counts the same, whatever its size, and is measured in units of its largest exact value. The largest
    error, which other results are judged by, is luck for the few values of a bias.
    """
    if [g.shape for g in gradients] != [e.shape for e in exact]:
        return math.inf
    squares = 0.0
    for gradient, true in zip(gradients, exact, strict=True):
        if true.numel():
            scale = true.abs().max().item() or 1.0
            squares += ((gradient.double() - true) / scale).square().mean().item()
    return math.sqrt(squares / max(len(exact), 1))


def as_accurate_as_eager(result: Result, eager: Result, exact: Result) -> Accuracy:
    """The rule for this package: error <= 1.5 x eager's + 1e-6 of the largest exact value.

    All three alike: tensors of one shape, or gradients in the same groups; `exact` is float64.
    """
    return _judge(result, eager, exact, lambda error, scale: EAGER_FACTOR * error + FLOOR * scale)


def close_enough(result: Result, eager: Result, exact: Result, precision: torch.dtype) -> Accuracy:
    """The rule for foreign baselines, which need not round as eager does: a fixed share of the largest value.

    It is there to catch a baseline that computes something else (a wrong export, another layout), so that its
    time is not reported.
    """
    share = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}[precision]
    return _judge(result, eager, exact, lambda error, scale: share * scale)


def _judge(result: Result, eager: Result, exact: Result, limit: Limit) -> Accuracy:
    if isinstance(exact, Tensor):
        if not isinstance(result, Tensor) or not isinstance(eager, Tensor):
            raise TypeError("result and eager must be tensors, as exact is")
        scale = exact.abs().max().item() if exact.numel() else 0.0
        eager_error = max_error(eager, exact)
        return Accuracy(max_error(result, exact), eager_error, scale, limit(eager_error, scale))
    if isinstance(result, Tensor) or isinstance(eager, Tensor):
        raise TypeError("result and eager must be groups of gradients, as exact is")
    found = []
    for group, gradients in exact.items():
        error = rms_error(result.get(group, ()), gradients)
        eager_error = rms_error(eager.get(group, ()), gradients)
        found.append(Accuracy(error, eager_error, 1.0, limit(eager_error, 1.0), group))
    return max(found, key=_excess)


def _excess(accuracy: Accuracy) -> float:
    """Error in units of its limit; infinite where it is NaN."""
    excess = accuracy.error / max(accuracy.limit, sys.float_info.min)
    return math.inf if math.isnan(excess) else excess
