"""Checks of the arguments of every operation: the rules that the kernels rely on, in one place.

A public function, a registered operator and its fake all call the same check, so a wrong call gets
the same message on every path. Each raises ValueError (TypeError for what is no tensor at all) that
names the argument, what was given and what is needed. All of them can be traced with symbolic sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COMPUTE_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)

STREAM = "sentences, words, channels"
IMAGE = "images, channels, height, width"
WORDS = "images * sentences, words, c"
TOKENS = "images, sentences + 1, d"
OUTER = "images, tokens, d"

# Rates of dropout, in the order of the computation.
ATTENTION_DROPS = ("attn_drop", "proj_drop")
MLP_DROPS = ("hidden_drop", "out_drop")
DROPS = ATTENTION_DROPS + MLP_DROPS

Parameter = tuple[str, Tensor | None, tuple[int, ...]]  # name, value, shape that it must have


def error(op: str, argument: str, expected: object, given: object) -> ValueError:
    return ValueError(f"{op}: {argument} must be {expected}, got {given}")


def check_tensor(op: str, argument: str, value: object, layout: str) -> None:
    """Checks that value is a floating tensor with one dimension for each name in layout, e.g. "B, m, c"."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {argument} must be a tensor of shape [{layout}], got {type(value).__name__}")
    if value.dim() != layout.count(",") + 1:
        raise error(op, argument, f"a tensor of shape [{layout}]", f"shape {list(value.shape)}")
    if value.dtype not in DTYPES:
        raise error(op, argument, "of dtype float32, bfloat16, float16 or float64", value.dtype)


