"""Say which parts of the TNTs inside a module run fused, and why the others do not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from tnt_kernels import dispatch
from tnt_kernels.models import fused
from tnt_kernels.models.accelerate import (
    LOOKED_FOR,
    Plan,
    candidates,
    check_module,
    is_accelerated,
    is_fast,
    refusal,
)
from tnt_kernels.models.fast_tnt import FastTNT
from tnt_kernels.models.plan import (
    BlockPlan,
    ModelPlan,
    Part,
    PixelPlan,
    block_as_written,
    checkpointed,
    model_as_written,
    part_as_written,
    pixel_as_written,
    watched,
)

AS_WRITTEN, ERROR = "as written", "error"


@dataclass(frozen=True)
class PartReport:
    """One part of a model: where it runs in a call made now, and why not elsewhere."""

    module: str  # name inside the model, "" for the model itself
    part: str  # such as "inner half"
    runs: (
        str  # the backend of its fused operation; "as written"; "error" where a forced backend cannot run it
    )
    why: str  # why it does not run fused, or not on a faster backend, or ""

    @property
    def fused(self) -> bool:
        return self.runs not in (AS_WRITTEN, ERROR)


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found: `parts`, and the `mode` that they hold for. `print` shows a table."""

    mode: dict[str, str]
    parts: tuple[PartReport, ...]

    def __str__(self) -> str:
        lines = [f"{name}: {value}" for name, value in self.mode.items()]
        if not self.parts:
            return "\n".join([*lines, "", f"nothing that tnt_kernels could run: there are no {LOOKED_FOR}"])
        rows = [("module", "part", "runs", "why"), *_joined(self.parts)]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines.append("")
        for row in (rows[0], tuple("-" * len(cell) for cell in rows[0]), *rows[1:]):
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join([*cells, row[3]]).rstrip())
        return "\n".join(lines)


def _joined(parts: tuple[PartReport, ...]) -> Iterator[tuple[str, str, str, str]]:
    """Rows of the table; neighbours of one parent that agree in everything share theirs."""
    modules = [
        (name, tuple((part.part, part.runs, part.why) for part in found))
        for name, found in itertools.groupby(parts, key=lambda part: part.module)
    ]
    for (_, rows), group in itertools.groupby(
        modules, key=lambda item: (item[0].rpartition(".")[0], item[1])
    ):
        names = [name or "(model)" for name, _ in group]
        shown = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        for index, row in enumerate(rows):
            yield ("" if index else shown, *row)


def explain(model: nn.Module) -> Explanation:
    """Which parts of the TNTs inside a module run fused in a call made now, and why the others do not.

    It answers for the present modes of the modules, grad mode, autocast, dtype, device, hooks and backend
    choice, whatever the input. Before :func:`accelerate` it says what that would change. Outside of a
    forward pass the parameters of `fully_shard` are sharded, and no part runs fused on them: ask inside one.

    Raises:
        TypeError: `model` is no module.
    """
    check_module(model)
    parts: list[PartReport] = []
    found: Iterable[tuple[str, Verdict]]
    planned = list(candidates(model))
    for name, module, plan in planned:
        if isinstance(plan, BlockPlan):
            found = _block_parts(module, plan)
        elif isinstance(plan, PixelPlan):
            found = _pixel_parts(module, plan)
        else:
            found = _model_parts(module, plan)
        for part, verdict in found:
            runs, why = verdict if is_fast(module) else _before(plan, *verdict)
            parts.append(PartReport(name, part, runs, why))
    return Explanation(_mode(model, [module for _, module, _ in planned]), tuple(parts))


Verdict = tuple[str, str]  # runs, why


def _before(plan: Plan, runs: str, why: str) -> Verdict:
    if refusal(plan) is not None:
        return AS_WRITTEN, f"accelerate() leaves it as it is: {why}"
    return AS_WRITTEN, f"not accelerated, which would not help now: {why}" if why else "not accelerated"


