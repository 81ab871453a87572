"""Make the TNTs inside a module faster, in place, and undo it.

A recognised module keeps its identity, parameters, buffers, children and hooks; only its class becomes a
subclass of its own class, with the same name, whose forward runs fused where it may and else is the class's
own.
"""

from __future__ import annotations

import copyreg
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from tnt_kernels.models import fused
from tnt_kernels.models.fast_tnt import FastBlock, FastTNT
from tnt_kernels.models.plan import (
    AUTHORS_BLOCK,
    AUTHORS_MODEL,
    INTERNAL,
    ORIGINAL,
    TIMM_BLOCK,
    TIMM_MODEL,
    BlockPlan,
    ModelPlan,
    PixelPlan,
    is_plain,
    own_class,
    plan_block,
    plan_model,
    plan_pixel_embed,
)
from tnt_kernels.models.proof import prove_block, prove_model, prove_pixel_embed

Plan = BlockPlan | PixelPlan | ModelPlan
Model = TypeVar("Model", bound=nn.Module)


LOOKED_FOR = (
    f"blocks with the children {', '.join(AUTHORS_BLOCK.outer)} (the authors' names) or "
    f"{', '.join(TIMM_BLOCK.outer)} (timm's)"
)


def accelerate(model: Model) -> Model:
    """Make every TNT in a module faster, in place; returns the module.

    A TNT is recognised by its structure: a block whose children have the authors' names or timm's (current
    or legacy), wherever it lies and whoever wrote its class. Each is first proved by a test run of a copy:
    a block that computes something else stays as it is. Names, parameters, hooks, state dict, `repr` and
    `isinstance` do not change, and pickle, `copy.deepcopy`, `torch.compile` and `torch.export` work. What
    cannot run fused in a call (active dropout, a hooked or replaced module, ...) runs as it is written, and
    :func:`explain` says what and why. Accelerating twice is the same as once; :func:`restore` undoes it.

    Training runs fused too, and gives the gradients that the model had before. The same seed drops the same
    branches: the draws of a DropPath (timm's, or this package's) are made as it makes them.

    Warns where TNT blocks were found but none can run fused.

    Raises:
        TypeError: `model` is no module.
        ValueError: there is no TNT block in it.
    """
    check_module(model)
    blocks = fast = 0
    reasons: dict[str, list[str]] = {}
    for name, module, plan in list(candidates(model)):
        is_block = isinstance(plan, BlockPlan)
        blocks += is_block
        why = refusal(plan)
        if why is None and not is_fast(module):
            try:
                module.__class__ = fast_class(type(module), plan)
            except TypeError as error:  # __slots__, a metaclass or an __init_subclass__ with demands
                why = f"its class cannot be replaced: {error}"
        if is_block:
            fast += why is None
            if why is not None:
                reasons.setdefault(why, []).append(name or "the module")
    if not blocks:
        raise ValueError(f"nothing to accelerate in {type(model).__name__}: there are no {LOOKED_FOR}")
    if not fast:
        listed = "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())
        warnings.warn(f"no TNT block can be accelerated: {listed}", UserWarning, stacklevel=2)
    return model


def restore(model: Model) -> Model:
    """Undo :func:`accelerate`: every module has its own class again; returns the module.

    Raises:
        TypeError: `model` is no module, or a module got a class on top of its accelerated one, as
            `torch.distributed.fsdp.fully_shard` gives it. Nothing is restored then.
    """
    check_module(model)
    accelerated = [(name, module) for name, module in model.named_modules() if is_accelerated(module)]
    for name, module in accelerated:
        if ORIGINAL not in type(module).__dict__:
            raise TypeError(
                f"{name or 'model'} cannot be restored: it is a {type(module).__name__}, a class on top of "
                "its accelerated one; restore() comes before fully_shard()"
            )
    for _, module in accelerated:
        module.__class__ = own_class(module)
    return model


def check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def is_accelerated(module: nn.Module) -> bool:
    return hasattr(type(module), ORIGINAL)


def is_fast(module: nn.Module) -> bool:
    return is_accelerated(module) or isinstance(module, (FastBlock, FastTNT))


