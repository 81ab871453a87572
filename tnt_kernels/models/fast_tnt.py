"""FastTNT: the reference TNT with every part that has one run by a fused operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tnt_kernels.models import fused
from tnt_kernels.models.checkpoint import infer_arguments, to_authors
from tnt_kernels.models.plan import (
    AUTHORS_BLOCK,
    AUTHORS_MODEL,
    BlockNames,
    BlockPlan,
    ModelPlan,
    checkpointed,
    model_as_written,
    plan_block,
    plan_model,
)
from tnt_kernels.models.proof import prove_block, prove_model, prove_squeeze
from tnt_kernels.models.tnt import TNT, VARIANTS, Block, DropPath


class FastBlock(Block):
    """A TNT block that runs fused what can be, and the rest as `Block` does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        setattr(self, fused.PLAN, plan_block(self))

    def forward(self, inner_tokens: Tensor, outer_tokens: Tensor) -> tuple[Tensor, Tensor]:
        out = fused.run_block(self, getattr(self, fused.PLAN), inner_tokens, outer_tokens)
        return super().forward(inner_tokens, outer_tokens) if out is None else out


class FastTNT(TNT):
    """TNT, [B, in_chans, H, W] -> logits [B, num_classes]: the constructor, names and state dict of `TNT`.

    Computes what `TNT` computes, up to rounding, and the same gradients; the same seed drops the same
    branches. What cannot run fused runs as in `TNT`, part by part: a half of a block whose dropout is active,
    a hooked or replaced module, another norm or activation, a device or dtype without a kernel
    (`tnt_kernels.explain(model)` says which and why). In the last block only the class token is computed, the
    one that the head reads, unless something watches that block or the last norm, or
    `set_grad_checkpointing` is on.
    """

    block_class = FastBlock

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        setattr(self, fused.PLAN, plan_model(self))

    @classmethod
    def from_reference(cls, model: nn.Module) -> FastTNT:
        """A FastTNT with a copy of the weights of a TNT: ours, one in the authors' names, or timm's.

        Device, dtype, training mode, requires_grad and the rates of dropout and drop path are those of
        `model`, which shares no memory with the result (`tnt_kernels.accelerate` works in place).

        Raises:
            TypeError: `model` is no module.
            ValueError: it is no TNT that the constructor could make (timm's legacy network, another pooling
                than the class token, another norm or activation, ...), or computes something else than its
                names say.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        plan, blocks = _proved_plans(model)
        state = _copied_state(model)
        with torch.device("meta"):
            fast = cls(**_constructor_arguments(model, plan, blocks, state))
        trainable = {name: value.requires_grad for name, value in state.items()}
        fast.load_state_dict({name: value.detach() for name, value in state.items()}, assign=True)
        for name, parameter in fast.named_parameters():
            parameter.requires_grad_(trainable[name])
        _take_settings(fast, model, plan, blocks)
        return fast.train(model.training)

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        plan = getattr(self, fused.PLAN)
        if model_as_written(self, plan) is not None:
            return super().embed(x)
        self.patch_embed.check_image(x)
        return fused.embed(self, plan, x)

    def forward_features(self, x: Tensor) -> Tensor:
        plan = getattr(self, fused.PLAN)
        if model_as_written(self, plan) is not None or checkpointed(self, plan) is not None:
            return super().forward_features(x)
        self.patch_embed.check_image(x)
        return fused.run_features(self, plan, x)[:, 0]


def _copied_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's parameters under the authors' names; requires_grad is as the model has it."""
    with torch.enable_grad():
        state = to_authors(dict(model.named_parameters()))
    return {name: value.detach().clone().requires_grad_(value.requires_grad) for name, value in state.items()}


