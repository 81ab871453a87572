"""Small TNTs of every kind, with weights that matter, for the tests of the models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from user_models import huawei_style

from tnt_kernels._timm import import_timm

IMAGE = (32, 48)

AUTHORS = {
    "img_size": IMAGE,
    "num_classes": 7,
    "outer_dim": 96,
    "inner_dim": 24,
    "depth": 3,
    "outer_num_heads": 3,
    "inner_num_heads": 4,
}
TIMM = {
    "img_size": IMAGE,
    "num_classes": 7,
    "embed_dim": 96,
    "inner_dim": 24,
    "depth": 3,
    "num_heads_outer": 3,
    "num_heads_inner": 4,
}

USERS_MODELS = ("timm", "timm_legacy", "authors")


def randomize(model: Any, seed: int = 0) -> Any:
    """Gives every parameter, biases and gains too, a value that matters; returns the model, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(value * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.3 * value + name.endswith("weight"))
    return model.eval()


def make(kind: str, **kwargs: Any) -> Any:
    """A user's model: timm's, timm's legacy one, or the authors' class from a file of the user's."""
    if kind == "authors":
        return randomize(huawei_style.TNT(**{**AUTHORS, **kwargs}))
    timm = import_timm()
    return randomize(timm.models.tnt.TNT(**{**TIMM, "legacy": kind == "timm_legacy", **kwargs}))


def without_inner_dropout(model: Any) -> Any:
    """Sets the rates of dropout in all inner halves to 0, where fused operations draw it in their own way."""
    for block in model.blocks:
        for half in ("inner_attn", "inner_mlp", "attn_in", "mlp_in"):
            for module in getattr(block, half, nn.Identity()).modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
    return model


def images(batch: int = 2, *, channels: int = 3, size: tuple[int, int] = IMAGE, seed: int = 1) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    error = (actual.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
    assert error <= tolerance * expected.abs().max().item() if expected.numel() else True, error


class Adapted(nn.Module):
    """A Linear with a low-rank update beside it, as LoRA puts it in the Linear's place."""

    def __init__(self, linear: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) * 0.1)
        self.up = nn.Parameter(torch.randn(linear.out_features, rank) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.down.T @ self.up.T
