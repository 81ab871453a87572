"""What the kernels must reach on an H100 in bfloat16 at batch 256, and whether result files show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BATCH = 256
# What is compared with: timm's TNT, or where that is missing this package's plain one, the same network.
EAGER, COMPILED = ("timm", "reference"), ("compile", "reference_compile")
# FastTNT in the best way to run it.
OURS = ("fast", "fast_compile", "fast_reduce_overhead", "fast_graph", "accelerate")


@dataclass(frozen=True)
class Goal:
    """`reached` is None where it was not measured."""

    what: str
    model: str
    goal: float
    at_most: bool
    value: float | None = None

    @property
    def reached(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal

    @property
    def verdict(self) -> str:
        return {None: "not measured", True: "reached", False: "MISSED"}[self.reached]


# TNT-S, TNT-B
LAYERS = {"inner_block": (110.0, 190.0), "word_to_sentence": (60.0, 110.0)}  # microseconds
WIDTHS = {"tnt_s": 24, "tnt_b": 40}
INFERENCE = {"eager": (3.5, 3.5), "compiled": (2.0, 2.0), "compiled DeiT": (0.75, 1.1)}
TRAINING = {"eager": (3.0, 3.0), "compiled": (1.7, 1.7)}
MEMORY = (0.4, 0.4)
# Of the pixel embedding of TNT-S, by its CUDA kernels, tensors of bfloat16: microseconds, and times eager.
PIXEL_EMBED = 80.0
PIXEL_EMBED_TIMES = {"forward": 4.0, "backward": 3.0, "backward with the image": 3.0}


def goals(documents: Mapping[str, Mapping[str, Any]]) -> list[Goal]:
    """Every goal; `documents` are result files by their kind: "floors", "models", "training", "pixel_embed".

    Goals of a document that is missing are not measured.
    """
    found = []
    for i, model in enumerate(WIDTHS):
        for op, limits in LAYERS.items():
            value = _microseconds(documents.get("floors"), op, WIDTHS[model])
            found.append(Goal(f"{op}, us a layer", model, limits[i], True, value))
        bases = {"eager": EAGER, "compiled": COMPILED, "compiled DeiT": ("deit_compile",)}
        for name, limits in INFERENCE.items():
            value = _ratio(documents.get("models"), model, "per_second", OURS, bases[name])
            found.append(Goal(f"inference, times {name}", model, limits[i], False, value))
        for name, limits in TRAINING.items():
            value = _ratio(documents.get("training"), model, "per_second", OURS, bases[name])
            found.append(Goal(f"training step, times {name}", model, limits[i], False, value))
        value = _ratio(documents.get("training"), model, "peak_mib", ("fast",), EAGER)
        found.append(Goal("training step, peak memory over eager's", model, MEMORY[i], True, value))
    return [*found, *_pixel_embed(documents.get("pixel_embed"))]


def _pixel_embed(document: Mapping[str, Any] | None) -> list[Goal]:
    times: dict[str, Mapping[str, float]] = {}
    for result in (document or {}).get("results", ()):
        if (result["model"], result["batch"], result["dtype"]) == ("tnt_s", BATCH, "bfloat16"):
            times[result["pass"]] = result["microseconds"]
    found = [Goal("pixel_embed, us", "tnt_s", PIXEL_EMBED, True, times.get("forward", {}).get("cuda"))]
    for name, goal in PIXEL_EMBED_TIMES.items():
        mine, eager = (times.get(name, {}).get(entry) for entry in ("cuda", "eager"))
        value = eager / mine if mine and eager else None
        found.append(Goal(f"pixel_embed {name}, times eager", "tnt_s", goal, False, value))
    return found


def _microseconds(document: Mapping[str, Any] | None, op: str, width: int) -> float | None:
    for result in (document or {}).get("results", ()):
        words = result["case"].split()
        forward = words[0] == op and "backward" not in words and f"c={width}" in words
        if forward and result["precision"] == "bfloat16" and not result["problem"]:
            return result["microseconds"]
    return None


def _ratio(
    document: Mapping[str, Any] | None, model: str, figure: str, ours: Sequence[str], others: Sequence[str]
) -> float | None:
    """The largest figure of ours over that of the others, in the first measurement that has both."""
    for result in (document or {}).get("results", ()):
        if (result["model"], result["batch"], result["dtype"]) != (model, BATCH, "bfloat16"):
            continue
        figures = {e["name"]: {**e, **e.get("memory", {})}.get(figure) for e in result["entries"]}
        values: dict[str, float] = {name: value for name, value in figures.items() if value}
        mine, theirs = ([values[n] for n in names if n in values] for names in (ours, others))
        if mine and theirs:
            return max(mine) / theirs[0]
    return None
