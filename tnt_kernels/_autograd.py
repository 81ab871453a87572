"""Gradients of the registered operators by recomputation: as a rule only an operator's inputs are kept.

For every operator there is a second one that returns the gradients of those of its tensor arguments that
need one:

    <name>_backward(Tensor grad, bool[] needed, <activations>, <arguments of the operator>) -> Tensor[]

`needed` has an entry for every tensor argument, present or not, in the order of the schema. Activations are
kept where computing them again would cost too much. A third operator returns them behind the result:

    <name>_train(<arguments of the operator>) -> (Tensor, <activations>)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "COMPOSITES",
    "autograd_on",
    "composite_backward",
    "define_backward",
    "define_train",
    "record",
    "tensor_positions",
]

# What computes an operator, by its name, in plain PyTorch on any device.
COMPOSITES: dict[str, Callable[..., Any]] = {}


def tensor_positions(op: Any) -> list[int]:
    """Returns where in its schema an operator takes a tensor (or None in place of one)."""
    kinds = [str(argument.type) for argument in op._schema.arguments]
    return [i for i, kind in enumerate(kinds) if kind in ("Tensor", "Optional[Tensor]")]


def _arguments(op: Any) -> tuple[str, str]:
    """The operator's name without its namespace, and its arguments as its schema has them."""
    return op._schema.name.split("::")[1], str(op._schema).split("(", 1)[1].rsplit(") ->", 1)[0]


def define_train(lib: torch.library.Library, op: Any, activations: Sequence[str]) -> Any:
    """Defines `<name>_train` of an operator, without an implementation or a fake."""
    name, arguments = _arguments(op)
    results = ", ".join(f"Tensor {result}" for result in ("out", *activations))
    lib.define(f"{name}_train({arguments}) -> ({results})", tags=(torch.Tag.pt2_compliant_tag,))
    return getattr(torch.ops.tnt_kernels, f"{name}_train").default


def define_backward(
    lib: torch.library.Library, op: Any, composite: Callable[..., Tensor], activations: Sequence[str] = ()
) -> Any:
    """Defines `<name>_backward` of an operator with one result: by autograd until a device does better."""
    name, arguments = _arguments(op)
    kept = "".join(f"Tensor {activation}, " for activation in activations)
    lib.define(
        f"{name}_backward(Tensor grad, bool[] needed, {kept}{arguments}) -> Tensor[]",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    positions = tensor_positions(op)

    def by_autograd(grad: Tensor, needed: Sequence[bool], *args: Any) -> list[Tensor]:
        return composite_backward(composite, positions, grad, needed, args[len(activations) :])

    def fake(grad: Tensor, needed: Sequence[bool], *args: Any) -> list[Tensor]:
        args = args[len(activations) :]
        wanted = [args[i] for i, wants in zip(positions, needed, strict=True) if wants]
        return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in wanted]

    COMPOSITES[f"{name}_backward"] = by_autograd
    lib.impl(f"{name}_backward", by_autograd, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tnt_kernels::{name}_backward", fake, lib=lib)
    return getattr(torch.ops.tnt_kernels, f"{name}_backward").default


def composite_backward(
    composite: Callable[..., Tensor],
    positions: Sequence[int],
    grad: Tensor,
    needed: Sequence[bool],
    args: Sequence[Any],
) -> list[Tensor]:
    """Returns the needed gradients, by autograd through `composite`."""
    args = list(args)
    wanted = []
    for i, wants in zip(positions, needed, strict=True):
        if i < len(args) and args[i] is not None:
            args[i] = args[i].detach().requires_grad_(wants)
            if wants:
                wanted.append(args[i])
    with autograd_on(), torch.enable_grad():
        out = composite(*args)
        found = torch.autograd.grad(out, wanted, grad, allow_unused=True)
    return [
        torch.zeros_like(tensor) if gradient is None else gradient.contiguous()
        for tensor, gradient in zip(wanted, found, strict=True)
    ]


def autograd_on() -> AbstractContextManager[Any]:
    """Autograd inside an operator, which the dispatcher may have switched off around it."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def record(
    op: Any,
    train: Any | None,
    backward: Any,
    composite: Callable[..., Tensor],
    keyset: torch._C.DispatchKeySet,
    args: tuple[Any, ...],
) -> Tensor:
    """Runs an operator (its `train`, where it has one) and records it; called from its Autograd kernel."""
    # Arguments left at their defaults are not passed on by the dispatcher.
    defaults = [argument.default_value for argument in op._schema.arguments[len(args) :]]
    return _Recompute.apply(op, train, backward, composite, keyset, *args, *defaults)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, op: Any, train: Any, backward: Any, composite: Any, keyset: Any, *args: Any
    ) -> Tensor:
        ctx.backward_op, ctx.composite = backward, composite
        ctx.positions = tensor_positions(op)
        ctx.others = [None if i in ctx.positions else value for i, value in enumerate(args)]
        keyset = keyset & torch._C._after_autograd_keyset
        with torch._C._AutoDispatchBelowAutograd():
            if train is None:
                out, *activations = [op.redispatch(keyset, *args)]
            else:
                out, *activations = train.redispatch(keyset, *args)
        ctx.save_for_backward(*(args[i] for i in ctx.positions), *activations)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        before = 5  # arguments of forward that are not the operator's
        found: list[Tensor | None] = [None] * (before + len(ctx.others))
        needed = [ctx.needs_input_grad[before + i] for i in ctx.positions]
        if grad is None or not any(needed):
            return tuple(found)
        args = list(ctx.others)
        saved = ctx.saved_tensors  # unpacked once: a hook may compute them
        tensors, activations = saved[: len(ctx.positions)], saved[len(ctx.positions) :]
        for i, tensor in zip(ctx.positions, tensors, strict=True):
            args[i] = tensor
        wanted = [i for i, wants in zip(ctx.positions, needed, strict=True) if wants]
        if torch.is_grad_enabled():  # create_graph=True: the gradients are themselves to be differentiated
            out = ctx.composite(*args)
            inputs = [args[i] for i in wanted]
            gradients = torch.autograd.grad(out, inputs, grad, create_graph=True, allow_unused=True)
        else:
            gradients = ctx.backward_op(grad, needed, *activations, *args)
        for i, gradient in zip(wanted, gradients, strict=True):
            found[before + i] = gradient
        return tuple(found)
