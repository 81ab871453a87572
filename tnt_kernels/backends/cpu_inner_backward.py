"""Gradients of the inner operators on the native CPU backend.

The kernel computes the block again from x. It sums the gradients of parameters in float32, in an order that
does not depend on the number of threads. float64, or a missing native module, goes through plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tnt_kernels import _checks, _ops, native
from tnt_kernels._autograd import composite_backward, tensor_positions
from tnt_kernels.backends import reference
from tnt_kernels.backends.cpu import (
    _ATTENTION,
    _BOTH,
    _MLP,
    CODES,
    _compute_code,
    _held,
    _parameters,
    _seed_of,
)

_ATTENTION_PARAMETERS, _MLP_PARAMETERS = 8, 6


def _launch(
    grad: Tensor,  # [S, m, c]
    needed: Sequence[bool],  # of x and the 14 parameters
    x: Tensor,
    parameters: Sequence[Tensor | None],
    parts: int,
    num_heads: int,
    scale: float,
    eps1: float,
    eps2: float,
    compute_dtype: torch.dtype | None,
    drop_path1: Tensor | None,
    drop_path2: Tensor | None,
    seed: Tensor | None,
    drops: Sequence[float],
) -> list[Tensor]:
    module = native.load()
    assert module is not None
    s, m, c = x.shape
    tensors = [x, *parameters]
    wanted = [tensor if flag else None for tensor, flag in zip(tensors, needed, strict=True)]
    if x.numel() == 0:
        return [torch.zeros_like(tensor) for tensor in wanted if tensor is not None]
    source, grad = _held(x), _held(grad)
    grad_x = torch.empty_like(source) if needed[0] else None
    grads = [None if p is None else torch.empty(p.shape, dtype=torch.float32) for p in wanted[1:]]
    pointers, codes, held = _parameters(parameters)
    factors, _, held_factors = _parameters((drop_path1, drop_path2))
    fc1_weight = parameters[10]
    module.inner_block_backward(
        source.data_ptr(), grad.data_ptr(), 0 if grad_x is None else grad_x.data_ptr(), CODES[source.dtype],
        _compute_code(x.dtype, compute_dtype), s, m, c, 0 if fc1_weight is None else fc1_weight.shape[0],
        num_heads, parts, scale, eps1, eps2, pointers, codes, *factors,
        _seed_of(seed), drops, [0 if g is None else g.data_ptr() for g in grads], torch.get_num_threads(),
    )  # fmt: skip
    del held, held_factors
    found = zip(wanted, [grad_x, *grads], strict=True)
    return [
        gradient.to(tensor.dtype) for tensor, gradient in found if tensor is not None and gradient is not None
    ]


def _runs(x: Tensor, factors: Sequence[bool]) -> bool:
    """Whether the kernel can do it: it has no gradients of drop path's factors."""
    return native.load() is not None and x.dtype != torch.float64 and not any(factors)


def _by_autograd(composite: Callable[..., Tensor], op: Any) -> Callable[..., list[Tensor]]:
    positions = tensor_positions(op)

    def backward(grad: Tensor, needed: Sequence[bool], *args: Any) -> list[Tensor]:
        return composite_backward(composite, positions, grad, needed, args)

    return backward


_block_by_autograd = _by_autograd(reference.inner_block_in, _ops.inner_block)
_attention_by_autograd = _by_autograd(reference.inner_attention_in, _ops.inner_attention)
_mlp_by_autograd = _by_autograd(reference.inner_mlp_in, _ops.inner_mlp)


def _noise(given: Sequence[Any], tensors: int, rates: int) -> list[Any]:
    """Drop path, seed and rates, of which the dispatcher leaves out trailing ones at their defaults."""
    defaults: list[Any] = [*[None] * tensors, *[0.0] * rates]
    return [*given, *defaults[len(given) :]]


def inner_block_backward(grad: Tensor, needed: Sequence[bool], x: Tensor, *args: Any) -> list[Tensor]:
    parameters, options = args[:14], args[14:]
    num_heads, scale, eps1, eps2, compute_dtype = options[:5]
    drop_path1, drop_path2, seed, *drops = _noise(options[5:], 3, 4)
    _checks.check_inner_block(x, *parameters, num_heads, compute_dtype)
    _checks.check_drop_path("inner_block", x, drop_path1=drop_path1, drop_path2=drop_path2)
    _checks.check_dropout("inner_block", x, (seed, *drops), _checks.DROPS)
    _checks.check_gradient("inner_block_backward", grad, x.shape, x.dtype, x.device)
    if not _runs(x, needed[15:]):
        return _block_by_autograd(grad, needed, x, *args)
    return _launch(
        grad, needed[:15], x, parameters, _BOTH, num_heads, scale, eps1, eps2, compute_dtype, drop_path1,
        drop_path2, seed, drops,
    )  # fmt: skip


def inner_attention_backward(grad: Tensor, needed: Sequence[bool], x: Tensor, *args: Any) -> list[Tensor]:
    parameters, options = args[:_ATTENTION_PARAMETERS], args[_ATTENTION_PARAMETERS:]
    num_heads, scale, eps, compute_dtype = options[:4]
    drop_path, seed, *drops = _noise(options[4:], 2, 2)
    _checks.check_inner_attention(x, *(*parameters, num_heads, compute_dtype))
    _checks.check_drop_path("inner_attention", x, drop_path=drop_path)
    _checks.check_dropout("inner_attention", x, (seed, *drops), _checks.ATTENTION_DROPS)
    _checks.check_gradient("inner_attention_backward", grad, x.shape, x.dtype, x.device)
    if not _runs(x, needed[1 + _ATTENTION_PARAMETERS :]):
        return _attention_by_autograd(grad, needed, x, *args)
    absent = (None,) * _MLP_PARAMETERS
    flags = (*needed[: 1 + _ATTENTION_PARAMETERS], *([False] * _MLP_PARAMETERS))
    return _launch(
        grad, flags, x, (*parameters, *absent), _ATTENTION, num_heads, scale, eps, eps, compute_dtype,
        drop_path, None, seed, (*drops, 0.0, 0.0),
    )  # fmt: skip


def inner_mlp_backward(grad: Tensor, needed: Sequence[bool], x: Tensor, *args: Any) -> list[Tensor]:
    parameters, options = args[:_MLP_PARAMETERS], args[_MLP_PARAMETERS:]
    eps, compute_dtype = options[:2]
    drop_path, seed, *drops = _noise(options[2:], 2, 2)
    _checks.check_inner_mlp(x, *(*parameters, compute_dtype))
    _checks.check_drop_path("inner_mlp", x, drop_path=drop_path)
    _checks.check_dropout("inner_mlp", x, (seed, *drops), _checks.MLP_DROPS)
    _checks.check_gradient("inner_mlp_backward", grad, x.shape, x.dtype, x.device)
    if not _runs(x, needed[1 + _MLP_PARAMETERS :]):
        return _mlp_by_autograd(grad, needed, x, *args)
    absent = (None,) * _ATTENTION_PARAMETERS
    flags = (needed[0], *([False] * _ATTENTION_PARAMETERS), *needed[1 : 1 + _MLP_PARAMETERS])
    return _launch(
        grad, flags, x, (*absent, *parameters), _MLP, 1, 1.0, eps, eps, compute_dtype, None, drop_path,
        seed, (0.0, 0.0, *drops),
    )  # fmt: skip


for _launcher in (inner_attention_backward, inner_block_backward, inner_mlp_backward):
    _ops.lib.impl(_launcher.__name__, _launcher, "CPU")
