"""The golden cases: models computed in float64 by independent implementations, with gradients."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"
INDEX = json.loads((FOLDER / "index.json").read_text())
TNT_CASES = [name for name, case in INDEX.items() if case["keys"] == "huawei"]
TIMM_CASES = [name for name, case in INDEX.items() if case["keys"] == "timm"]


@dataclass
class Golden:
    kwargs: dict[str, Any]  # of the implementation's constructor
    weights: dict[str, Tensor]  # its state dict
    grads: dict[str, Tensor]  # of the loss, for every parameter that is trained
    input: Tensor
    target: Tensor
    features: Tensor  # class token [B, d]; all tokens [B, n + 1, d] in the timm cases
    logits: Tensor
    loss: Tensor
    grad_input: Tensor


def load(name: str) -> Golden:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        kwargs = json.loads(file.metadata()["kwargs"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights, grads, rest = {}, {}, {}
    for key, value in tensors.items():
        folder, _, parameter = key.rpartition("/")
        {"weight": weights, "grad": grads, "": rest}[folder][parameter] = value
    return Golden(kwargs, weights, grads, **rest)
