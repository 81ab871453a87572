"""FastTNT against every baseline, ONNX Runtime and OpenVINO included.

    python benchmarks/models.py                      # TNT-S and TNT-B, batch 1 and 8, float32 and bfloat16
    python benchmarks/models.py --model tnt_s --batch 8 --dtype float32 --rounds 20

The results go to benchmarks/results/models-DEVICE.json; `report.py` makes tables and plots of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tnt_kernels.bench import models, results
from tnt_kernels.bench.cases import DTYPES
from tnt_kernels.bench.engine import run
from tnt_kernels.bench.environment import slug
from tnt_kernels.bench.progress import Bar
from tnt_kernels.bench.sizes import SIZES
from tnt_kernels.cli.arguments import positive

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=list(SIZES), default=["tnt_s", "tnt_b"])
    parser.add_argument("--batch", nargs="+", type=positive, default=[1, 8])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument(
        "--baselines", nargs="+", choices=list(models.BASELINES), default=list(models.BASELINES)
    )
    parser.add_argument("--rounds", type=positive, default=10)
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    cases = [
        models.ModelCase(model, batch, dtype)
        for model in arguments.model
        for batch in arguments.batch
        for dtype in arguments.dtype
    ]
    document = run(
        cases,
        arguments.baselines,
        rounds=arguments.rounds,
        threads=arguments.threads,
        with_memory=not arguments.no_memory,
        progress=Bar(),
    )
    path = arguments.output or RESULTS / f"models-{slug(document['device'])}.json"
    results.save(document, path)
    print(results.report(document))
    print(f"\nwritten to {path}")
    return 1 if results.wrong(document) else 0


if __name__ == "__main__":
    sys.exit(main())