def pair(op: str, argument: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Returns (height, width) of an argument that is one number for both or a pair."""
    if isinstance(value, (int, torch.SymInt)):
        return value, value
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise error(op, argument, "one number or a pair of numbers", repr(value))
    return value[0], value[1]


def check_compute_dtype(op: str, x: Tensor, compute_dtype: torch.dtype | None) -> None:
    if compute_dtype not in COMPUTE_DTYPES:
        raise error(op, "compute_dtype", "None, float32, bfloat16 or float16", compute_dtype)
    if compute_dtype is not None and x.dtype == torch.float64:
        raise error(op, "compute_dtype", "None for a float64 input", compute_dtype)


def check_parameters(
    op: str,
    x: Tensor,
    required: tuple[Parameter, ...],
    optional: tuple[Parameter, ...],
    compute_dtype: torch.dtype | None,
) -> None:
    """Checks shape, device and dtype of parameters against those of the input x.

    With a compute_dtype (under autocast) parameters may be of any lower dtype; without one they are of
    x's dtype, as PyTorch's own layers demand, and those of a LayerNorm may also be float32.
    """
    device, dtype = x.device, x.dtype
    mixed = compute_dtype is not None
    for name, value, shape in required:
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{op}: {name} must be a tensor of shape {list(shape)}, got {type(value).__name__}"
            )
        if value.shape != shape or value.device != device or value.dtype != dtype:
            _check_parameter(op, x, name, value, shape, mixed)
    for name, value, shape in optional:
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{op}: {name} must be None or a tensor of shape {list(shape)}, got {type(value).__name__}"
            )
        if value.shape != shape or value.device != device or value.dtype != dtype:
            _check_parameter(op, x, name, value, shape, mixed)


def _check_parameter(
    op: str, x: Tensor, name: str, value: Tensor, shape: tuple[int, ...], mixed: bool
) -> None:
    if value.shape != shape:
        raise error(op, name, f"of shape {list(shape)}", f"shape {list(value.shape)}")
    if value.device != x.device:
        raise error(op, name, f"on {x.device} like the input", value.device)
    if value.dtype == x.dtype:
        return
    if mixed and value.dtype in COMPUTE_DTYPES:
        return
    if name.startswith("norm") and value.dtype == torch.float32 and x.dtype != torch.float64:
        return
    raise error(op, name, f"of dtype {x.dtype} like the input (or run under torch.autocast)", value.dtype)


def _check_stream(
    op: str, x: Tensor, compute_dtype: torch.dtype | None, argument: str = "x", layout: str = STREAM
) -> int:
    """Returns the channels of a stream of words, or of the outer block's tokens."""
    check_tensor(op, argument, x, layout)
    check_compute_dtype(op, x, compute_dtype)
    if x.shape[1] < 1 or x.shape[2] < 1:
        unit = layout.split(", ")[1].removesuffix("s")
        raise error(op, argument, f"of at least one {unit} and one channel", f"shape {list(x.shape)}")
    return x.shape[2]


def _check_heads(op: str, c: int, num_heads: int, argument: str = "x") -> None:
    if not isinstance(num_heads, (int, torch.SymInt)) or num_heads < 1 or c % num_heads != 0:
        raise error(op, "num_heads", f"a positive divisor of the {c} channels of {argument}", num_heads)


def scale_of(op: str, x: Tensor, num_heads: int, scale: float | None, argument: str = "x") -> float:
    """Returns the factor of the scores: the one given, else (c / num_heads) ** -0.5."""
    c = x.shape[-1]
    _check_heads(op, c, num_heads, argument)
    if scale is None:
        return (max(c, 1) / num_heads) ** -0.5
    return scale


def _hidden(op: str, fc1_weight: Tensor | None, c: int) -> int:
    shape = f"[hidden, {c}]"
    if not isinstance(fc1_weight, Tensor):
        raise TypeError(
            f"{op}: fc1_weight must be a tensor of shape {shape}, got {type(fc1_weight).__name__}"
        )
    if fc1_weight.dim() != 2 or fc1_weight.shape[0] < 1:
        given = f"shape {list(fc1_weight.shape)}"
        raise error(op, "fc1_weight", f"of shape {shape} with at least one hidden unit", given)
    return fc1_weight.shape[0]


def check_drop_path(op: str, x: Tensor, argument: str = "x", **factors: Tensor | None) -> None:
    """Checks factors of the rows of x, one for each; the name of a factor is that of its argument."""
    for name, value in factors.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor or None, got {type(value).__name__}")
        if value.shape != x.shape[:1] or value.dtype != torch.float32 or value.device != x.device:
            raise error(
                op,
                name,
                f"float32 of shape {list(x.shape[:1])}, a factor for each row of {argument}, on {x.device}",
                f"{value.dtype} of shape {list(value.shape)} on {value.device}",
            )


def check_dropout(op: str, x: Tensor, dropout: Sequence[Any], names: Sequence[str]) -> None:
    """Checks a seed, which may be absent, and the rates behind it, which may be absent or 0 without one."""
    if not dropout:
        return
    seed, *rates = dropout
    if seed is None:
        for name, rate in zip(names, rates, strict=False):
            if rate != 0.0:
                raise error(op, "seed", f"an int64 tensor of one element where {name} is not 0", seed)
        return
    if not isinstance(seed, Tensor):
        raise TypeError(f"{op}: seed must be an int64 tensor of one element, got {type(seed).__name__}")
    if seed.dtype != torch.int64 or seed.shape != (1,) or seed.device != x.device:
        given = f"{seed.dtype} of shape {list(seed.shape)} on {seed.device}"
        raise error(op, "seed", f"int64 of shape [1] on {x.device}", given)
    for name, rate in zip(names, rates, strict=False):
        if not 0.0 <= rate <= 1.0:
            raise error(op, name, "in [0, 1]", rate)


def check_inner_attention(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qk_weight: Tensor,
    qk_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    num_heads: int,
    compute_dtype: torch.dtype | None,
) -> None:
    op = "inner_attention"
    c = _check_stream(op, x, compute_dtype)
    _check_heads(op, c, num_heads)
    check_parameters(
        op,
        x,
        (
            ("norm_weight", norm_weight, (c,)),
            ("norm_bias", norm_bias, (c,)),
            ("qk_weight", qk_weight, (2 * c, c)),
            ("v_weight", v_weight, (c, c)),
            ("proj_weight", proj_weight, (c, c)),
        ),
        (("qk_bias", qk_bias, (2 * c,)), ("v_bias", v_bias, (c,)), ("proj_bias", proj_bias, (c,))),
        compute_dtype,
    )


def check_inner_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    compute_dtype: torch.dtype | None,
) -> None:
    op = "inner_mlp"
    c = _check_stream(op, x, compute_dtype)
    hidden = _hidden(op, fc1_weight, c)
    check_parameters(
        op,
        x,
        (
            ("norm_weight", norm_weight, (c,)),
            ("norm_bias", norm_bias, (c,)),
            ("fc1_weight", fc1_weight, (hidden, c)),
            ("fc2_weight", fc2_weight, (c, hidden)),
        ),
        (("fc1_bias", fc1_bias, (hidden,)), ("fc2_bias", fc2_bias, (c,))),
        compute_dtype,
    )


def check_inner_block(x: Tensor, *arguments: Any) -> None:
    """Arguments: the operator's 14 parameters, num_heads and compute_dtype."""
    _check_transformer("inner_block", "x", STREAM, x, *arguments)


