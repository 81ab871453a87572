"""The calls whose Triton kernels are compiled without a GPU: operators, and shapes that need other code.

A case is a line of CASES. Its tensors are on the device "meta"; the launchers themselves run, under
`runtime.recording`, and choose kernel, configuration and constants as they would on the architecture.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tnt_kernels._autograd import tensor_positions
from tnt_kernels.backends import triton as triton_backend
from tnt_kernels.backends.triton import runtime

SENTENCES = 256 * 196  # batch 256 at 224 px; no tile divides the tokens of a batch, 197 each
TOKENS = (256, 197)

NO_GRADIENT = ("drop_path", "drop_path1", "drop_path2", "seed")

# dtype of the tensors, dtype of matrix products where it is another (autocast)
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "bfloat16": (torch.bfloat16, None),
    "autocast": (torch.float32, torch.bfloat16),
    "float16": (torch.float16, None),
    "float32": (torch.float32, None),
    "widened": (torch.bfloat16, torch.float32),  # what the operators take, and no public function asks for
}


@dataclass(frozen=True)
class KernelCase:
    """An operator at a size. `sizes` are the keywords of its entry in ARGUMENTS."""

    op: str
    sizes: dict[str, Any] = field(hash=False)
    backward: bool = False
    odd: bool = False  # a size that is not TNT's
    only: str = ""  # of a backward pass: the one gradient that is wanted

    @property
    def title(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.sizes.items())
        only = f" {self.only} alone" * bool(self.only)
        return f"{self.op} {'backward ' * self.backward}{sizes}{only}"

    @property
    def launchers(self) -> list[str]:
        """Operators whose launchers the case calls."""
        if not self.backward:
            return [self.op]
        forward = self.op if self._train not in triton_backend.LAUNCHERS else self._train
        return [forward, f"{self.op}_backward"]

    @property
    def _train(self) -> str:
        """The operator that runs the forward pass of training, where that is another one."""
        return f"{self.op}_train"

    @property
    def sentences(self) -> int:
        """Sentences of the call, or tokens in the outer half."""
        return TOKENS[0] * TOKENS[1] if self.op in OUTER else self.sizes.get("s", SENTENCES)

    def launches(self, precision: str, architecture: int) -> list[runtime.Launch]:
        """What the launcher of the forward pass, or that of the backward pass, launches.

        Raises RuntimeError where it launches nothing: it has left the call to plain PyTorch.
        """
        with runtime.recording(architecture) as launches:
            call, arguments = self.call(precision)
            launches.clear()  # of the forward pass, whose activations the backward pass takes
            call(*arguments)
        if not launches:
            raise RuntimeError(f"{self.title}, {precision}, sm_{architecture}: no kernel was launched")
        return launches

    def call(self, precision: str, device: str = "meta") -> tuple[Callable[..., Any], list[Any]]:
        """The launcher of the forward or the backward pass and its arguments, random ones on a device."""
        dtype, compute_dtype = PRECISIONS[precision]
        values = ARGUMENTS[self.op](dtype, **self.sizes)
        if device != "meta":
            values = {n: _random(n, v, device) if isinstance(v, Tensor) else v for n, v in values.items()}
        arguments = _schema_arguments(self.op, values, compute_dtype)
        if not self.backward:
            return launcher(self.op), arguments
        forward, backward = self.launchers
        found = launcher(forward)(*arguments)
        out, *activations = found if forward == self._train else [found]
        op = operator(self.op)
        given = zip(op._schema.arguments, arguments, strict=True)
        wanted = [
            value is not None and argument.name not in NO_GRADIENT and self.only in ("", argument.name)
            for argument, value in given
        ]
        needed = [wanted[i] for i in tensor_positions(op)]
        grad = _random("grad", out, device) if device != "meta" else torch.empty_like(out)
        return launcher(backward), [grad, needed, *activations, *arguments]


def operator(op: str) -> Any:
    return getattr(torch.ops.tnt_kernels, op).default


def launcher(op: str) -> Callable[..., Any]:
    """The implementation for GPUs of an operator."""
    module = importlib.import_module(f"{triton_backend.__name__}.{triton_backend.LAUNCHERS[op]}")
    return getattr(module, op)


def _schema_arguments(op: str, values: dict[str, Any], compute_dtype: torch.dtype | None) -> list[Any]:
    """The operator's positional arguments: `values` by name, for the others what a plain call passes."""
    usual = {"scale": 0.25, "eps": 1e-5, "eps1": 1e-5, "eps2": 1e-5, "compute_dtype": compute_dtype}
    values = usual | values
    return [values.get(argument.name, argument.default_value) for argument in operator(op)._schema.arguments]


