"""Time a TNT model against its baselines, interleaved, after checking every one of them against float64."""

from __future__ import annotations

import argparse
from pathlib import Path

from tnt_kernels.bench import models, results
from tnt_kernels.bench.cases import DTYPES
from tnt_kernels.bench.engine import run as run_engine
from tnt_kernels.bench.progress import Bar
from tnt_kernels.bench.sizes import SIZES
from tnt_kernels.cli.arguments import positive

HELP = "FastTNT against eager PyTorch, torch.compile and DeiT: images per second, ratios, memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", nargs="+", choices=list(SIZES), default=["tnt_s"])
    parser.add_argument("--batch", nargs="+", type=positive, default=[8], help="one or more (default: 8)")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--threads", type=positive, help="threads (default: torch's)")
    parser.add_argument("--rounds", type=positive, default=10, help="interleaved rounds (default: 10)")
    parser.add_argument(
        "--baselines",
        nargs="+",
        choices=list(models.BASELINES),
        default=list(models.DEFAULT_NAMES),
        metavar="NAME",
        help=f"of {', '.join(models.BASELINES)} (default: {' '.join(models.DEFAULT_NAMES)})",
    )
    parser.add_argument(
        "--no-memory", action="store_true", help="leave out peak memory (one process per entry)"
    )
    parser.add_argument("--output", type=Path, help="write the results as JSON")


def run(arguments: argparse.Namespace) -> int:
    cases = [
        models.ModelCase(model, batch, dtype)
        for model in arguments.model
        for dtype in arguments.dtype
        for batch in arguments.batch
    ]
    document = run_engine(
        cases,
        arguments.baselines,
        rounds=arguments.rounds,
        threads=arguments.threads,
        with_memory=not arguments.no_memory,
        progress=Bar(),
    )
    if arguments.output is not None:
        results.save(document, arguments.output)
    print(results.report(document))
    return 1 if results.wrong(document) else 0
