"""Times the pixel embedding on the present GPU: CUDA C++, Triton, eager PyTorch, cuDNN, torch.compile.

    python benchmarks/pixel_embed.py
    python benchmarks/pixel_embed.py --output pixel_embed.json

Batch 256 at 224 px, tensors of bfloat16 and of float32, forward and backward apart, L2 cache emptied before
each call. Results are compared with float64 first. Exit status: 0, 1 where an entry has no time, 2 without a
GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path

import torch
import torch._functorch.config

from tnt_kernels.bench import floors, goals, pixel_embed
from tnt_kernels.bench.cases import DTYPES
from tnt_kernels.bench.environment import describe
from tnt_kernels.bench.timing import GpuClock
from tnt_kernels.cli.arguments import positive


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=list(goals.WIDTHS), default=list(goals.WIDTHS))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bfloat16", "float32"])
    parser.add_argument("--entries", nargs="+", choices=list(pixel_embed.ENTRIES))
    parser.add_argument("--repeats", type=positive, default=30)
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("pixel_embed: torch sees no GPU", file=sys.stderr)
        return 2
    torch._functorch.config.donated_buffer = False  # a backward pass is run again and again
    names = tuple(arguments.entries or pixel_embed.ENTRIES)
    peak, clock = floors.peak_of(torch.cuda.get_device_name()), GpuClock(cold=True)
    measured = [
        row
        for dtype in arguments.dtype
        for model in arguments.model
        for row in pixel_embed.measure(
            model, DTYPES[dtype], goals.BATCH, clock, peak, arguments.repeats, names
        )
    ]
    document = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": describe(gpu=True),
        "results": measured,
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(pixel_embed.report(document))
    return 1 if any(row["problems"] for row in measured) else 0


if __name__ == "__main__":
    sys.exit(main())
