"""Operators against their baselines: eager PyTorch, torch.compile, this package, and each SIMD tier of it.

Forward alone, or with the gradients of all inputs and parameters.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tnt_kernels import gpu, native, ops, outer
from tnt_kernels.bench.accuracy import Gradients, Result
from tnt_kernels.bench.cases import (
    Baseline,
    NotRunError,
    Runner,
    check_device,
    check_dtype,
    compiled,
    device_type,
    torch_call,
)
from tnt_kernels.bench.gradients import by_size
from tnt_kernels.bench.sizes import IMAGE_SIZE, SENTENCES, WORDS, Size, size_of
from tnt_kernels.dispatch import CUDA_OPS, use_backend

Arguments = tuple[tuple[Tensor | None, ...], dict[str, Any]]


class _Draw:
    """Seeded float32 tensors whose scale is that of a trained model: no bias is zero and no gain is one."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def values(self, *shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=self.generator) * std + mean

    def norm(self, width: int) -> tuple[Tensor, Tensor]:
        return self.values(width, std=0.1, mean=1.0), self.values(width, std=0.1)

    def linear(self, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        return self.values(outputs, inputs, std=inputs**-0.5), self.values(outputs, std=0.1)

    def attention(self, width: int) -> tuple[Tensor | None, ...]:
        qk, _ = self.linear(2 * width, width)
        v, _ = self.linear(width, width)
        return (qk, None, v, None, *self.linear(width, width))

    def mlp(self, width: int) -> tuple[Tensor, ...]:
        return (*self.linear(4 * width, width), *self.linear(width, 4 * width))


def _pixel_embed(size: Size, batch: int, draw: _Draw, legacy: bool = False) -> Arguments:
    image = draw.values(batch, 3, IMAGE_SIZE, IMAGE_SIZE)
    weight, bias = draw.values(size.inner, 3, 7, 7, std=147**-0.5), draw.values(size.inner, std=0.1)
    position = draw.values(1, WORDS, size.inner, std=0.5)
    return (image, weight, bias, position), {"patch_size": 16, "stride": 4, "legacy": legacy}


def _words(size: Size, batch: int, draw: _Draw) -> Tensor:
    return draw.values(batch * SENTENCES, WORDS, size.inner)


def _inner_block(size: Size, batch: int, draw: _Draw) -> Arguments:
    c = size.inner
    weights = (*draw.norm(c), *draw.attention(c), *draw.norm(c), *draw.mlp(c))
    return (_words(size, batch, draw), *weights), {"num_heads": size.inner_heads}


def _inner_attention(size: Size, batch: int, draw: _Draw) -> Arguments:
    c = size.inner
    weights = (*draw.norm(c), *draw.attention(c))
    return (_words(size, batch, draw), *weights), {"num_heads": size.inner_heads}


def _inner_mlp(size: Size, batch: int, draw: _Draw) -> Arguments:
    return (_words(size, batch, draw), *draw.norm(size.inner), *draw.mlp(size.inner)), {}


def _word_to_sentence(size: Size, batch: int, draw: _Draw, legacy: bool = False) -> Arguments:
    words, tokens = _words(size, batch, draw), draw.values(batch, SENTENCES + 1, size.outer)
    width = WORDS * size.inner
    weight, bias = draw.linear(size.outer, width)
    if legacy:
        return (words, tokens, *draw.norm(size.inner), weight, bias, None, None), {}
    return (words, tokens, *draw.norm(width), weight, None, *draw.norm(size.outer)), {}


def _outer_block(size: Size, batch: int, draw: _Draw) -> Arguments:
    d = size.outer
    weights = (*draw.norm(d), *draw.attention(d), *draw.norm(d), *draw.mlp(d))
    options = {
        "num_heads": size.outer_heads,
        "scale": (d // size.outer_heads) ** -0.5,
        "eps1": 1e-5,
        "eps2": 1e-5,
    }
    return (draw.values(batch, SENTENCES + 1, d), *weights), options


@dataclass(frozen=True)
class Op:
    function: Callable[..., Tensor]
    arguments: Callable[[Size, int, _Draw], Arguments]


OPS: dict[str, Op] = {
    "pixel_embed": Op(ops.pixel_embed, _pixel_embed),
    "pixel_embed_legacy": Op(ops.pixel_embed, functools.partial(_pixel_embed, legacy=True)),
    "inner_block": Op(ops.inner_block, _inner_block),
    "inner_attention": Op(ops.inner_attention, _inner_attention),
    "inner_mlp": Op(ops.inner_mlp, _inner_mlp),
    "word_to_sentence": Op(ops.word_to_sentence, _word_to_sentence),
    "word_to_sentence_legacy": Op(ops.word_to_sentence, functools.partial(_word_to_sentence, legacy=True)),
    "outer_block": Op(outer.outer_block, _outer_block),
}


def arguments(
    op: str, model: str, batch: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Arguments:
    """Tensors (positional) and options (keywords) of one call; the values are the same in every dtype."""
    tensors, options = OPS[op].arguments(size_of(model), batch, _Draw(seed=0))
    return tuple(None if t is None else t.to(device, dtype) for t in tensors), options


class Backward:
    """Forward and backward pass of an operator: gradients of all its tensors, for a seeded upstream gradient.

    tensors, options: arguments of a call; dtype: what the upstream gradient is rounded to.
    """

    def __init__(
        self, function: Callable[..., Tensor], tensors: Sequence[Tensor | None], options: dict[str, Any],
        dtype: torch.dtype, autocast: bool = False,
    ) -> None:  # fmt: skip
        self.function = functools.partial(function, **options)
        self.tensors = [None if t is None else t.detach().requires_grad_() for t in tensors]
        self.autocast = autocast
        self.wanted = [t for t in self.tensors if t is not None]
        with torch.no_grad():
            out = self.forward()
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device)
        self.upstream = upstream.to(dtype).to(out.dtype)

    def forward(self) -> Tensor:
        with torch.autocast(device_type(self.tensors), torch.bfloat16, enabled=self.autocast):
            return self.function(*self.tensors)

    def gradients(self) -> tuple[Tensor, ...]:
        """Of the tensors that are there, in their order."""
        return torch.autograd.grad(self.forward(), self.wanted, self.upstream)

    def result(self, op: str) -> Gradients:
        """Gradients in the groups that they are judged by."""
        names = inspect.signature(OPS[op].function).parameters
        given = [name for name, t in zip(names, self.tensors, strict=False) if t is not None]
        return by_size(dict(zip(given, self.gradients(), strict=True)))


@functools.lru_cache(maxsize=2)
def exact(op: str, model: str, batch: int, backward: bool = False, device: str = "cpu") -> Result:
    """The result in float64, or the gradients."""
    tensors, options = arguments(op, model, batch, torch.float64, device)
    with use_backend("reference"):
        if backward:
            return Backward(OPS[op].function, tensors, options, torch.float32).result(op)
        with torch.inference_mode():
            return OPS[op].function(*tensors, **options)


@contextlib.contextmanager
def forced_tier(tier: str) -> Iterator[None]:
    """Force a SIMD tier of the native module inside. Raises NotRunError where it is missing or unusable."""
    module = native.load()
    if module is None:
        raise NotRunError(str(native.why_missing()))
    why = dict(module.tiers()).get(tier, "not built")
    if why:
        raise NotRunError(f"SIMD tier {tier}: {why}")
    before = module.tier()
    module.set_tier(tier)
    try:
        yield
    finally:
        module.set_tier(before)


@dataclass(frozen=True)
class OpCase:
    """One operator at the shapes of a model: 196 sentences of 16 words per image, 224 px.

    dtype float32, or bfloat16: autocast over float32 tensors. backward: with the gradients of all tensors.
    device: "cpu" or "cuda", the current GPU.
    """

    op: str
    model: str
    batch: int
    dtype: str = "float32"
    backward: bool = False
    device: str = "cpu"

    kind = "op"
    unit = "images/s"

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ValueError(f"op must be one of {', '.join(OPS)}, got {self.op!r}")
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        size_of(self.model)
        check_dtype(self.dtype)
        check_device(self.device)

    @property
    def title(self) -> str:
        size, what = size_of(self.model), f"{self.op}{', forward + backward' * self.backward}"
        return f"{what}, {size.title} (c={size.inner}, d={size.outer}), batch {self.batch}, {self.dtype}"

    @property
    def items(self) -> int:
        return self.batch

    def fields(self) -> dict[str, Any]:
        return asdict(self)

    def baselines(self) -> Mapping[str, Baseline]:
        return BASELINES

    def exact(self, family: str) -> Result:
        return exact(self.op, self.model, self.batch, self.backward, self.device)

    def eager(self, family: str) -> Result:
        runner = _eager(self, Path())
        return (runner.result or runner.call)()

    def checked(self, result: Result) -> Result:
        return result


def _runner(case: OpCase, function: Callable[..., Tensor], backend: str, tier: str | None = None) -> Runner:
    tensors, options = arguments(case.op, case.model, case.batch, device=case.device)
    precision = check_dtype(case.dtype)

    def on_path(once: Callable[[], Any]) -> Any:
        with use_backend(backend), forced_tier(tier) if tier else contextlib.nullcontext():
            return once()

    if case.backward:
        autocast = precision is torch.bfloat16
        backward = on_path(lambda: Backward(function, tensors, options, torch.float32, autocast))
        return Runner(
            lambda: on_path(backward.gradients),
            precision,
            result=lambda: on_path(lambda: backward.result(case.op)),
        )
    once = torch_call(functools.partial(function, **options), tensors, case.dtype)
    if tier:
        on_path(once)
    return Runner(lambda: on_path(once), precision)


def _eager(case: OpCase, artifacts: Path) -> Runner:
    return _runner(case, OPS[case.op].function, "reference")


def _compiled(case: OpCase, artifacts: Path) -> Runner:
    return _runner(case, compiled(OPS[case.op].function), "reference")


def _fast(case: OpCase, artifacts: Path) -> Runner:
    if case.device == "cuda":
        best = "cuda" if _why_not("cuda", case) is None else "triton"
        return _on_gpu(best)(case, artifacts)
    why = native.why_missing()
    if why is not None:
        raise NotRunError(why)
    return _runner(case, OPS[case.op].function, "cpu")


def _why_not(backend: str, case: OpCase) -> str | None:
    """Why a backend for GPUs does not run a case, or None."""
    if case.device != "cuda":
        return f"the {backend} backend is for GPUs"
    if backend == "triton":
        return gpu.why_unusable(0)
    op = OPS[case.op].function.__name__
    return gpu.why_no_cuda(0) if op in CUDA_OPS else f"the cuda backend has no kernel for {op}"


def _on_gpu(backend: str) -> Callable[[OpCase, Path], Runner]:
    def build(case: OpCase, artifacts: Path) -> Runner:
        why = _why_not(backend, case)
        if why is not None:
            raise NotRunError(why)
        return _runner(case, OPS[case.op].function, backend)

    return build


def _tier(tier: str) -> Callable[[OpCase, Path], Runner]:
    def build(case: OpCase, artifacts: Path) -> Runner:
        if case.device != "cpu":
            raise NotRunError("SIMD tiers are the CPU's")
        return _runner(case, OPS[case.op].function, "cpu", tier)

    return build


TIERS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")
BASELINES: dict[str, Baseline] = {
    b.name: b
    for b in (
        Baseline("eager", "eager PyTorch", _eager),
        Baseline("compile", "torch.compile", _compiled),
        Baseline("fast", "tnt_kernels", _fast, ours=True),
        Baseline("cuda", "tnt_kernels, CUDA C++", _on_gpu("cuda"), ours=True),
        Baseline("triton", "tnt_kernels, Triton", _on_gpu("triton"), ours=True),
        *(Baseline(f"tier_{tier}", f"tnt_kernels, {tier}", _tier(tier), ours=True) for tier in TIERS),
    )
}
DEFAULT_NAMES = ("eager", "compile", "fast")
GPU_NAMES = ("eager", "compile", "cuda", "triton")
CPU_NAMES = (*DEFAULT_NAMES, *(f"tier_{tier}" for tier in TIERS))