def _proved_plans(model: nn.Module) -> tuple[ModelPlan, list[BlockPlan]]:
    """The plans of a model that FastTNT can stand for. Raises ValueError for another."""
    plan = plan_model(model)
    if plan is None:
        raise ValueError(
            f"model must be a TNT with the authors' names or timm's, got a {type(model).__name__}"
        )
    names = plan.names
    children: dict[str, Any] = model._modules
    blocks = children[names.blocks]
    plans = [plan_block(block) for block in blocks]
    if plans and plans[0] is not None and plans[0].per_word:
        raise ValueError("model is timm's legacy TNT, another network than FastTNT's; accelerate() takes it")
    pooling = getattr(model, "global_pool", "token")
    if pooling != "token":
        raise ValueError(
            f"model must pool its class token (global_pool='token'), got global_pool={pooling!r}"
        )
    rate = getattr(children.get("head_drop"), "p", 0.0)
    if rate > 0.0:
        raise ValueError(f"model must not drop before its head, got head_drop.p={rate:g}; set it to 0")

    refused: dict[str, str | None] = {}
    if type(children[names.norm]) is not nn.LayerNorm:
        refused[names.norm] = f"{type(children[names.norm]).__name__} is not LayerNorm"
    proved: list[BlockPlan] = []
    for index, (block, block_plan) in enumerate(zip(blocks, plans, strict=True)):
        name = f"{names.blocks}.{index}"
        if block_plan is None or block_plan.inner is None or block_plan.projection is None:
            refused[name] = "it has not the children of a TNT block"
            continue
        block_plan = prove_block(block, block_plan)
        squeeze = block._modules.get(block_plan.names.squeeze)
        parts = [block_plan.inner, block_plan.projection, *([block_plan.outer] if squeeze is None else [])]
        reasons = [block_plan.refused, *(part.refused for part in parts if part is not None)]
        reasons += [None if squeeze is None else prove_squeeze(squeeze)]
        refused[name] = next((why for why in reasons if why is not None), None)
        proved.append(block_plan)
    plan = prove_model(model, plan)
    refused[names.pixel_embed] = plan.pixel.part.refused
    refused["its forward"] = plan.stem.refused or plan.refused
    for name, why in refused.items():
        if why is not None:
            raise ValueError(f"FastTNT cannot stand for this {type(model).__name__}: {name}: {why}")
    return plan, proved


def _constructor_arguments(
    model: nn.Module, plan: ModelPlan, blocks: list[BlockPlan], state: dict[str, Tensor]
) -> dict[str, Any]:
    """What shapes do not tell is read off the modules."""
    known: dict[str, Any] = {
        "img_size": plan.pixel.img_size,
        "patch_size": plan.pixel.patch_size,
        "inner_stride": model.get_submodule(f"{plan.names.pixel_embed}.proj").stride[0],  # type: ignore[index]
    }
    for block, block_plan in zip(model.get_submodule(plan.names.blocks).children(), blocks, strict=True):
        for name in ("inner", "outer"):
            attn = block.get_submodule(getattr(block_plan.names, name).attn)
            known[f"{name}_num_heads"] = attn.num_heads
    if not blocks:
        known.update(inner_num_heads=1, outer_num_heads=1)
    return infer_arguments(state, **known)


def _take_settings(fast: FastTNT, model: nn.Module, plan: ModelPlan, blocks: list[BlockPlan]) -> None:
    """eps, scales and rates, module by module."""
    ours: Any = fast
    theirs: dict[str, Any] = model._modules
    names = plan.names
    pairs = [(ours.norm, theirs[names.norm])]
    pairs += [
        (getattr(ours, name), theirs[other])
        for name, other in zip(AUTHORS_MODEL.projection, names.projection, strict=True)
    ]
    pairs += [(ours.pos_drop, theirs.get(names.pos_drop))]
    for block, other, block_plan in zip(ours.blocks, theirs[names.blocks], blocks, strict=True):
        for half, other_half in zip(_halves(AUTHORS_BLOCK), _halves(block_plan.names), strict=True):
            for name, other_name in zip(half, other_half, strict=True):
                one, two = getattr(block, name), other._modules[other_name]
                pairs += [(one, two)]
                pairs += [(child, two._modules.get(key)) for key, child in one.named_children()]
                if hasattr(one, "fc1"):
                    pairs += [(one.drop, two._modules.get("drop1"))]  # timm's Mlp has two
        rate = getattr(other._modules.get(block_plan.names.drop_path), "drop_prob", None) or 0.0
        block.drop_path = DropPath(rate) if rate > 0.0 else nn.Identity()
        setattr(block, fused.PLAN, plan_block(block))
    for module, other in pairs:
        for setting in ("eps", "num_heads", "head_dim", "scale", "p"):
            if hasattr(module, setting) and hasattr(other, setting):
                setattr(module, setting, getattr(other, setting))


def _halves(names: BlockNames) -> tuple[tuple[str, ...], ...]:
    return names.inner, names.projection, names.outer


def fast_tnt_ti_patch16_224(**kwargs: Any) -> FastTNT:
    """FastTNT in the size of TNT-Ti. `kwargs` are those of `TNT` and override the size's own."""
    return FastTNT(**{**VARIANTS["tnt_ti_patch16_224"], **kwargs})


def fast_tnt_s_patch16_224(**kwargs: Any) -> FastTNT:
    """FastTNT in the size of TNT-S. `kwargs` are those of `TNT` and override the size's own."""
    return FastTNT(**{**VARIANTS["tnt_s_patch16_224"], **kwargs})


def fast_tnt_b_patch16_224(**kwargs: Any) -> FastTNT:
    """FastTNT in the size of TNT-B. `kwargs` are those of `TNT` and override the size's own."""
    return FastTNT(**{**VARIANTS["tnt_b_patch16_224"], **kwargs})
