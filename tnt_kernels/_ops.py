"""Every registered operator of the namespace ``tnt_kernels``: schema, fake and gradient rule.

The kernels register themselves for their device (backends/cpu.py, outer.py). compute_dtype is the
dtype in which the operands of matrix products are held, None for that of the input; sums, LayerNorm
statistics and softmax are float32 in every case, and float16 is computed in float32 on the CPU.
Ambient autocast has no influence on an operator: the public functions turn it into compute_dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tnt_kernels import _checks, dispatch
from tnt_kernels._autograd import COMPOSITES, define_backward, define_train, record
from tnt_kernels.backends import reference

lib = torch.library.Library("tnt_kernels", "DEF")


def _define(name: str, schema: str, composite: Callable[..., Any], activations: Sequence[str] = ()) -> Any:
    """Defines an operator; `composite` computes the same in plain PyTorch, differentiably.

    Where autograd must record the operator and it is in dispatch.TRAINABLE, its gradients come from a second
    operator, `<name>_backward`, and what it keeps for them beside its arguments, `activations`, from a third,
    `<name>_train` (_autograd.py). Otherwise the composite runs in its place.
    """
    COMPOSITES[name] = composite
    lib.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.tnt_kernels, name).default
    train = define_train(lib, op, activations) if activations else None
    backward = define_backward(lib, op, composite, activations) if name in dispatch.TRAINABLE else None

    def autograd(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        forward_mode = forward_ad._current_level >= 0
        if forward_mode or (torch.is_grad_enabled() and dispatch.gradient_needed(*_tensors(args))):
            # Refuses where the cpu backend is forced and cannot do it. Where a `train` cannot run, the
            # composite keeps its own activations.
            inspected = () if train is None else _tensors(args)
            backend = dispatch.choose(name, *inspected, needs_grad=True)
            if backward is None or backend == "reference" or forward_mode:
                return composite(*args)
            return record(op, train, backward, composite, keyset, args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    lib.impl(name, autograd, "Autograd", with_keyset=True)
    return op


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    found = []
    for value in args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(item for item in value if isinstance(item, Tensor))
    return found


def held_dtype(x: Tensor, compute_dtype: torch.dtype | None) -> torch.dtype:
    """Dtype in which operands of matrix products are held: the CPU computes float16 in float32."""
    held = x.dtype if compute_dtype is None else compute_dtype
    return torch.float32 if held == torch.float16 and x.device.type == "cpu" else held


def stream_dtype(x: Tensor) -> torch.dtype:
    """Dtype of the sums of the residual stream x inside a block."""
    return held_dtype(x, None)


pixel_embed = _define(
    "pixel_embed",
    "(Tensor image, Tensor weight, Tensor? bias, Tensor? position, int patch_h, int patch_w, int stride, "
    "bool legacy, ScalarType? compute_dtype, float[]? mean=None, float[]? std=None) -> Tensor",
    reference.pixel_embed_in,
)
inner_attention = _define(
    "inner_attention",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor qk_weight, Tensor? qk_bias, Tensor v_weight, "
    "Tensor? v_bias, Tensor proj_weight, Tensor? proj_bias, int num_heads, float scale, float eps, "
    "ScalarType? compute_dtype, Tensor? drop_path=None, Tensor? seed=None, float attn_drop=0., "
    "float proj_drop=0.) -> Tensor",
    reference.inner_attention_in,
)
inner_mlp = _define(
    "inner_mlp",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, Tensor? fc1_bias, "
    "Tensor fc2_weight, Tensor? fc2_bias, float eps, ScalarType? compute_dtype, "
    "Tensor? drop_path=None, Tensor? seed=None, float hidden_drop=0., float out_drop=0.) -> Tensor",
    reference.inner_mlp_in,
)
inner_block = _define(
    "inner_block",
    "(Tensor x, Tensor norm1_weight, Tensor norm1_bias, Tensor qk_weight, Tensor? qk_bias, "
    "Tensor v_weight, Tensor? v_bias, Tensor proj_weight, Tensor? proj_bias, "
    "Tensor norm2_weight, Tensor norm2_bias, Tensor fc1_weight, Tensor? fc1_bias, "
    "Tensor fc2_weight, Tensor? fc2_bias, int num_heads, float scale, float eps1, float eps2, "
    "ScalarType? compute_dtype, Tensor? drop_path1=None, Tensor? drop_path2=None, Tensor? seed=None, "
    "float attn_drop=0., float proj_drop=0., float hidden_drop=0., float out_drop=0.) -> Tensor",
    reference.inner_block_in,
)
word_to_sentence = _define(
    "word_to_sentence",
    "(Tensor words, Tensor tokens, Tensor norm1_weight, Tensor norm1_bias, Tensor weight, Tensor? bias, "
    "Tensor? norm2_weight, Tensor? norm2_bias, float eps1, float eps2, ScalarType? compute_dtype) -> Tensor",
    reference.word_to_sentence_in,
)
outer_block = _define(
    "outer_block",
    "(Tensor tokens, Tensor norm1_weight, Tensor norm1_bias, Tensor qk_weight, Tensor? qk_bias, "
    "Tensor v_weight, Tensor? v_bias, Tensor proj_weight, Tensor? proj_bias, "
    "Tensor norm2_weight, Tensor norm2_bias, Tensor fc1_weight, Tensor? fc1_bias, "
    "Tensor fc2_weight, Tensor? fc2_bias, int num_heads, float scale, float eps1, float eps2, "
    "ScalarType? compute_dtype, Tensor? drop_path1=None, Tensor? drop_path2=None) -> Tensor",
    reference.inner_block_in,
    # q, k and v of every token [B, N, 3d]; what attention puts out [B, N, d], or on GPUs [0], since backward
    # computes it again there; tokens + attention's branch [B, N, d]; the hidden layer before its GELU
    # [B, N, hidden]
    activations=("qkv", "attended", "z", "h"),
)
# (x + y, LayerNorm(x + y)). Without y the first result is an empty tensor of shape [0], because an
# operator must not return one of its arguments.
add_layer_norm = _define(
    "add_layer_norm",
    "(Tensor x, Tensor? y, Tensor weight, Tensor bias, float eps, ScalarType? out_dtype) -> (Tensor, Tensor)",
    reference.add_layer_norm_in,
)
# x times the weights joined along their outputs: one product for q, k and v.
packed_linear = _define(
    "packed_linear",
    "(Tensor x, Tensor[] weights, Tensor?[] biases, bool gelu) -> Tensor",
    reference.packed_linear_in,
)


@torch.library.register_fake("tnt_kernels::pixel_embed", lib=lib)
def _(
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
) -> Tensor:
    n, m, c = _checks.check_pixel_embed(
        image, weight, bias, position, patch_h, patch_w, stride, legacy, compute_dtype, mean, std
    )
    dtype = reference.pixel_embed_dtype(image, weight, position, compute_dtype)
    return image.new_empty((image.shape[0] * n, m, c), dtype=dtype)


@torch.library.register_fake("tnt_kernels::inner_attention", lib=lib)
def _(x: Tensor, *args: Any) -> Tensor:
    _checks.check_inner_attention(x, *(*args[:9], args[11]))
    _checks.check_drop_path("inner_attention", x, drop_path=args[12] if len(args) > 12 else None)
    _checks.check_dropout("inner_attention", x, args[13:], _checks.ATTENTION_DROPS)
    return x.new_empty(x.shape)


@torch.library.register_fake("tnt_kernels::inner_mlp", lib=lib)
def _(x: Tensor, *args: Any) -> Tensor:
    _checks.check_inner_mlp(x, *(*args[:6], args[7]))
    _checks.check_drop_path("inner_mlp", x, drop_path=args[8] if len(args) > 8 else None)
    _checks.check_dropout("inner_mlp", x, args[9:], _checks.MLP_DROPS)
    return x.new_empty(x.shape)


def _check_block(
    check: Callable[..., None], op: str, argument: str, x: Tensor, args: tuple[Any, ...]
) -> None:
    check(x, *args[:15], args[18])
    names = ("drop_path1", "drop_path2")
    _checks.check_drop_path(op, x, argument, **dict(zip(names, args[19:21], strict=False)))
    _checks.check_dropout(op, x, args[21:], _checks.DROPS)


@torch.library.register_fake("tnt_kernels::inner_block", lib=lib)
def _(x: Tensor, *args: Any) -> Tensor:
    _check_block(_checks.check_inner_block, "inner_block", "x", x, args)
    return x.new_empty(x.shape)


@torch.library.register_fake("tnt_kernels::word_to_sentence", lib=lib)
def _(words: Tensor, tokens: Tensor, *args: Any) -> Tensor:
    _checks.check_word_to_sentence(words, tokens, *args[:-3], *args[-1:])
    return tokens.new_empty(tokens.shape)


@torch.library.register_fake("tnt_kernels::outer_block", lib=lib)
def _(tokens: Tensor, *args: Any) -> Tensor:
    _check_block(_checks.check_outer_block, "outer_block", "tokens", tokens, args)
    return tokens.new_empty(tokens.shape)


@torch.library.register_fake("tnt_kernels::outer_block_train", lib=lib)
def _(tokens: Tensor, *args: Any) -> tuple[Tensor, ...]:
    _check_block(_checks.check_outer_block, "outer_block_train", "tokens", tokens, args)
    held = held_dtype(tokens, args[18])
    batch, n, d = tokens.shape
    return (
        tokens.new_empty((batch, n, d)),
        tokens.new_empty((batch, n, 3 * d), dtype=held),
        tokens.new_empty((batch, n, d) if tokens.device.type == "cpu" else 0, dtype=held),
        tokens.new_empty((batch, n, d), dtype=stream_dtype(tokens)),
        tokens.new_empty((batch, n, args[10].shape[0]), dtype=held),
    )


@torch.library.register_fake("tnt_kernels::add_layer_norm", lib=lib)
def _(
    x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    _checks.check_add_layer_norm(x, y, weight, bias)
    total = x.new_empty(0 if y is None else x.shape)
    return total, x.new_empty(x.shape, dtype=x.dtype if out_dtype is None else out_dtype)


@torch.library.register_fake("tnt_kernels::packed_linear", lib=lib)
def _(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], gelu: bool) -> Tensor:
    _checks.check_packed_linear(x, weights, biases)
    return x.new_empty((*x.shape[:-1], sum(weight.shape[0] for weight in weights)))