def _random(name: str, of: Tensor, device: str) -> Tensor:
    """Values of a trained model's scale: gains near one, weights that keep their input's variance."""
    value = torch.randn(of.shape, device=device)
    if name.startswith("drop_path") or (of.dim() == 1 and name.endswith("weight")):
        value = 1 + 0.1 * value
    elif name.endswith("weight"):
        value *= of.shape[-1] ** -0.5
    return value.to(of.dtype)


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _norm(name: str, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {f"{name}_weight": _meta(width, dtype=dtype), f"{name}_bias": _meta(width, dtype=dtype)}


def _attention(width: int, dtype: torch.dtype, norm: str) -> dict[str, Tensor | None]:
    return {
        **_norm(norm, width, dtype),
        "qk_weight": _meta(2 * width, width, dtype=dtype),
        "qk_bias": None,
        "v_weight": _meta(width, width, dtype=dtype),
        "v_bias": None,
        "proj_weight": _meta(width, width, dtype=dtype),
        "proj_bias": _meta(width, dtype=dtype),
    }


def _mlp(width: int, dtype: torch.dtype, norm: str) -> dict[str, Tensor | None]:
    return {
        **_norm(norm, width, dtype),
        "fc1_weight": _meta(4 * width, width, dtype=dtype),
        "fc1_bias": _meta(4 * width, dtype=dtype),
        "fc2_weight": _meta(width, 4 * width, dtype=dtype),
        "fc2_bias": _meta(width, dtype=dtype),
    }


def _drop_path(rows: int, drop_path: bool) -> dict[str, Tensor]:
    names = ("drop_path1", "drop_path2") if drop_path else ()
    return {name: _meta(rows, dtype=torch.float32) for name in names}


def _inner_block(
    dtype: torch.dtype, c: int, heads: int, m: int = 16, s: int = SENTENCES, drop_path: bool = False
) -> dict[str, Any]:
    return {
        "x": _meta(s, m, c, dtype=dtype),
        **_attention(c, dtype, "norm1"),
        **_mlp(c, dtype, "norm2"),
        "num_heads": heads,
        **_drop_path(s, drop_path),
    }


def _inner_attention(dtype: torch.dtype, c: int, heads: int, m: int = 16) -> dict[str, Any]:
    x = _meta(SENTENCES, m, c, dtype=dtype)
    return {"x": x, **_attention(c, dtype, "norm"), "num_heads": heads}


def _inner_mlp(dtype: torch.dtype, c: int, m: int = 16) -> dict[str, Any]:
    return {"x": _meta(SENTENCES, m, c, dtype=dtype), **_mlp(c, dtype, "norm")}


def _word_to_sentence(
    dtype: torch.dtype, d: int, c: int, m: int = 16, legacy: bool = False
) -> dict[str, Any]:
    """legacy: the layer of timm's older TNT, with a norm of each word, a bias and no second norm."""
    return {
        "words": _meta(SENTENCES, m, c, dtype=dtype),
        "tokens": _meta(*TOKENS, d, dtype=dtype),
        **_norm("norm1", c if legacy else m * c, dtype),
        "weight": _meta(d, m * c, dtype=dtype),
        "bias": _meta(d, dtype=dtype) if legacy else None,
        **(dict.fromkeys(("norm2_weight", "norm2_bias")) if legacy else _norm("norm2", d, dtype)),
    }


def _outer_block(dtype: torch.dtype, d: int, heads: int, drop_path: bool = False) -> dict[str, Any]:
    return {
        "tokens": _meta(*TOKENS, d, dtype=dtype),
        **_attention(d, dtype, "norm1"),
        **_mlp(d, dtype, "norm2"),
        "num_heads": heads,
        **_drop_path(TOKENS[0], drop_path),
    }


def _pixel_embed(
    dtype: torch.dtype, c: int, legacy: bool = False, channels: int = 3, patch: int = 16, stride: int = 4
) -> dict[str, Any]:
    words = math.ceil(patch / stride) ** 2
    return {
        "image": _meta(TOKENS[0], channels, 14 * patch, 14 * patch, dtype=dtype),
        "weight": _meta(c, channels, 7, 7, dtype=dtype),
        "bias": _meta(c, dtype=dtype),
        "position": _meta(1, words, c, dtype=dtype),
        "patch_h": patch,
        "patch_w": patch,
        "stride": stride,
        "legacy": legacy,
    }


def _add_layer_norm(dtype: torch.dtype, d: int) -> dict[str, Any]:
    x = _meta(*TOKENS, d, dtype=dtype)
    return {"x": x, "y": x, "weight": _meta(d, dtype=dtype), "bias": _meta(d, dtype=dtype)}


ARGUMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "inner_block": _inner_block,
    "inner_attention": _inner_attention,
    "inner_mlp": _inner_mlp,
    "word_to_sentence": _word_to_sentence,
    "outer_block": _outer_block,
    "pixel_embed": _pixel_embed,
    "outer_block_train": _outer_block,
    "add_layer_norm": _add_layer_norm,
}
OUTER = frozenset({"outer_block", "outer_block_train", "add_layer_norm"})