def _verdict(
    why: str | None, part: Part, arguments: Callable[[], fused.Arguments], needs_grad: bool | None = None
) -> Verdict:
    """`why` is what the modules have against it; their parameters and the backend may have something, too."""
    if why is not None:
        return AS_WRITTEN, why
    backend = dispatch.requested()
    if backend == "reference":
        return AS_WRITTEN, "the reference backend is asked for"
    tensors = arguments().parameters
    dtypes = {str(tensor.dtype) for tensor in tensors if tensor is not None and tensor.dim() > 1}
    if len(dtypes) > 1 and not fused.autocast(tensors[0]):
        return AS_WRITTEN, f"its weights are of several dtypes: {', '.join(sorted(dtypes))}"
    against: dict[str, str] = {}
    for runs in dispatch.backends_for(part.op, tensors) if backend == "auto" else (backend,):
        found = dispatch.can_run(runs, part.op, *tensors, needs_grad=needs_grad)
        if found is None:
            return runs, "; ".join(f"not {name}: {reason}" for name, reason in against.items())
        against[runs] = found
    why = "; ".join(dict.fromkeys(against.values()))
    return (AS_WRITTEN, why) if backend == "auto" else (ERROR, f"the {backend} backend is forced: {why}")


def _block_parts(block: nn.Module, plan: BlockPlan) -> Iterator[tuple[str, Verdict]]:
    whole = block_as_written(block, plan)
    named = {"inner half": plan.inner, "projection": plan.projection, "outer half": plan.outer}
    for name, part in named.items():
        if part is not None:
            why = whole or part_as_written(block, part)
            yield name, _verdict(why, part, partial(fused.part_arguments, block, plan, part))


def _pixel_parts(module: nn.Module, plan: PixelPlan) -> Iterator[tuple[str, Verdict]]:
    why = pixel_as_written(module, plan)
    yield "pixel embedding", _verdict(why, plan.part, partial(fused.pixel_arguments, module))


def _model_parts(model: nn.Module, plan: ModelPlan) -> Iterator[tuple[str, Verdict]]:
    names = plan.names
    children: dict[str, Any] = model._modules
    whole = model_as_written(model, plan)
    if isinstance(model, FastTNT):
        pixel = children[names.pixel_embed]
        why = whole or watched(pixel) or pixel_as_written(pixel, plan.pixel)
        yield "pixel embedding", _verdict(why, plan.pixel.part, partial(fused.pixel_arguments, pixel))
    else:
        whole = whole or checkpointed(model, plan)
    why = whole or part_as_written(model, plan.stem)
    yield "stem", _verdict(why, plan.stem, partial(fused.projection_arguments, model, names.projection))

    blocks = list(children[names.blocks]._modules.values())
    block_plan = getattr(blocks[-1], fused.PLAN, None) if blocks else None
    if block_plan is None:
        return
    last, half = blocks[-1], block_plan.outer
    why = whole or checkpointed(model, plan) or watched(last) or block_as_written(last, block_plan)
    why = why or part_as_written(last, half)
    arguments = partial(fused.part_arguments, last, block_plan, half)
    yield "last block, class token alone", _verdict(why, half, arguments, needs_grad=False)


def _mode(model: nn.Module, planned: list[nn.Module]) -> dict[str, str]:
    modes = {"training" if module.training else "eval" for module in planned or [model]}
    parameters = list(model.parameters())
    mode = {
        "model": type(model).__name__
        + (", accelerated" if any(map(is_accelerated, model.modules())) else ""),
        "mode": " and ".join(sorted(modes)),
        "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})) or "none",
        "device": ", ".join(sorted({str(p.device) for p in parameters})) or "none",
        "gradients": "recorded" if torch.is_grad_enabled() else "not recorded",
        "backend": dispatch.requested(),
    }
    if parameters and fused.autocast(parameters[0]):
        dtype = torch.get_autocast_dtype(parameters[0].device.type)
        mode["autocast"] = str(dtype).removeprefix("torch.")
    return mode
