"""The measure of accuracy used by all tests, and random arguments for every operation.

Ours, eager PyTorch in the same precision, and float64 are compared: our largest error may be at
most 1.5 times eager's, plus 1e-6 of the output's scale. Compare a few thousand elements or more:
the largest error of a handful is luck.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tnt_kernels import ops
from tnt_kernels.backends import reference
from tnt_kernels.dispatch import use_backend

OPS = ("pixel_embed", "inner_attention", "inner_mlp", "inner_block", "word_to_sentence")
FLOAT32 = (torch.float32, None)  # dtype of the arguments, dtype of autocast
PRECISIONS = {
    "float32": FLOAT32,
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "autocast_bfloat16": (torch.float32, torch.bfloat16),
    "autocast_float16": (torch.float32, torch.float16),
}

# Arguments behind compute_dtype in an operator's schema, and their defaults.
NOISE = {
    **dict.fromkeys(("drop_path", "drop_path1", "drop_path2", "seed")),
    **dict.fromkeys(("attn_drop", "proj_drop", "hidden_drop", "out_drop"), 0.0),
}

ERROR_RATIO = 1.5
ERROR_FLOOR = 1e-6  # of the largest magnitude in the exact result


def largest_error(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact).abs().max().item() if exact.numel() else 0.0


def assert_as_accurate(
    ours: Tensor,
    eager: Tensor,
    exact: Tensor,
    *,
    ratio: float = ERROR_RATIO,
    floor: float = ERROR_FLOOR,
    what: str = "",
) -> None:
    """Asserts that `ours` is as close to `exact` (float64) as `eager` is.

    Shapes must agree, and NaNs must stand where eager has them; infinities too.
    """
    assert exact.dtype == torch.float64, "the exact result must be float64"
    assert ours.shape == eager.shape == exact.shape, (ours.shape, eager.shape, exact.shape)
    finite = torch.isfinite(eager)
    assert_same_special_values(ours, eager)
    ours, eager, exact = ours[finite], eager[finite], exact[finite]
    if exact.numel() == 0:
        return
    mine, theirs = largest_error(ours, exact), largest_error(eager, exact)
    allowed = ratio * theirs + floor * exact.abs().max().item()
    assert mine <= allowed, f"{what}: error {mine:.3e} against eager's {theirs:.3e}, allowed {allowed:.3e}"


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, mean: float = 0.0) -> Tensor:
    return (torch.randn(shape) * scale + mean).to(dtype)


def linear(outputs: int, inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight that keeps the variance of its input."""
    return randn(outputs, inputs, dtype=dtype, scale=inputs**-0.5)


def inner_parameters(
    c: int,
    hidden: int | None = None,
    *,
    qkv_bias: bool = True,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor | None]:
    """Random parameters of inner_block, every bias and gain non-trivial, in the order of its schema."""
    hidden = 4 * c if hidden is None else hidden
    return {
        "norm1_weight": randn(c, dtype=dtype, scale=0.3, mean=1.0),
        "norm1_bias": randn(c, dtype=dtype, scale=0.3),
        "qk_weight": linear(2 * c, c, dtype),
        "qk_bias": randn(2 * c, dtype=dtype, scale=0.3) if qkv_bias else None,
        "v_weight": linear(c, c, dtype),
        "v_bias": randn(c, dtype=dtype, scale=0.3) if qkv_bias else None,
        "proj_weight": linear(c, c, dtype),
        "proj_bias": randn(c, dtype=dtype, scale=0.3) if bias else None,
        "norm2_weight": randn(c, dtype=dtype, scale=0.3, mean=1.0),
        "norm2_bias": randn(c, dtype=dtype, scale=0.3),
        "fc1_weight": linear(hidden, c, dtype),
        "fc1_bias": randn(hidden, dtype=dtype, scale=0.3) if bias else None,
        "fc2_weight": linear(c, hidden, dtype),
        "fc2_bias": randn(c, dtype=dtype, scale=0.3) if bias else None,
    }


def attention_parameters(c: int, **options: Any) -> dict[str, Tensor | None]:
    return {
        name.replace("norm1", "norm"): value
        for name, value in list(inner_parameters(c, **options).items())[:8]
    }


def mlp_parameters(c: int, hidden: int | None = None, **options: Any) -> dict[str, Tensor | None]:
    return {
        name.replace("norm2", "norm"): value
        for name, value in list(inner_parameters(c, hidden, **options).items())[8:]
    }


def sentence_parameters(
    m: int,
    c: int,
    d: int,
    *,
    per_word: bool = False,
    bias: bool = False,
    norm2: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor | None]:
    """Random parameters of word_to_sentence, in the order of its schema."""
    size = c if per_word else m * c
    return {
        "norm1_weight": randn(size, dtype=dtype, scale=0.3, mean=1.0),
        "norm1_bias": randn(size, dtype=dtype, scale=0.3),
        "weight": linear(d, m * c, dtype),
        "bias": randn(d, dtype=dtype, scale=0.3) if bias else None,
        "norm2_weight": randn(d, dtype=dtype, scale=0.3, mean=1.0) if norm2 else None,
        "norm2_bias": randn(d, dtype=dtype, scale=0.3) if norm2 else None,
    }


