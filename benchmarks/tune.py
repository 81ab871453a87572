"""Chooses rows per program, warps and stages of every Triton kernel on the present GPU.

    python benchmarks/tune.py                               # into tnt_kernels/backends/triton/configs.json
    python benchmarks/tune.py --quick --output configs.json # TNT-S, TNT-B: neighbours of the present choice
    python benchmarks/tune.py --op inner_block --precision bfloat16

Every candidate is compiled, compared with plain PyTorch and then timed (triton.testing.do_bench, the L2 cache
emptied before each call). Those that fail are listed with the reason. Entries of other architectures stay.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

from tnt_kernels import gpu
from tnt_kernels.backends.triton import configs, runtime
from tnt_kernels.bench import tuning
from tnt_kernels.bench.kernel_cases import ARGUMENTS, PRECISIONS, cases, of_model
from tnt_kernels.cli.arguments import positive


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", nargs="+", choices=list(ARGUMENTS), default=list(ARGUMENTS))
    parser.add_argument("--precision", nargs="+", choices=list(PRECISIONS), help="default: bfloat16, float32")
    parser.add_argument("--quick", action="store_true", help="bfloat16, TNT-S and TNT-B, neighbours")
    parser.add_argument("--seconds", type=positive, default=3600, help="begin nothing new after that")
    parser.add_argument("--output", type=Path, default=configs.PATH, help="default: the package's own table")
    arguments = parser.parse_args()
    why = gpu.why_unusable(0)
    if why is not None:
        print(f"tune: {why}", file=sys.stderr)
        return 2
    architecture = runtime.architecture(torch.device("cuda"))
    precisions = arguments.precision or (["bfloat16"] if arguments.quick else ["bfloat16", "float32"])
    chosen = [case for case in cases() if case.op in arguments.op and not case.odd]
    if arguments.quick:
        chosen = [case for case in chosen if of_model(case)]
    wanted = tuning.subjects(chosen, precisions, architecture)
    trials = tuning.tune(wanted, arguments.quick, clock(arguments.quick), arguments.seconds, say)
    tuning.save(tuning.updated(configs.table(), architecture, trials), arguments.output)
    for of_subject in trials:
        best, before = tuning.best(of_subject), of_subject[0]
        if best is None:
            print(f"{before.wanted.kernel} {before.entry}: no candidate runs")
        else:
            was = "-" if before.milliseconds is None else f"{before.milliseconds:.4f}"
            print(
                f"{best.wanted.kernel} {best.entry}: {list(best.config)}, {best.milliseconds:.4f} ms "
                f"(was {list(before.config)}, {was} ms)"
            )
    print(f"\nwritten to {arguments.output}")
    return 0


def clock(quick: bool) -> Callable[[Callable[[], Any]], float]:
    return lambda call: do_bench(
        call, warmup=10 if quick else 25, rep=40 if quick else 100, return_mode="median"
    )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