def refusal(plan: Plan) -> str | None:
    """Why nothing of the planned module can run fused, or None."""
    if isinstance(plan, PixelPlan):
        return plan.part.refused
    if plan.refused is not None or isinstance(plan, ModelPlan):
        return plan.refused
    parts = [part for part in (plan.inner, plan.projection, plan.outer) if part is not None]
    reasons = [part.refused for part in parts if part.refused is not None]
    return "; ".join(reasons) if len(reasons) == len(parts) else None


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, Plan]]:
    """Name, module and proved plan of every TNT, TNT block and pixel embedding; fast ones have theirs."""
    proved: dict[Any, Plan] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, torch.jit.ScriptModule):  # runs what was compiled, whatever its class
            continue
        plan: Plan | None = getattr(module, fused.PLAN, None)
        if plan is not None:
            yield name, module, plan
            continue
        prove: Callable[[Any, Any], Plan] = prove_block
        plan = plan_block(module)
        if plan is None and _is_pixel_embed(name, modules):
            plan, prove = plan_pixel_embed(module), prove_pixel_embed
        elif plan is None:
            plan, prove = plan_model(module), prove_model
        if plan is None:
            continue
        key = (type(module), plan, _configuration(module, plan))
        if key not in proved:
            proved[key] = prove(module, plan)
        yield name, module, proved[key]


def _is_pixel_embed(name: str, modules: dict[str, nn.Module]) -> bool:
    parent, _, last = name.rpartition(".")
    owner = modules[parent]
    siblings = owner._modules.get(AUTHORS_MODEL.blocks)
    if last not in (AUTHORS_MODEL.pixel_embed, TIMM_MODEL.pixel_embed) or siblings is None:
        return False
    if isinstance(owner, FastTNT):  # embeds without calling it
        return False
    return any(is_fast(block) or plan_block(block) is not None for block in siblings.children())


def _configuration(module: nn.Module, plan: Plan) -> tuple[Any, ...]:
    """All that the forward of two modules of one class may depend on, besides values of parameters."""
    rates = set() if isinstance(plan, PixelPlan) else {(".".join(path), rate) for path, rate in plan.noise}
    found: list[Any] = []
    for path, child in module.named_modules():
        found.append((path, type(child)))
        for name, value in child.__dict__.items():
            if name in INTERNAL or (path, name) in rates:
                continue
            found.append((name, type(value), value if is_plain(value) else id(value)))
        found.extend((name, value.shape) for name, value in child._parameters.items() if value is not None)
    return tuple(found)


_classes: dict[tuple[type[nn.Module], Plan], type[nn.Module]] = {}


def fast_class(original: type[nn.Module], plan: Plan) -> type[nn.Module]:
    """The subclass of a module's class that runs it fused, as its plan says: always the same one."""
    if (original, plan) not in _classes:
        _classes[original, plan] = _make_fast_class(original, plan)
    return _classes[original, plan]


def _make_fast_class(original: type[nn.Module], plan: Plan) -> type[nn.Module]:
    own: Any = original.forward
    run, count = _runner(plan)

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) == count and not kwargs:
            out = run(self, plan, *args)
            if out is not None:
                return out
        return own(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        made = original.__reduce_ex__(self, max(2, int(protocol)))
        if isinstance(made, tuple) and made[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return _new, (original, plan, *made[1][1:]), *made[2:]
        return made

    namespace = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        ORIGINAL: original,
        fused.PLAN: plan,
    }
    metaclass: Any = type(original)
    return metaclass(original.__name__, (original,), namespace)


def _runner(plan: Plan) -> tuple[Callable[..., Any], int]:
    """What runs a planned module fused, and how many inputs it takes."""
    if isinstance(plan, BlockPlan):
        return fused.run_block, 2
    if isinstance(plan, PixelPlan):
        return fused.run_pixel_embed, 2 if plan.positioned else 1
    return fused.run_model, 1


def _new(original: type[nn.Module], plan: Plan, *args: Any) -> nn.Module:
    """An empty accelerated module, for pickle and copy to fill."""
    cls = fast_class(original, plan)
    return cls.__new__(cls, *args)
