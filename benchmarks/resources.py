"""Compiles every Triton kernel, without a GPU, and says what it takes.

    python benchmarks/resources.py                      # every case, precision and architecture
    python benchmarks/resources.py --op inner_block --architecture 90 --precision bfloat16 autocast
    python benchmarks/resources.py --json > resources.json
    python benchmarks/resources.py --write-limits       # the figures become tests/compile/limits.json

Registers, stack, shared memory; instructions counted in the machine code (SASS), per sentence: those of all
warps of all programs over the sentences of the call. Where it is not known how often a loop runs, what it
holds counts once, and the number has a +; the next column says how much lies in loops. Exit status 1 where a
limit is passed.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path

from tnt_kernels.bench import resources
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
        choices=resources.ARCHITECTURES,
        default=resources.ARCHITECTURES,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--write-limits", action="store_true", help="of what the tests compile")
    arguments = parser.parse_args()
    if arguments.write_limits:
        if len(sys.argv) > 2:
            parser.error("--write-limits takes no other option: it compiles what the tests do")
        rows = resources.measure(resources.committed())
        resources.save_limits(rows, LIMITS)
    else:
        chosen = [case for case in cases() if case.op in arguments.op]
        rows = resources.measure(list(product(chosen, arguments.precision, arguments.architecture)))
    print(json.dumps(resources.as_json(rows), indent=1) if arguments.json else resources.report(rows))
    found = resources.violations(rows, resources.load_limits(LIMITS))
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
