"""Errors against float64, and the limits that a result must keep."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EAGER_FACTOR = 1.5
FLOOR = 1e-6


@dataclass(frozen=True)
class Accuracy:
    """Largest absolute errors of a result, and of eager PyTorch in the same precision, against float64."""

    error: float
    eager_error: float
    scale: float
    limit: float

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


def as_accurate_as_eager(result: Tensor, eager: Tensor, exact: Tensor) -> Accuracy:
    """The rule for this package: error <= 1.5 x eager's + 1e-6 of the largest exact value.

    All three of one shape; `exact` is float64.
    """
    scale = exact.abs().max().item() if exact.numel() else 0.0
    eager_error = max_error(eager, exact)
    return Accuracy(max_error(result, exact), eager_error, scale, EAGER_FACTOR * eager_error + FLOOR * scale)


def close_enough(result: Tensor, eager: Tensor, exact: Tensor, precision: torch.dtype) -> Accuracy:
    """The rule for foreign baselines, which need not round as eager does: a fixed share of the largest value.

    It is there to catch a baseline that computes something else (a wrong export, another layout), so that its
    time is not reported.
    """
    share = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}[precision]
    scale = exact.abs().max().item() if exact.numel() else 0.0
    return Accuracy(max_error(result, exact), max_error(eager, exact), scale, share * scale)