def check_outer_block(tokens: Tensor, *arguments: Any) -> None:
    """Arguments: the operator's 14 parameters, num_heads and compute_dtype."""
    _check_transformer("outer_block", "tokens", OUTER, tokens, *arguments)


def _check_transformer(
    op: str,
    argument: str,
    layout: str,
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    qk_weight: Tensor,
    qk_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    num_heads: int,
    compute_dtype: torch.dtype | None,
) -> None:
    c = _check_stream(op, x, compute_dtype, argument, layout)
    _check_heads(op, c, num_heads, argument)
    hidden = _hidden(op, fc1_weight, c)
    check_parameters(
        op,
        x,
        (
            ("norm1_weight", norm1_weight, (c,)),
            ("norm1_bias", norm1_bias, (c,)),
            ("qk_weight", qk_weight, (2 * c, c)),
            ("v_weight", v_weight, (c, c)),
            ("proj_weight", proj_weight, (c, c)),
            ("norm2_weight", norm2_weight, (c,)),
            ("norm2_bias", norm2_bias, (c,)),
            ("fc1_weight", fc1_weight, (hidden, c)),
            ("fc2_weight", fc2_weight, (c, hidden)),
        ),
        (
            ("qk_bias", qk_bias, (2 * c,)),
            ("v_bias", v_bias, (c,)),
            ("proj_bias", proj_bias, (c,)),
            ("fc1_bias", fc1_bias, (hidden,)),
            ("fc2_bias", fc2_bias, (c,)),
        ),
        compute_dtype,
    )


