"""Operators against eager PyTorch and torch.compile, at the shapes of a model.

    python benchmarks/ops.py                                   # every op, sizes of TNT-S, TNT-B and c = 48
    python benchmarks/ops.py --op inner_block --tiers          # also every usable SIMD tier
    python benchmarks/ops.py --backward                        # forward + backward, gradients of all tensors
    python benchmarks/ops.py --device cuda --op pixel_embed --batch 256      # CUDA C++ and Triton on a GPU

The results go to benchmarks/results/ops-DEVICE.json, or ops-backward-DEVICE.json; `report.py` makes tables
and plots of them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

from tnt_kernels.bench import ops, results
from tnt_kernels.bench.cases import DEVICES, DTYPES
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
    parser.add_argument("--op", nargs="+", choices=list(ops.OPS), default=list(ops.OPS))
    parser.add_argument(
        "--model", nargs="+", choices=list(SIZES), default=["tnt_s", "tnt_b", "tnt_default"], help="sizes"
    )
    parser.add_argument("--batch", nargs="+", type=positive, default=[8])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="cuda: the current GPU")
    parser.add_argument("--backward", action="store_true", help="forward + backward, all gradients")
    parser.add_argument("--tiers", action="store_true", help="also every SIMD tier")
    parser.add_argument("--baselines", nargs="+", choices=list(ops.BASELINES), help="default: no tiers")
    parser.add_argument("--rounds", type=positive, default=10)
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--memory", action="store_true", help="also peak memory (one process per entry)")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    combinations = itertools.product(arguments.op, arguments.model, arguments.batch, arguments.dtype)
    try:
        cases = [ops.OpCase(*values, arguments.backward, arguments.device) for values in combinations]
    except ValueError as error:
        parser.error(str(error))
    document = run(
        cases,
        arguments.baselines or usual_baselines(arguments.device, arguments.tiers),
        rounds=arguments.rounds,
        threads=arguments.threads,
        with_memory=arguments.memory,
        progress=Bar(),
    )
    name = "ops-backward" if arguments.backward else "ops"
    path = arguments.output or RESULTS / f"{name}-{slug(document['device'])}.json"
    results.save(document, path)
    print(results.report(document))
    print(f"\nwritten to {path}")
    return 1 if results.wrong(document) else 0


def usual_baselines(device: str, tiers: bool) -> list[str]:
    if device == "cuda":
        return list(ops.GPU_NAMES)
    return list(ops.CPU_NAMES if tiers else ops.DEFAULT_NAMES)


if __name__ == "__main__":
    sys.exit(main())
