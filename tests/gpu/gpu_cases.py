"""Arguments on the GPU of every operation that has kernels there, at sizes that need other code or tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from gradients import drop_path_factors, gradients
from oracle import (
    attention_parameters,
    autocasting,
    in_dtype,
    inner_parameters,
    mlp_parameters,
    on_device,
    randn,
    reference_arguments,
    sentence_parameters,
)
from torch import Tensor

from tnt_kernels import ops, outer
from tnt_kernels.backends import reference
from tnt_kernels.dispatch import CUDA_OPS, use_backend

DEVICE, BACKEND = "cuda", "triton"
DROPS = ("attn_drop", "proj_drop", "hidden_drop", "out_drop")

Given = dict[str, Any]


def inner_block(
    s: int, m: int, c: int, heads: int, *, dtype: torch.dtype, noise: str = "", **options: Any
) -> Given:
    given = {
        "x": randn(s, m, c, dtype=dtype),
        **inner_parameters(c, dtype=dtype, **options),
        "num_heads": heads,
    }
    if noise == "drop_path":
        given |= {name: drop_path_factors(s) for name in ("drop_path1", "drop_path2")}
    if noise == "dropout":
        given |= {"seed": torch.tensor([1234567890123456789]), **dict.fromkeys(DROPS, 0.3)}
    return given


def inner_attention(s: int, m: int, c: int, heads: int, *, dtype: torch.dtype) -> Given:
    return {"x": randn(s, m, c, dtype=dtype), **attention_parameters(c, dtype=dtype), "num_heads": heads}


def inner_mlp(s: int, m: int, c: int, *, dtype: torch.dtype) -> Given:
    return {"x": randn(s, m, c, dtype=dtype), **mlp_parameters(c, dtype=dtype)}


def word_to_sentence(
    batch: int, n: int, m: int, c: int, d: int, *, dtype: torch.dtype, **options: Any
) -> Given:
    return {
        "words": randn(batch * n, m, c, dtype=dtype),
        "tokens": randn(batch, n + 1, d, dtype=dtype),
        **sentence_parameters(m, c, d, dtype=dtype, **options),
    }


def outer_block(
    batch: int, n: int, d: int, heads: int, *, dtype: torch.dtype, noise: str = "", **options: Any
) -> Given:
    given = {
        "tokens": randn(batch, n, d, dtype=dtype),
        **inner_parameters(d, dtype=dtype, **options),
        "num_heads": heads,
    }
    if noise:
        given |= {name: drop_path_factors(batch) for name in ("drop_path1", "drop_path2")}
    return given


def pixel_embed(
    batch: int,
    rows: int,  # of patches
    columns: int,
    c: int,
    *,
    dtype: torch.dtype,
    patch: tuple[int, int] = (16, 16),
    stride: int = 4,
    kernel: int = 7,
    channels: int = 3,
    legacy: bool = False,
    bias: bool = True,
    position: bool = True,
) -> Given:
    m = -(-patch[0] // stride) * -(-patch[1] // stride)
    scale = (channels * kernel**2) ** -0.5
    return {
        "image": randn(batch, channels, rows * patch[0], columns * patch[1], dtype=dtype, mean=0.5),
        "weight": randn(c, channels, kernel, kernel, dtype=dtype, scale=scale),
        "bias": randn(c, dtype=dtype) if bias else None,
        "position": randn(1, m, c, dtype=dtype) if position else None,
        "patch_size": patch,
        "stride": stride,
        "legacy": legacy,
    }


MAKERS: dict[str, Callable[..., Given]] = {
    function.__name__: function
    for function in (inner_block, inner_attention, inner_mlp, word_to_sentence, outer_block, pixel_embed)
}

# Operation, sizes, options.
CASES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "inner_block c=12": ("inner_block", (77, 16, 12, 2), {}),
    "inner_block c=24": ("inner_block", (131, 16, 24, 4), {}),
    "inner_block c=40": ("inner_block", (67, 16, 40, 4), {}),
    "inner_block c=48": ("inner_block", (66, 16, 48, 4), {}),
    "inner_block m=9 c=10": ("inner_block", (31, 9, 10, 5), {}),
    "inner_block m=64 c=64": ("inner_block", (9, 64, 64, 2), {}),
    "inner_block one sentence": ("inner_block", (1, 16, 24, 4), {}),
    "inner_block no sentence": ("inner_block", (0, 16, 24, 4), {}),
    "inner_block without biases": ("inner_block", (50, 16, 24, 4), {"qkv_bias": False, "bias": False}),
    "inner_block drop path": ("inner_block", (131, 16, 24, 4), {"noise": "drop_path"}),
    "inner_block dropout": ("inner_block", (131, 16, 40, 4), {"noise": "dropout"}),
    "inner_attention": ("inner_attention", (131, 16, 24, 4), {}),
    "inner_mlp": ("inner_mlp", (131, 16, 24), {}),
    "word_to_sentence d=192": ("word_to_sentence", (3, 49, 16, 12, 192), {}),
    "word_to_sentence d=384": ("word_to_sentence", (3, 49, 16, 24, 384), {}),
    "word_to_sentence d=640": ("word_to_sentence", (3, 49, 16, 40, 640), {}),
    "word_to_sentence d=768": ("word_to_sentence", (3, 49, 16, 48, 768), {}),
    "word_to_sentence m=9 c=10": ("word_to_sentence", (2, 7, 9, 10, 48), {}),
    "word_to_sentence legacy": (
        "word_to_sentence",
        (3, 49, 16, 24, 384),
        {"per_word": True, "bias": True, "norm2": False},
    ),
    "outer_block d=384": ("outer_block", (3, 50, 384, 6), {}),
    "outer_block d=640": ("outer_block", (2, 197, 640, 10), {}),
    "outer_block drop path": ("outer_block", (5, 50, 384, 6), {"noise": "drop_path"}),
    "pixel_embed c=12": ("pixel_embed", (3, 2, 3, 12), {}),
    "pixel_embed c=24": ("pixel_embed", (5, 3, 5, 24), {}),
    "pixel_embed c=40": ("pixel_embed", (3, 3, 3, 40), {}),
    "pixel_embed c=48": ("pixel_embed", (2, 3, 5, 48), {}),
    "pixel_embed c=13": ("pixel_embed", (3, 3, 2, 13), {}),
    "pixel_embed c=70": ("pixel_embed", (2, 2, 2, 70), {}),
    "pixel_embed legacy": ("pixel_embed", (3, 3, 2, 24), {"legacy": True}),
    "pixel_embed legacy patch=8 c=10": (
        "pixel_embed",
        (3, 2, 3, 10),
        {"patch": (8, 8), "stride": 2, "kernel": 3, "legacy": True},
    ),
    "pixel_embed patch=14 stride=7": ("pixel_embed", (3, 2, 3, 24), {"patch": (14, 14), "stride": 7}),
    "pixel_embed patch=6x9 c=17": (
        "pixel_embed",
        (2, 3, 2, 17),
        {"patch": (6, 9), "stride": 4, "kernel": 9, "channels": 5},
    ),
    "pixel_embed channels=1": ("pixel_embed", (3, 3, 3, 24), {"channels": 1}),
    "pixel_embed channels=4": ("pixel_embed", (3, 3, 3, 24), {"channels": 4}),
    "pixel_embed one image": ("pixel_embed", (1, 1, 1, 24), {}),
    "pixel_embed no image": ("pixel_embed", (0, 2, 3, 24), {}),
    "pixel_embed weight alone": ("pixel_embed", (3, 2, 3, 24), {"bias": False, "position": False}),
}
# One for each operation, where sizes do not matter.
USUAL = (
    "inner_block c=24", "inner_attention", "inner_mlp", "word_to_sentence d=384", "outer_block d=384",
    "pixel_embed c=24",
)  # fmt: skip


def backends(op: str) -> tuple[str, ...]:
    """The backends with kernels of an operation for GPUs."""
    return ("cuda", BACKEND) if op in CUDA_OPS else (BACKEND,)


# Cases, each with every backend that it is to run on.
RUNS = [(case, backend) for case in CASES for backend in backends(CASES[case][0])]
USUAL_RUNS = [(case, backend) for case, backend in RUNS if case in USUAL]


def make(case: str, dtype: torch.dtype = torch.float32) -> tuple[str, Given]:
    """The operation and its keyword arguments, on the GPU."""
    op, sizes, options = CASES[case]
    return op, on_device(MAKERS[op](*sizes, dtype=dtype, **options), DEVICE)


def public(op: str) -> Any:
    return outer.outer_block if op == "outer_block" else getattr(ops, op)


def plain(op: str, given: Mapping[str, Any]) -> Tensor:
    """The operation in plain PyTorch."""
    if op != "outer_block":
        return getattr(reference, op)(**reference_arguments(op, given))
    values = {**given, "x": given["tokens"]}
    del values["tokens"]
    out = reference.inner_block(**reference_arguments("inner_block", values))
    return out.to(given["tokens"].dtype)


def upstream(op: str, given: Mapping[str, Any]) -> Tensor:
    """A random gradient of the result."""
    with torch.no_grad():
        return torch.randn_like(plain(op, given))


def ours(
    op: str, given: Mapping[str, Any], autocast: torch.dtype | None = None, backend: str = BACKEND
) -> Tensor:
    with torch.no_grad(), use_backend(backend), autocasting(given, autocast):
        return public(op)(**given)


def eager_and_exact(
    op: str, given: Mapping[str, Any], autocast: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """In plain PyTorch in the same precision, and in float64, both on the GPU."""
    with torch.no_grad():
        with autocasting(given, autocast):
            eager = plain(op, given)
        return eager, plain(op, exactly(given))


def exactly(given: Mapping[str, Any]) -> Given:
    """The arguments in float64."""
    return in_dtype(given, torch.float64)


def our_gradients(
    op: str,
    given: Mapping[str, Any],
    grad: Tensor,
    autocast: torch.dtype | None = None,
    backend: str = BACKEND,
) -> dict[str, Tensor]:
    with use_backend(backend):
        return gradients(public(op), given, grad, autocast=autocast)


def plain_gradients(
    op: str, given: Mapping[str, Any], grad: Tensor, autocast: torch.dtype | None = None
) -> dict[str, Tensor]:
    return gradients(lambda **values: plain(op, values), given, grad, autocast=autocast)
