"""Interleaved timing: every entry once per round, so that drift of the machine hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# Idle workers of another entry's thread pool (ONNX Runtime, OpenVINO) spin for a moment before they sleep.
SETTLE_SECONDS = 0.02


@dataclass(frozen=True)
class Timing:
    """Seconds per call: one sample per round, and their median and quartiles."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    @property
    def spread(self) -> float:
        """Distance of the quartiles over the median."""
        low, high = self.quartiles
        return (high - low) / self.median


def interleave(
    calls: Mapping[str, Callable[[], object]],
    rounds: int = 10,
    visit_seconds: float = 0.2,
    on_step: Callable[[str], None] | None = None,
    measure: Callable[[Callable[[], object], int], float] | None = None,
) -> dict[str, Timing]:
    """Time every call in `rounds` rounds.

    In a round each entry is visited once, in an order that rotates from round to round. A visit repeats a
    short call until about `visit_seconds` have passed and keeps the median, so that a cold cache after the
    other entries does not count. Two warm-up calls come first and are not timed. `on_step(name)` is called
    after every visit. `measure(call, repeats)` gives the median seconds of a visit's calls, by the clock of
    the process if it is None; :class:`GpuClock` is one for GPUs.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    measure = measure or _median_seconds
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, min(100, round(visit_seconds / measure(call, 1))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for i in range(rounds):
        shift = i % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            time.sleep(SETTLE_SECONDS)
            samples[name].append(measure(calls[name], repeats[name]))
            if on_step is not None:
                on_step(name)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _median_seconds(call: Callable[[], object], repeats: int) -> float:
    return statistics.median(_seconds(call) for _ in range(repeats))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return max(time.perf_counter() - start, 1e-9)


class GpuClock:
    """Seconds between CUDA events on the current stream, gaps while the GPU waits for launches included.

    cold: overwrites the GPU's L2 cache before every call; in a model, other layers have done that.
    """

    def __init__(self, cold: bool) -> None:
        self._cache = torch.empty(256 << 20, dtype=torch.int8, device="cuda") if cold else None

    def __call__(self, call: Callable[[], object], repeats: int) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        torch.cuda.synchronize()
        for begin, end in events:
            if self._cache is not None:
                self._cache.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return max(statistics.median(begin.elapsed_time(end) for begin, end in events) * 1e-3, 1e-9)
