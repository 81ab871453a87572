"""Compiles every Triton kernel, without a GPU, and says what it takes; likewise the CUDA kernels of the
native module, as they were built.

    python benchmarks/resources.py                      # every case, precision and architecture
    python benchmarks/resources.py --op inner_block --architecture 90 --precision bfloat16 autocast
    python benchmarks/resources.py --json > resources.json
    python benchmarks/resources.py --write-limits       # the figures become tests/compile/limits.json

Registers, stack, shared memory; instructions counted in the machine code (SASS), per sentence: those of all
warps of all programs over the sentences of the call. Where it is not known how often a loop runs, what it
holds counts once, and the number has a +; the next column says how much lies in loops. Those of CUDA kernels
are as they stand in the program. --write-limits needs a native module that nvcc has built for every
architecture. Exit status 1 where a limit is passed.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path

from tnt_kernels import native
from tnt_kernels.bench import cuda_resources, resources
from tnt_kernels.bench.kernel_cases import ARGUMENTS, PRECISIONS, cases

LIMITS = Path(__file__).resolve().parent.parent / "tests/compile/limits.json"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", nargs="+", choices=list(ARGUMENTS), default=list(ARGUMENTS))
    parser.add_argument("--precision", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument(
        "--architecture",
        nargs="+",
        type=int,
        choices=cuda_resources.ARCHITECTURES,
        default=cuda_resources.ARCHITECTURES,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--write-limits", action="store_true", help="of what the tests compile")
    arguments = parser.parse_args()
    if arguments.write_limits:
        if len(sys.argv) > 2:
            parser.error("--write-limits takes no other option: it compiles what the tests do")
        missing = sorted(set(cuda_resources.ARCHITECTURES) - set(cuda_resources.built_for()))
        if missing:
            parser.error(f"--write-limits needs CUDA kernels for sm_{' sm_'.join(map(str, missing))} too")
    cuda = cuda_kernels(arguments.op, arguments.architecture)
    if arguments.write_limits:
        rows = resources.measure(resources.committed())
        resources.save_limits(rows, LIMITS, cuda.nvcc, cuda.rows)
    else:
        chosen = [case for case in cases() if case.op in arguments.op]
        architectures = [number for number in arguments.architecture if number in resources.ARCHITECTURES]
        rows = resources.measure(list(product(chosen, arguments.precision, architectures)))
    if arguments.json:
        both = {"triton": resources.as_json(rows), "cuda": cuda_resources.as_json(cuda.rows)}
        print(json.dumps(both, indent=1))
    else:
        print(resources.report(rows))
        print(f"\nCUDA kernels{f', nvcc {cuda.nvcc}' if cuda.nvcc else ''}\n")
        print(cuda_resources.report(cuda.rows) if cuda.rows else native.why_no_cuda() or "none chosen")
    limits = resources.load_limits(LIMITS)
    found = [*resources.violations(rows, limits), *cuda_resources.violations(cuda, limits)]
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


def cuda_kernels(ops: list[str], architectures: list[int]) -> cuda_resources.Module:
    """Those of the native module that are chosen; none where it has none."""
    if "pixel_embed" not in ops or native.why_no_cuda() is not None:
        return cuda_resources.Module("", ())
    module = cuda_resources.measure()
    return cuda_resources.Module(
        module.nvcc, tuple(row for row in module.rows if row.architecture in architectures)
    )


if __name__ == "__main__":
    sys.exit(main())
