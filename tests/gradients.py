"""Gradients of an operation: ours, eager PyTorch's in the same precision, and exact ones in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from oracle import (
    ERROR_FLOOR,
    ERROR_RATIO,
    assert_same_special_values,
    autocasting,
    in_dtype,
    largest_error,
    reference_arguments,
)
from torch import Tensor

from tnt_kernels import ops
from tnt_kernels.backends import reference
from tnt_kernels.dispatch import use_backend

NO_GRADIENT = ("drop_path", "drop_path1", "drop_path2", "seed")
MANY = 1024  # below so many elements the largest error is luck, and the mean one is compared


def tensors_of(given: Mapping[str, Any]) -> list[str]:
    """Names of the arguments that have a gradient."""
    return [name for name, value in given.items() if isinstance(value, Tensor) and name not in NO_GRADIENT]


def drop_path_factors(rows: int, keep: float = 0.7) -> Tensor:
    return torch.empty(rows).bernoulli_(keep) / keep


def gradients(
    function: Any,
    given: Mapping[str, Any],
    grad: Tensor,
    *,
    autocast: torch.dtype | None = None,
    wanted: list[str] | None = None,
) -> dict[str, Tensor]:
    """Gradients of a function's keyword arguments, those in `wanted` or all, for `grad` of its result."""
    wanted = tensors_of(given) if wanted is None else wanted
    values = {
        name: value.detach().clone(memory_format=torch.preserve_format).requires_grad_(name in wanted)
        if name in tensors_of(given)
        else value
        for name, value in given.items()
    }
    with autocasting(values, autocast):
        out = function(**values)
    found = torch.autograd.grad(out, [values[name] for name in wanted], grad.to(out.dtype))
    return dict(zip(wanted, found, strict=True))


def eager_and_exact_gradients(
    op: str, given: Mapping[str, Any], grad: Tensor, autocast: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    values, function = reference_arguments(op, given), getattr(reference, op)
    eager = gradients(function, values, grad, autocast=autocast)
    return eager, gradients(function, in_dtype(values, torch.float64), grad.double())


def assert_gradients_as_accurate(
    ours: Mapping[str, Tensor], eager: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> None:
    """Asserts of each gradient that it is as close to the exact one as eager's is (tests/oracle.py)."""
    for name, value in ours.items():
        theirs, truth = eager[name], exact[name]
        assert value.dtype == theirs.dtype, (name, value.dtype, theirs.dtype)
        assert value.shape == theirs.shape, (name, value.shape, theirs.shape)
        assert_same_special_values(value, theirs)
        if truth.numel() == 0 or not bool(torch.isfinite(theirs).all()):
            continue
        error = largest_error if truth.numel() >= MANY else _mean_error
        mine, eagers = error(value, truth), error(theirs, truth)
        allowed = ERROR_RATIO * eagers + ERROR_FLOOR * truth.abs().max().item()
        assert mine <= allowed, (
            f"gradient of {name}: error {mine:.3e} against eager's {eagers:.3e}, allowed {allowed:.3e}"
        )


def _mean_error(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact).square().mean().sqrt().item()


def check_gradients(
    op: str,
    given: Mapping[str, Any],
    autocast: torch.dtype | None = None,
    grad: Tensor | None = None,
    backend: str = "cpu",
) -> dict[str, Tensor]:
    """Asserts that every gradient of an operation on a backend is as accurate as eager's; returns them."""
    if grad is None:
        with torch.no_grad():
            out = getattr(reference, op)(**reference_arguments(op, given))
        grad = torch.randn(out.shape).to(out)
    eager, exact = eager_and_exact_gradients(op, given, grad, autocast)
    with use_backend(backend):
        ours = gradients(getattr(ops, op), given, grad, autocast=autocast)
    assert_gradients_as_accurate(ours, eager, exact)
    return ours
