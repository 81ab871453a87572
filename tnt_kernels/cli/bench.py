"""Time a TNT model against its baselines, interleaved, after checking every one of them against float64.

With --train: a training step (forward, loss, backward, AdamW), and the memory that it needs.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

from tnt_kernels.bench import models, results, training
from tnt_kernels.bench.cases import DEVICES, DTYPES, Case
from tnt_kernels.bench.engine import run as run_engine
from tnt_kernels.bench.progress import Bar
from tnt_kernels.bench.sizes import SIZES
from tnt_kernels.cli.arguments import not_negative, positive, rate

HELP = "FastTNT against eager PyTorch, torch.compile and DeiT, also in training: speed, ratios, memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", nargs="+", choices=list(SIZES), default=["tnt_s"])
    parser.add_argument("--batch", nargs="+", type=positive, default=[8], help="one or more (default: 8)")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument(
        "--device", choices=DEVICES, default="cpu", help="default: cpu; cuda is the current GPU"
    )
    parser.add_argument("--threads", type=positive, help="threads (default: torch's)")
    parser.add_argument(
        "--rounds", type=not_negative, default=10, help="interleaved rounds (default: 10); 0: no timing"
    )
    add_training_arguments(parser)
    parser.add_argument(
        "--baselines",
        nargs="+",
        choices=list(models.BASELINES),
        metavar="NAME",
        help=f"of {', '.join(models.BASELINES)} (default: {' '.join(models.DEFAULT_NAMES)}); with --train of "
        f"{', '.join(training.BASELINES)} (default: {' '.join(training.DEFAULT_NAMES)})",
    )
    parser.add_argument(
        "--no-memory", action="store_true", help="leave out peak memory (one process per entry)"
    )
    parser.add_argument("--output", type=Path, help="write the results as JSON")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train", action="store_true", help="time training steps")
    parser.add_argument(
        "--drop-path", type=rate, default=0.0, help="with --train: rate of stochastic depth (default: 0)"
    )


def model_cases(arguments: argparse.Namespace) -> Sequence[Case]:
    """Every combination of the models, batches and dtypes asked for.

    Raises ValueError for --drop-path without --train, and for --device cuda without a GPU.
    """
    if arguments.drop_path and not arguments.train:
        raise ValueError("--drop-path needs --train: stochastic depth acts in training alone")
    combinations = itertools.product(arguments.model, arguments.batch, arguments.dtype)
    if arguments.train:
        return [
            training.TrainingCase(*values, arguments.drop_path, arguments.device) for values in combinations
        ]
    return [models.ModelCase(*values, arguments.device) for values in combinations]


def default_names(arguments: argparse.Namespace) -> Sequence[str]:
    """The baselines that are measured where none are named."""
    if arguments.train:
        return training.DEFAULT_NAMES
    return models.GPU_NAMES if arguments.device == "cuda" else models.DEFAULT_NAMES


def run(arguments: argparse.Namespace) -> int:
    document = run_engine(
        model_cases(arguments),
        arguments.baselines or default_names(arguments),
        rounds=arguments.rounds,
        threads=arguments.threads,
        with_memory=not arguments.no_memory,
        progress=Bar(),
    )
    if arguments.output is not None:
        results.save(document, arguments.output)
    print(results.report(document))
    return 1 if results.wrong(document) else 0
