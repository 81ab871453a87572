"""Times the layers of TNT-S and TNT-B on the present GPU, kernel by kernel, against their floors.

    python benchmarks/floors.py
    python benchmarks/floors.py --precision bfloat16 autocast --output floors.json

Batch 256 at 224 px, L2 cache emptied before each call. Floors: memory traffic, products on tensor cores, and
instructions issued, as counted in the compiled kernels (tnt_kernels/bench/floors.py has the GPU's peaks).
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tnt_kernels import gpu
from tnt_kernels.backends.triton import runtime
from tnt_kernels.bench import floors, resources, timing
from tnt_kernels.bench.cases import reason
from tnt_kernels.bench.environment import describe
from tnt_kernels.bench.kernel_cases import PRECISIONS, KernelCase, cases, of_model

REPEATS = 20


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", nargs="+", choices=list(PRECISIONS), default=["bfloat16", "autocast"])
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    why = gpu.why_unusable(0)
    if why is not None:
        print(f"floors: {why}", file=sys.stderr)
        return 2
    measured = [
        measure(case, precision) for case in cases() if of_model(case) for precision in arguments.precision
    ]
    document = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": describe(gpu=True),
        "results": measured,
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(floors.report(document))
    return 1 if any(result["problem"] for result in measured) else 0


def measure(case: KernelCase, precision: str) -> dict[str, Any]:
    """Microseconds of a call and of its kernels, and its floor."""
    result: dict[str, Any] = {"case": case.title, "precision": precision, "problem": ""}
    try:
        call, arguments = case.call(precision, "cuda")
        call(*arguments)
        seconds = timing.GpuClock(cold=True)(lambda: call(*arguments), REPEATS)
        result |= {"microseconds": seconds * 1e6, "kernels": kernels(lambda: call(*arguments))}
        peak = floors.peak_of(torch.cuda.get_device_name())
        if peak is not None:
            architecture = runtime.architecture(torch.device("cuda"))
            rows = resources.measure([(case, precision, architecture)])
            result["floor"] = floors.floor_of(case, PRECISIONS[precision][0], peak, rows).microseconds()
    except Exception as error:
        result["problem"] = reason(error)
    return result


def kernels(call: Any) -> dict[str, float]:
    """Microseconds of each kernel of a call, by its name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPEATS):
            call()
        torch.cuda.synchronize()
    found = {event.key: event.device_time_total / REPEATS for event in profile.key_averages()}
    return dict(sorted(((name, us) for name, us in found.items() if us > 0), key=lambda item: -item[1]))


if __name__ == "__main__":
    sys.exit(main())