def arguments(op: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Returns valid keyword arguments of a public function, of TNT's own proportions but small."""
    if op == "pixel_embed":
        return {
            "image": randn(2, 3, 32, 48, dtype=dtype),
            "weight": randn(24, 3, 7, 7, dtype=dtype, scale=0.1),
            "bias": randn(24, dtype=dtype),
            "position": randn(1, 16, 24, dtype=dtype),
            "patch_size": 16,
            "stride": 4,
            "legacy": False,
        }
    if op == "word_to_sentence":
        return {
            "words": randn(12, 16, 24, dtype=dtype),
            "tokens": randn(2, 7, 48, dtype=dtype),
            **sentence_parameters(16, 24, 48, bias=True, dtype=dtype),
        }
    x = {"x": randn(12, 16, 24, dtype=dtype)}
    if op == "inner_block":
        return {**x, **inner_parameters(24, dtype=dtype), "num_heads": 4}
    if op == "inner_attention":
        return {**x, **attention_parameters(24, dtype=dtype), "num_heads": 4}
    return {**x, **mlp_parameters(24, dtype=dtype)}


def reference_arguments(op: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Turns keyword arguments of a public function into those of its reference, in the schema's order."""
    values = dict(given)
    if op == "pixel_embed":
        patch = values.pop("patch_size", 16)
        patch_h, patch_w = patch if isinstance(patch, tuple) else (patch, patch)
        defaults = {"bias": None, "position": None, "stride": 4, "legacy": False}
        values = {**defaults, **values, "patch_h": patch_h, "patch_w": patch_w}
    elif op == "word_to_sentence":
        values = {
            "bias": None,
            "norm2_weight": None,
            "norm2_bias": None,
            "eps1": 1e-5,
            "eps2": 1e-5,
            **values,
        }
    else:
        values = {"eps1": 1e-5, "eps2": 1e-5, **values} if op == "inner_block" else {"eps": 1e-5, **values}
        if op != "inner_mlp" and values.get("scale") is None:
            values["scale"] = (values["x"].shape[-1] / values["num_heads"]) ** -0.5
    names = list(inspect.signature(getattr(reference, op)).parameters)
    return {name: values[name] for name in names if name in values}


def operator_arguments(
    op: str, given: Mapping[str, Any], compute_dtype: torch.dtype | None = None
) -> tuple[Any, ...]:
    """Turns keyword arguments of a public function into the arguments of torch.ops.tnt_kernels.<op>."""
    values = reference_arguments(op, given)
    names = [name for name in NOISE if name in inspect.signature(getattr(reference, op)).parameters]
    noise = [values.pop(name, NOISE[name]) for name in names]
    return (*values.values(), compute_dtype, *noise)


def operator(op: str) -> Any:
    return getattr(torch.ops.tnt_kernels, op).default


def in_dtype(given: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }


def on_device(given: Mapping[str, Any], device: str) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}


def autocasting(given: Mapping[str, Any], dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to `dtype`, or none, on the device of the arguments."""
    device = next(value.device.type for value in given.values() if isinstance(value, Tensor))
    return torch.autocast(device, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def eager_and_exact(
    op: str, given: Mapping[str, Any], autocast: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Returns what eager PyTorch gives for these arguments, and the same in float64."""
    values = reference_arguments(op, given)
    function = getattr(reference, op)
    with torch.no_grad():
        with autocasting(values, autocast):
            eager = function(**values)
        return eager, function(**in_dtype(values, torch.float64))


def run(
    op: str, given: Mapping[str, Any], autocast: torch.dtype | None = None, backend: str = "cpu"
) -> Tensor:
    """Calls the public function without gradients on a backend, under autocast if a dtype is given."""
    with torch.no_grad(), use_backend(backend), autocasting(given, autocast):
        return getattr(ops, op)(**given)


def check(
    op: str, given: Mapping[str, Any], autocast: torch.dtype | None = None, backend: str = "cpu"
) -> Tensor:
    """Runs an operation on the backend and asserts that it is as accurate as eager; returns its result."""
    eager, exact = eager_and_exact(op, given, autocast)
    ours = run(op, given, autocast, backend)
    assert ours.dtype == eager.dtype, (ours.dtype, eager.dtype)
    assert ours.is_contiguous()
    assert_as_accurate(ours, eager, exact, what=op)
    return ours


def assert_same_special_values(ours: Tensor, eager: Tensor) -> None:
    """Asserts that NaNs and infinities stand where eager PyTorch has them."""
    assert torch.equal(torch.isnan(ours), torch.isnan(eager)), "NaNs differ from eager's"
    assert torch.equal(torch.isposinf(ours), torch.isposinf(eager)), "positive infinities differ"
    assert torch.equal(torch.isneginf(ours), torch.isneginf(eager)), "negative infinities differ"