def check_gradient(
    op: str, grad: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Checks the gradient of an operator's result, given to the operator `op` of its backward."""
    if list(grad.shape) != list(shape) or grad.dtype != dtype or grad.device != device:
        given = f"{grad.dtype} of shape {list(grad.shape)} on {grad.device}"
        raise error(op, "grad", f"{dtype} of shape {list(shape)} on {device}", given)


def check_image(image: object, mean: object, std: object) -> None:
    """Checks an image of pixel_embed: of a floating dtype, or of uint8 with mean and std."""
    op = "pixel_embed"
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        check_tensor(op, "image", image, IMAGE)
        for name, values in (("mean", mean), ("std", std)):
            if values is not None:
                raise error(op, name, "None for an image that is not of dtype uint8", values)
        return
    if image.dim() != 4:
        raise error(op, "image", f"a tensor of shape [{IMAGE}]", f"shape {list(image.shape)}")
    channels = image.shape[1]
    for name, values in (("mean", mean), ("std", std)):
        if not isinstance(values, (tuple, list)) or len(values) != channels:
            raise error(op, name, f"{channels} numbers for an image of dtype uint8", values)
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
            raise error(op, name, "finite numbers", values)
        if name == "std" and min(values, default=1) <= 0:
            raise error(op, name, "positive", values)


def check_pixel_embed(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    patch_h: int,
    patch_w: int,
    stride: int,
    legacy: bool,
    compute_dtype: torch.dtype | None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[int, int, int]:
    """Returns the patches of an image, the words of a patch, and the channels of a word."""
    op = "pixel_embed"
    check_image(image, mean, std)
    check_compute_dtype(op, image, compute_dtype)
    channels, height, width = image.shape[1], image.shape[2], image.shape[3]
    if patch_h < 1 or patch_w < 1:
        raise error(op, "patch_size", "positive", (patch_h, patch_w))
    if stride < 1:
        raise error(op, "stride", "positive", stride)
    if height < patch_h or width < patch_w or height % patch_h != 0 or width % patch_w != 0:
        raise error(
            op,
            "image",
            f"of a height and width that patches of {patch_h}x{patch_w} divide",
            f"{height}x{width}",
        )
    if legacy and (patch_h % stride != 0 or patch_w % stride != 0):
        raise error(
            op, "patch_size", f"a multiple of stride {stride} when legacy is True", (patch_h, patch_w)
        )
    check_tensor(op, "weight", weight, "c, channels, kernel, kernel")
    c, kernel = weight.shape[0], weight.shape[3]
    if kernel % 2 == 0 or c < 1 or channels < 1:
        raise error(op, "weight", f"of shape [c, {channels}, k, k] with k odd", f"shape {list(weight.shape)}")
    rows, columns = height // patch_h, width // patch_w
    m = -(-patch_h // stride) * -(-patch_w // stride)
    if image.dtype == torch.uint8 and weight.device != image.device:
        raise error(op, "weight", f"on {image.device} like the input", weight.device)
    check_parameters(
        op,
        weight if image.dtype == torch.uint8 else image,  # whose dtype the parameters have
        (("weight", weight, (c, channels, kernel, kernel)),),
        (("bias", bias, (c,)),),
        compute_dtype,
    )
    if position is not None:
        check_tensor(op, "position", position, "1, words, c")
        if position.shape != (1, m, c):
            raise error(op, "position", f"of shape {[1, m, c]}", f"shape {list(position.shape)}")
        if position.device != image.device:
            raise error(op, "position", f"on {image.device} like the image", position.device)
    return rows * columns, m, c


def check_word_to_sentence(
    words: Tensor,
    tokens: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    compute_dtype: torch.dtype | None,
) -> None:
    op = "word_to_sentence"
    check_tensor(op, "words", words, WORDS)
    check_tensor(op, "tokens", tokens, TOKENS)
    check_compute_dtype(op, words, compute_dtype)
    m, c = words.shape[1], words.shape[2]
    batch, length, d = tokens.shape
    if m < 1 or c < 1:
        raise error(op, "words", "of at least one word and one channel", f"shape {list(words.shape)}")
    if length < 2 or d < 1:
        raise error(
            op,
            "tokens",
            "of shape [images, sentences + 1, d] with a sentence or more",
            f"shape {list(tokens.shape)}",
        )
    if words.shape[0] != batch * (length - 1):
        raise error(
            op,
            "words",
            f"of {batch} * {length - 1} sentences to fit tokens of shape {list(tokens.shape)}",
            f"shape {list(words.shape)}",
        )
    if tokens.device != words.device:
        raise error(op, "tokens", f"on {words.device} like words", tokens.device)
    if tokens.dtype != words.dtype and (
        words.dtype == torch.float64 or (compute_dtype is None and tokens.dtype != torch.float32)
    ):
        raise error(op, "tokens", f"of dtype {words.dtype} like words, or float32", tokens.dtype)
    per_word = isinstance(norm1_weight, Tensor) and norm1_weight.shape == (c,)
    norm1_shape = (c,) if per_word else (m * c,)
    if (norm2_weight is None) != (norm2_bias is None):
        missing, given = (
            ("norm2_weight", "norm2_bias") if norm2_weight is None else ("norm2_bias", "norm2_weight")
        )
        raise error(op, missing, f"given together with {given}", None)
    check_parameters(
        op,
        words,
        (
            ("norm1_weight", norm1_weight, norm1_shape),
            ("norm1_bias", norm1_bias, norm1_shape),
            ("weight", weight, (d, m * c)),
        ),
        (
            ("bias", bias, (d,)),
            ("norm2_weight", norm2_weight, (d,)),
            ("norm2_bias", norm2_bias, (d,)),
        ),
        compute_dtype,
    )


def check_add_layer_norm(x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor) -> None:
    op = "add_layer_norm"
    if not isinstance(x, Tensor) or x.dim() < 1 or x.dtype not in DTYPES or x.shape[-1] < 1:
        raise error(op, "x", "a floating tensor of shape [..., d]", getattr(x, "shape", type(x).__name__))
    if y is not None and (y.shape != x.shape or y.device != x.device or y.dtype not in DTYPES):
        raise error(
            op,
            "y",
            f"a floating tensor of shape {list(x.shape)} on {x.device}",
            f"{y.dtype} {list(y.shape)} on {y.device}",
        )
    d = x.shape[-1]
    for name, value in (("weight", weight), ("bias", bias)):
        if value.shape != (d,) or value.device != x.device or value.dtype not in DTYPES:
            raise error(
                op, name, f"a floating tensor of shape [{d}] on {x.device}",
                f"{value.dtype} {list(value.shape)} on {value.device}",
            )  # fmt: skip


def check_packed_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
    op = "packed_linear"
    if x.dim() < 1 or x.dtype not in DTYPES:
        raise error(op, "x", "a floating tensor of shape [..., inputs]", f"{x.dtype} {list(x.shape)}")
    if len(weights) < 1 or len(weights) != len(biases):
        raise error(
            op, "biases", "one (or None) for each of one or more weights", f"{len(biases)} for {len(weights)}"
        )
    inputs = x.shape[-1]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if weight.dim() != 2 or weight.shape[1] != inputs:
            raise error(op, f"weights[{i}]", f"of shape [outputs, {inputs}]", f"shape {list(weight.shape)}")
        outputs = weight.shape[0]
        check_parameters(
            op,
            x,
            ((f"weights[{i}]", weight, (outputs, inputs)),),
            ((f"biases[{i}]", bias, (outputs,)),),
            None if x.dtype == torch.float64 else x.dtype,  # a weight of another dtype is cast, once
        )
