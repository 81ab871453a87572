"""Options of a run: from its preset and the command line, or from the run that it goes on with."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tnt_programs import command_line
from tnt_programs.presets import DEFAULTS, MAY_CHANGE, PRESETS


def parse(argv: Sequence[str] | None = None) -> tuple[Namespace, dict[str, Any]]:
    """The options of a run (defaults, then its preset's, then the command line's), and those given by hand.

    `resume` is in the first alone: None, "" for the last checkpoint in the output folder, or a file.
    """
    parser = command_line.parser()
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume", None)
    if "data" in given and given.get("dataset") == "digits":
        parser.error("argument --data: --dataset digits brings its own images; leave one of the two out")
    if given.get("dataset") == "folder" and "data" not in given and resume is None:
        parser.error("argument --data: --dataset folder needs the folder that holds train/ and val/")
    dataset = given.get("dataset", "folder" if "data" in given else "digits")
    fine_tuning = "pretrained" in given or "checkpoint" in given
    preset = given.get("preset", "digits" if dataset == "digits" else "finetune" if fine_tuning else "none")
    values = {**DEFAULTS, **PRESETS[preset], **given, "dataset": dataset, "preset": preset}
    if "warmup_epochs" not in given:  # a short run has a short warm-up
        values["warmup_epochs"] = min(values["warmup_epochs"], values["epochs"] - 1)
    return Namespace(**values, resume=resume), given


def resumed(stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run that goes on: those it had, and of those given by hand what may change.

    Raises:
        ValueError: an option was given that would make it another run.
    """
    other = [
        f"{_flag(name)} {value} (it runs with {stored.get(name)})"
        for name, value in given.items()
        if name not in MAY_CHANGE and value != stored.get(name)
    ]
    if other:
        raise ValueError(
            f"--resume goes on with the options of its run, which cannot change: {', '.join(other)}. "
            "--checkpoint starts a new run from the weights alone"
        )
    # An option that a later version added has its default.
    return {**DEFAULTS, **stored, **{name: value for name, value in given.items() if name in MAY_CHANGE}}


def check(options: Namespace) -> None:
    """Raise ValueError where options contradict each other."""
    if options.warmup_epochs >= options.epochs:
        raise ValueError(
            f"--warmup-epochs must be below --epochs {options.epochs}, got {options.warmup_epochs}"
        )
    if options.pretrained and options.checkpoint:
        raise ValueError("--pretrained and --checkpoint are both sources of weights: give one of them")
    if options.new_head and not options.checkpoint:
        raise ValueError("--new-head replaces the head of a --checkpoint: give one")
    if options.fsdp and options.amp == "float16":
        raise ValueError("--fsdp needs --amp none or bfloat16, got float16")
    for name in ("scale", "ratio"):
        low, high = getattr(options, name)
        if low > high:
            raise ValueError(f"{_flag(name)} must be the smaller bound and the larger, got {low:g} {high:g}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def resume_command(checkpoint: Path, world: int) -> str:
    """What a user types to go on."""
    start = "python" if world == 1 else f"torchrun --nproc-per-node {world}"
    return f"{start} {sys.argv[0]} --resume {checkpoint}"
