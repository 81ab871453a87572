"""What a model is trained with, from the options: mixing, loss, optimiser, schedule. All of it is timm's."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn


def mixup(options: Namespace, classes: int) -> Any:
    """timm's Mixup, which mixes a batch's images in pairs and makes soft targets; None where it is off."""
    if options.mixup == 0 and options.cutmix == 0:
        return None
    return Mixup(
        options.mixup,
        options.cutmix,
        prob=options.mixup_prob,
        switch_prob=options.mixup_switch_prob,
        label_smoothing=options.smoothing,
        num_classes=classes,
    )


def loss(options: Namespace, *, mixed: bool) -> nn.Module:
    """Loss of a training step: of logits [batch, classes] and classes, or of soft targets where `mixed`."""
    if mixed:
        return SoftTargetCrossEntropy()  # the mixed targets are smoothed
    return LabelSmoothingCrossEntropy(options.smoothing) if options.smoothing else nn.CrossEntropyLoss()


def optimizer(model: nn.Module, options: Namespace) -> torch.optim.Optimizer:
    """timm's, with no weight decay on biases, norms and what the model's no_weight_decay() names.

    Raises:
        ValueError: timm has no such optimiser, or it does not take one of the options.
    """
    extra = {"eps": options.opt_eps, "betas": options.opt_betas and tuple(options.opt_betas)}
    try:
        return create_optimizer_v2(
            model,
            options.opt,
            lr=options.lr,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
            **{name: value for name, value in extra.items() if value is not None},
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"--opt {options.opt}: {error}") from error


def schedule(optimizer: torch.optim.Optimizer, options: Namespace, steps: int) -> tuple[Any, int]:
    """timm's schedule of the learning rate, for `steps` steps an epoch, and how many epochs it has."""
    return create_scheduler_v2(
        optimizer,
        options.sched,
        num_epochs=options.epochs,
        warmup_epochs=options.warmup_epochs,
        warmup_lr=options.warmup_lr,
        min_lr=options.min_lr,
        cooldown_epochs=options.cooldown_epochs,
        step_on_epochs=options.sched_per == "epoch",
        updates_per_epoch=steps,
    )
