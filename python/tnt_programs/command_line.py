"""The command line of train.py."""

from __future__ import annotations

import argparse
from typing import Any

from tnt_kernels.cli.arguments import positive
from tnt_programs import precision
from tnt_programs.arguments import Assignments, Parser, assignment, augmentation, number, whole
from tnt_programs.presets import DEFAULTS, PRESETS

SCHEDULES = ("cosine", "tanh", "step", "poly", "constant")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


def parser() -> Parser:
    """A parser whose result holds what was given, and no default."""
    fraction, rate = number(0.0, 1.0), number(0.0)
    above_0 = number(above=0.0)
    top = Parser(
        prog="train.py",
        description="Train or fine-tune a TNT, or a timm model to compare it with. Without options: a small "
        "TNT, on scikit-learn's handwritten digits.",
        argument_default=argparse.SUPPRESS,
    )
    add_to = top.add_argument_group

    def add(group: Any, flag: str, text: str, **settings: Any) -> None:
        default = DEFAULTS[flag[2:].replace("-", "_")]
        shown = " ".join(f"{v:.3g}" for v in default) if isinstance(default, list) else default
        if default not in (None, False, {}):
            text += f" (default: {shown})"
        group.add_argument(flag, help=text, **settings)

    def flag(group: Any, name: str, text: str) -> None:
        add(group, name, text, action="store_true")

    top.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        help="options to start from: the authors' published recipe, fine-tuning (default with --pretrained "
        "or --checkpoint), digits (default with that data); what else is given here goes before it",
    )
    group = add_to("data")
    add(group, "--data", "folder that holds train/ and val/, each with a folder per class", type=str)
    add(group, "--dataset", "default: digits, without --data", choices=("folder", "digits"))
    add(group, "--workers", "processes that load images, 0: none besides this one", type=whole)
    flag(group, "--no-scan", "do not read every image before training to find the unreadable ones")
    add(group, "--img-size", "height and width in pixels (default: the model's)", type=positive)
    add(
        group,
        "--mean",
        "of the colours, for the normalisation (default: the model's)",
        type=number(0.0, 1.0),
        nargs=3,
    )
    add(group, "--std", "their standard deviation (default: the model's)", type=above_0, nargs=3)
    add(group, "--interpolation", "of the validation (default: the model's)", choices=INTERPOLATIONS)
    add(group, "--crop-pct", "part of the resized image that validation sees", type=number(0.1, 1.0))

    group = add_to("model")
    add(group, "--model", "tnt_{ti,s,b}_patch16_224 (FastTNT), tnt_digits, or a timm model", type=str)
    add(
        group,
        "--model-args",
        "arguments for the model's constructor",
        type=assignment,
        nargs="+",
        action=Assignments,
        metavar="NAME=VALUE",
    )
    flag(group, "--reference", "train the model in plain PyTorch, without the kernels")
    flag(group, "--pretrained", "start from timm's published weights")
    add(group, "--checkpoint", "start from the weights in this file", type=str, metavar="FILE")
    flag(group, "--new-head", "of the checkpoint, leave the head out")
    flag(group, "--freeze", "train the head alone")
    add(group, "--drop", "dropout", type=fraction)
    add(group, "--attn-drop", "dropout of the attention probabilities", type=fraction)
    add(group, "--drop-path", "stochastic depth", type=fraction)

    group = add_to("optimiser and schedule")
    add(group, "--epochs", "", type=positive)
    add(
        group,
        "--batch-size",
        "images per optimiser step, over all processes and accumulated parts",
        type=positive,
    )
    add(group, "--accumulate", "parts that a process works on one after another in a step", type=positive)
    add(group, "--opt", "optimiser, by timm's name", type=str)
    add(group, "--lr", "highest learning rate", type=above_0)
    add(group, "--weight-decay", "", type=rate)
    add(group, "--momentum", "of optimisers that have one", type=fraction)
    add(group, "--opt-eps", "epsilon (default: the optimiser's)", type=above_0)
    add(group, "--opt-betas", "(default: the optimiser's)", type=fraction, nargs=2)
    add(group, "--clip-grad", "largest norm of the gradients", type=above_0)
    add(group, "--sched", "schedule of the learning rate", choices=SCHEDULES)
    add(group, "--sched-per", "when the rate changes", choices=("update", "epoch"))
    add(group, "--warmup-epochs", "", type=whole)
    add(group, "--warmup-lr", "where the warm-up starts", type=rate)
    add(group, "--min-lr", "", type=rate)
    add(group, "--cooldown-epochs", "epochs at the lowest rate after the others", type=whole)
    add(group, "--ema-decay", "average the weights with this decay; 0: do not", type=fraction)
    flag(group, "--ema-warmup", "let the decay grow to --ema-decay: for short runs")

    group = add_to("augmentation")
    flag(group, "--no-aug", "train on the images as they are")
    add(group, "--aa", "timm's AutoAugment, RandAugment or AugMix; none: leave it out", type=augmentation)
    add(group, "--scale", "area of the random crop", type=number(0.01, 1.0), nargs=2)
    add(group, "--ratio", "width / height of the random crop", type=above_0, nargs=2)
    add(group, "--hflip", "probability of a mirrored image", type=fraction)
    add(group, "--vflip", "probability of an image upside down", type=fraction)
    add(group, "--color-jitter", "without --aa", type=rate)
    add(group, "--train-interpolation", "", choices=(*INTERPOLATIONS, "random"))
    add(group, "--reprob", "probability of random erasing", type=fraction)
    add(group, "--remode", "what is erased becomes this", choices=("const", "rand", "pixel"))
    add(group, "--repeated-aug", "how often an image is drawn, augmented anew", type=positive)
    add(group, "--mixup", "alpha, 0: none", type=rate)
    add(group, "--cutmix", "alpha, 0: none", type=rate)
    add(group, "--mixup-prob", "probability that a batch is mixed", type=fraction)
    add(group, "--mixup-switch-prob", "probability of cutmix where both are on", type=fraction)
    add(group, "--smoothing", "label smoothing", type=number(0.0, 0.99))

    group = add_to("how it runs")
    add(group, "--device", "auto, cpu, cuda or cuda:N", type=str)
    add(group, "--threads", "threads of a process (default: torch's)", type=positive)
    add(group, "--amp", "autocast", choices=precision.NAMES)
    flag(group, "--compile", "torch.compile")
    flag(group, "--checkpoint-activations", "recompute the blocks in the backward pass: less memory")
    flag(group, "--fsdp", "shard parameters and optimiser over the processes (FSDP2)")
    add(group, "--seed", "", type=whole)

    group = add_to("output")
    add(group, "--output", "folder (default: runs/DATASET-MODEL)", type=str)
    flag(group, "--overwrite", "start again in a folder that holds a run")
    group.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="FILE",
        help="go on with a run, from FILE or last.pt in --output",
    )
    flag(group, "--log-steps", "write the loss of every step to steps.csv")
    flag(group, "--no-progress", "no bar")
    return top