def _both(op: str, *, odd: bool = False, **sizes: Any) -> Iterator[KernelCase]:
    yield KernelCase(op, sizes, odd=odd)
    yield KernelCase(op, sizes, backward=True, odd=odd)


CASES: tuple[KernelCase, ...] = (
    *_both("inner_block", c=12, heads=2),
    *_both("inner_block", c=24, heads=4),
    *_both("inner_block", c=40, heads=4),
    *_both("inner_block", c=48, heads=4),
    *_both("inner_block", c=24, heads=4, s=196),
    *_both("inner_block", c=40, heads=4, s=196),
    *_both("inner_block", c=24, heads=4, drop_path=True),
    *_both("inner_block", c=10, heads=5, m=9, odd=True),
    *_both("inner_block", c=64, heads=2, m=64, odd=True),
    *_both("inner_attention", c=24, heads=4, odd=True),
    *_both("inner_mlp", c=24, odd=True),
    *_both("word_to_sentence", d=192, c=12),
    *_both("word_to_sentence", d=384, c=24),
    *_both("word_to_sentence", d=640, c=40),
    *_both("word_to_sentence", d=768, c=48),
    *_both("word_to_sentence", d=1024, c=64, odd=True),
    *_both("word_to_sentence", d=384, c=24, legacy=True, odd=True),
    *_both("outer_block", d=192, heads=3),
    *_both("outer_block", d=384, heads=6),
    *_both("outer_block", d=640, heads=10),
    *_both("outer_block", d=384, heads=6, drop_path=True, odd=True),
    *_both("pixel_embed", c=12),
    *_both("pixel_embed", c=24),
    *_both("pixel_embed", c=40),
    *_both("pixel_embed", c=48),
    *_both("pixel_embed", c=24, legacy=True, odd=True),
    *_both("pixel_embed", c=70, channels=5, patch=14, stride=3, odd=True),
    *_both("outer_block", d=1536, heads=24, odd=True),
    KernelCase("outer_block", {"d": 384, "heads": 6}, backward=True, odd=True, only="fc2_weight"),
    KernelCase("outer_block_train", {"d": 384, "heads": 6}),
    KernelCase("outer_block_train", {"d": 640, "heads": 10}),
    KernelCase("add_layer_norm", {"d": 384}, odd=True),
)


def cases() -> list[KernelCase]:
    """The cases whose operators have kernels."""
    return [case for case in CASES if all(op in triton_backend.LAUNCHERS for op in case.launchers)]


def of_model(case: KernelCase) -> bool:
    """Whether a case is a layer of TNT-S or TNT-B, at a large batch and without drop path."""
    sizes = case.sizes
    if case.odd or case.op not in ("pixel_embed", "inner_block", "word_to_sentence", "outer_block"):
        return False
    if set(sizes) - {"c", "d", "heads"}:
        return False
    return sizes.get("c", 24) in (24, 40) and sizes.get("d", 384) in (384, 640)
