"""The least time that a layer can take on a GPU: to move its data, to multiply, to issue its instructions.

A kernel is measured against the largest of the three. Memory and arithmetic are the operation's own,
without padding; instructions are those of the compiled kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tnt_kernels.bench.kernel_cases import SENTENCES, TOKENS, KernelCase
from tnt_kernels.bench.resources import Row
from tnt_kernels.bench.results import table

WORDS = 16
_KERNEL, _STRIDE = 7, 4  # of the pixel embedding


@dataclass(frozen=True)
class Peak:
    """What a GPU can do at best in a long run; instructions of a warp, one a cycle for each scheduler."""

    bytes_per_second: float
    flops_per_second: float  # 16-bit products with float32 sums, dense
    instructions_per_second: float


def _schedulers(multiprocessors: int, megahertz: float) -> float:
    return multiprocessors * 4 * megahertz * 1e6


# By what the device's name contains; the first that fits. What well-made kernels reach, not data sheets.
PEAKS: dict[str, Peak] = {
    "H200": Peak(4.3e12, 600e12, _schedulers(132, 1755)),
    "H100": Peak(3.0e12, 600e12, _schedulers(132, 1755)),
    "A100": Peak(1.4e12, 250e12, _schedulers(108, 1410)),
}


@dataclass(frozen=True)
class Floor:
    """Seconds."""

    memory: float
    arithmetic: float
    issue: float | None  # None where a kernel's instructions are not known

    def microseconds(self) -> dict[str, float | None]:
        return {name: None if value is None else value * 1e6 for name, value in asdict(self).items()}


def peak_of(name: str) -> Peak | None:
    """The peak of a device, None for one that is not in the table."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def work(case: KernelCase) -> tuple[float, float]:
    """Elements that a pass reads and writes, and its floating-point operations.

    A backward pass reads the input and a gradient and writes one; it computes the forward pass again, and two
    products for each of its own. That of the pixel embedding computes nothing again, and where the weight's
    gradient alone is wanted it writes next to nothing.
    """
    c, d = case.sizes.get("c", 0), case.sizes.get("d", 0)
    words = float(case.sizes.get("s", SENTENCES) * case.sizes.get("m", WORDS))
    tokens = float(TOKENS[0] * TOKENS[1])
    attention, mlp = 4 * c * c + 2 * case.sizes.get("m", WORDS) * c, 8 * c * c  # products of a word
    if case.op == "pixel_embed":
        # A word for every 4 x 4 pixels of 3 channels.
        image, products = words * 3 * _STRIDE * _STRIDE, words * c * 3 * _KERNEL * _KERNEL
        if not case.backward:
            return image + words * c, 2 * products
        return (image + words * c, 2 * products) if case.only else (2 * image + words * c, 4 * products)
    elements, products = {
        "inner_block": (2 * words * c, words * (attention + mlp)),
        "inner_attention": (2 * words * c, words * attention),
        "inner_mlp": (2 * words * c, words * mlp),
        "word_to_sentence": (words * c + 2 * tokens * d, words * c * d),
        # The stream in and out of both halves; q, k, v and the hidden layer, which no kernel keeps to itself.
        "outer_block": (tokens * (6 * d + 8 * d + 8 * d), tokens * (12 * d * d + 2 * TOKENS[1] * d)),
    }[case.op]
    return (1.5 * elements, 6 * products) if case.backward else (elements, 2 * products)


def floor_of(case: KernelCase, dtype: torch.dtype, peak: Peak, rows: Sequence[Row]) -> Floor:
    """The floor of a case; `rows` are its compiled kernels, `dtype` is that of its tensors."""
    elements, flops = work(case)
    counted = [row.instructions for row in rows if row.instructions is not None and row.weighed]
    complete = len(counted) == len(rows) > 0
    return Floor(
        elements * dtype.itemsize / peak.bytes_per_second,
        flops / peak.flops_per_second,
        sum(counted) * case.sentences / peak.instructions_per_second if complete else None,
    )


def report(document: dict[str, Any]) -> str:
    """The results of benchmarks/floors.py as markdown."""
    gpu = document["device"]["gpu"]
    headers = ["", "precision", "us", "memory", "arithmetic", "issue", "of the floor", "slowest kernels"]
    rows = []
    for result in document["results"]:
        head = [result["case"], result["precision"]]
        if result["problem"]:
            rows.append([*head, "-", "", "", "", "", result["problem"]])
            continue
        floor = {name: value for name, value in result.get("floor", {}).items() if value is not None}
        share = f"{max(floor.values()) / result['microseconds']:.0%}" if floor else "-"
        slowest = [f"{name} {us:.0f}" for name, us in list(result["kernels"].items())[:3]]
        figures = (f"{floor[n]:.0f}" if n in floor else "-" for n in ("memory", "arithmetic", "issue"))
        rows.append([*head, f"{result['microseconds']:.0f}", *figures, share, ", ".join(slowest)])
    heading = f"{gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}; {document['date']}; batch 256"
    return f"{heading}\n\n{table(headers, rows, right=range(2, 7))}"
