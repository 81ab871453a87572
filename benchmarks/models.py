"""FastTNT against every baseline: inference, ONNX Runtime and OpenVINO included, and training.

    python benchmarks/models.py                      # TNT-S and TNT-B, batch 1 and 8, float32 and bfloat16
    python benchmarks/models.py --model tnt_s --batch 8 --dtype float32 --rounds 20
    python benchmarks/models.py --train              # training steps of TNT-S and TNT-B, batch 8
    python benchmarks/models.py --train --rounds 0 --model tnt_s --batch 8 32      # their memory alone

The results go to benchmarks/results/models-DEVICE.json, training-DEVICE.json or training-memory-DEVICE.json;
`report.py` makes tables and plots of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tnt_kernels.bench import models, results, training
from tnt_kernels.bench.cases import DEVICES, DTYPES
from tnt_kernels.bench.engine import run
from tnt_kernels.bench.environment import slug
from tnt_kernels.bench.progress import Bar
from tnt_kernels.bench.sizes import SIZES
from tnt_kernels.cli.arguments import not_negative, positive
from tnt_kernels.cli.bench import add_training_arguments, default_names, model_cases

RESULTS = Path(__file__).parent / "results"


def names(arguments: argparse.Namespace) -> Sequence[str]:
    """Every baseline, but for those of the other device and those that tune themselves for minutes."""
    if arguments.device == "cuda":
        return default_names(arguments)
    return list(training.BASELINES) if arguments.train else models.CPU_NAMES


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=list(SIZES), default=["tnt_s", "tnt_b"])
    parser.add_argument("--batch", nargs="+", type=positive, help="default: 1 and 8; in training 8")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument(
        "--baselines", nargs="+", choices=list(models.BASELINES), help="default: all of the device"
    )
    parser.add_argument("--rounds", type=not_negative, default=10, help="default: 10; 0: no timing")
    add_training_arguments(parser)
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="cuda: the current GPU")
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.batch = arguments.batch or ([8] if arguments.train else [1, 8])
    try:
        document = run(
            model_cases(arguments),
            arguments.baselines or names(arguments),
            rounds=arguments.rounds,
            threads=arguments.threads,
            with_memory=not arguments.no_memory,
            progress=Bar(),
        )
    except ValueError as error:
        parser.error(str(error))
    kind = ("training" if arguments.train else "models") + ("" if arguments.rounds else "-memory")
    path = arguments.output or RESULTS / f"{kind}-{slug(document['device'])}.json"
    results.save(document, path)
    print(results.report(document))
    print(f"\nwritten to {path}")
    return 1 if results.wrong(document) else 0


if __name__ == "__main__":
    sys.exit(main())
