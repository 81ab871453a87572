"""Which backend runs an operation.

``TNT_BACKEND`` (read when the package is imported) or :func:`use_backend` force a backend; otherwise
``auto`` takes the fastest one that can run the call. ``reference`` is plain PyTorch: any device,
any floating dtype, differentiable. ``cpu`` is the native module, ``cuda`` its kernels for NVIDIA GPUs (of
pixel_embed alone), ``triton`` the kernels for GPUs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextvars import ContextVar, Token
from types import TracebackType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from tnt_kernels import gpu, native

__all__ = [
    "BACKENDS",
    "backends_for",
    "can_run",
    "can_run_cpu",
    "can_run_triton",
    "choose",
    "over_limits",
    "requested",
    "requested_anywhere",
    "use_backend",
]

BACKENDS = ("reference", "cpu", "cuda", "triton")

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
# Fake and functional tensors stand for plain ones while a program is traced. Any other subclass
# means something to its author that a kernel on raw memory would lose.
_PLAIN = frozenset({Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor})
# Operators that have gradients of their own; the others are recorded through plain PyTorch.
TRAINABLE = frozenset(
    {"inner_attention", "inner_block", "inner_mlp", "outer_block", "pixel_embed", "word_to_sentence"}
)
# Operators with kernels for GPUs, and the limits of those: words in a sentence, channels of a word and of a
# token. `linear` and `layer_norm` are those of the class token alone, which are PyTorch's own on a GPU.
TRITON_OPS = frozenset(
    [
        "add_layer_norm", "inner_attention", "inner_block", "inner_mlp", "outer_block", "pixel_embed",
        "word_to_sentence",
    ]
)  # fmt: skip
MAX_WORDS, MAX_INNER_DIM, MAX_OUTER_DIM, OUTER_DIM_STEP = 64, 64, 1024, 16
CUDA_OPS = frozenset({"pixel_embed"})  # operators with CUDA kernels in the native module

_override: ContextVar[str | None] = ContextVar("tnt_kernels_backend", default=None)
# The same for traced code: Dynamo guards on a module's variables and not on context variables.
_traced_override: str | None = None
_entered: dict[int, str] = {}  # by id of the token that leaves it
_lock = threading.Lock()
_environment = os.environ.get("TNT_BACKEND", "auto").strip().lower() or "auto"


def _check_name(name: str, where: str) -> None:
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"{where} must be one of auto, {', '.join(BACKENDS)}; got {name!r}")


def requested() -> str:
    """Returns the backend asked for: the innermost :func:`use_backend`, else TNT_BACKEND, else "auto".

    Raises:
        ValueError: TNT_BACKEND names no backend.
    """
    name = _traced_override if torch.compiler.is_compiling() else _override.get()
    if name is None:
        name = _environment
        _check_name(name, "TNT_BACKEND")
    return name


def requested_anywhere() -> str:
    """Like :func:`requested`, but what another thread asks for holds where this one asks for nothing.

    For operators, which autograd also runs in threads of its own.
    """
    return _override.get() or _traced_override or requested()


class use_backend:
    """Context manager that forces a backend for the calls of this thread (or task) made inside it.

    Args:
        name: "auto", "reference", "cpu", "cuda" or "triton". A forced backend that cannot run a call raises
            RuntimeError with the reason; it never falls back.

    Functions compiled by torch.compile follow the choice too, and are compiled again when it changes;
    for them it holds in every thread.
    """

    def __init__(self, name: str) -> None:
        _check_name(name, "use_backend: name")
        self.name = name
        self._tokens: list[Token[str | None]] = []
        self._traced: list[str | None] = []

    def __enter__(self) -> use_backend:
        global _traced_override
        if torch.compiler.is_compiling():
            self._traced.append(_traced_override)
            _traced_override = self.name
            return self
        token = _override.set(self.name)
        self._tokens.append(token)
        with _lock:
            _entered[id(token)] = self.name
            _traced_override = self.name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _traced_override
        if torch.compiler.is_compiling():
            _traced_override = self._traced.pop()
            return
        token = self._tokens.pop()
        with _lock:
            # Threads and tasks leave in any order: what holds is the last one still inside.
            del _entered[id(token)]
            _traced_override = next(reversed(_entered.values()), None)
        _override.reset(token)


def gradient_needed(*tensors: Tensor | None) -> bool:
    """Returns whether autograd would have to record an operation on these tensors."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def backends_for(op: str, tensors: Sequence[Tensor | None]) -> tuple[str, ...]:
    """Returns the backends made for the device of the first tensor, the fastest first."""
    for tensor in tensors:
        if tensor is not None:
            if not getattr(tensor, "is_cuda", False):
                return ("cpu",)
            return ("cuda", "triton") if op in CUDA_OPS else ("triton",)
    return ("cpu",)


def _no_backward(backend: str) -> str:
    return (
        f"a gradient is needed, and the {backend} backend has no backward pass for it (use torch.no_grad())"
    )


def _reason_of_call(
    op: str, backend: str, tensors: Sequence[Tensor | None], needs_grad: bool | None
) -> str | None:
    trainable = op in TRAINABLE
    recording = torch.is_grad_enabled() if needs_grad is None and not trainable else False
    if needs_grad and not trainable:
        return _no_backward(backend)
    if forward_ad._current_level >= 0:
        return "forward-mode automatic differentiation is active"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN:
            return f"an argument is a {type(tensor).__name__}, not a plain tensor"
        if recording and tensor.requires_grad:
            return _no_backward(backend)
        if backend == "cpu":
            if not tensor.is_cpu:
                return f"a tensor is on {tensor.device}, not on the CPU"
        elif not tensor.is_cuda:
            return f"a tensor is on {tensor.device}, not on a GPU"
        if tensor.dtype not in DTYPES and (op, tensor.dtype) != ("pixel_embed", torch.uint8):
            return f"a tensor is of dtype {tensor.dtype}; float32, bfloat16 and float16 are supported"
    if backend == "cuda" and op not in CUDA_OPS:
        return f"the cuda backend has no kernel for {op}"
    return over_limits(op, tensors) if backend == "triton" else None


def over_limits(op: str, tensors: Sequence[Tensor | None]) -> str | None:
    """Why the kernels for GPUs do not take arguments of these sizes, or parameters alone of these."""
    if op not in TRITON_OPS:
        return f"the triton backend has no kernel for {op}"
    first = tensors[0] if tensors else None
    if first is None:
        return None
    if op in ("inner_attention", "inner_block", "inner_mlp"):
        if first.shape[-1] > MAX_INNER_DIM:
            return f"words have {first.shape[-1]} channels; the triton backend takes up to {MAX_INNER_DIM}"
        if first.dim() == 3 and first.shape[1] > MAX_WORDS:
            return f"sentences have {first.shape[1]} words; the triton backend takes up to {MAX_WORDS}"
    elif op == "outer_block":
        if first.shape[-1] > MAX_OUTER_DIM:
            return f"tokens have {first.shape[-1]} channels; the triton backend takes up to {MAX_OUTER_DIM}"
    elif op == "word_to_sentence":
        for tensor in tensors:
            if tensor is not None and tensor.dim() == 2:  # the weight [d, m * c]
                d = tensor.shape[0]
                if d % OUTER_DIM_STEP != 0 or d > MAX_OUTER_DIM:
                    return (
                        f"tokens have {d} channels; the triton backend takes multiples of {OUTER_DIM_STEP} "
                        f"up to {MAX_OUTER_DIM}"
                    )
    return None


def _why_missing(backend: str, tensors: Sequence[Tensor | None]) -> str | None:
    if backend == "cpu":
        return native.why_missing() if native.load() is None else None
    for tensor in tensors:
        if tensor is not None:
            index = tensor.device.index or 0
            return gpu.why_no_cuda(index) if backend == "cuda" else gpu.why_unusable(index)
    return None


def can_run(backend: str, op: str, *tensors: Tensor | None, needs_grad: bool | None = None) -> str | None:
    """Returns None when the backend, "cpu", "cuda" or "triton", can run the call, otherwise why it cannot.

    Args:
        backend: "cpu", "cuda" or "triton".
        op: name of the operation.
        tensors: every tensor argument of the call; None for an absent one.
        needs_grad: whether autograd must record the call; None finds out from the tensors.
    """
    return _reason_of_call(op, backend, tensors, needs_grad) or _why_missing(backend, tensors)


def can_run_cpu(op: str, *tensors: Tensor | None, needs_grad: bool | None = None) -> str | None:
    """:func:`can_run` of the native CPU backend."""
    return can_run("cpu", op, *tensors, needs_grad=needs_grad)


def can_run_triton(op: str, *tensors: Tensor | None, needs_grad: bool | None = None) -> str | None:
    """:func:`can_run` of the Triton backend."""
    return can_run("triton", op, *tensors, needs_grad=needs_grad)


def choose(op: str, *tensors: Tensor | None, needs_grad: bool | None = None) -> str:
    """Returns the backend that runs the call: "cpu", "cuda", "triton" or "reference".

    Args:
        op: name of the operation, for messages.
        tensors: every tensor argument of the call; None for an absent one.
        needs_grad: whether autograd must record the call; None finds out from the tensors.

    Raises:
        RuntimeError: a backend is forced and cannot run the call.
    """
    wanted = requested()
    if wanted == "reference":
        return "reference"
    missing = None
    for backend in backends_for(op, tensors) if wanted == "auto" else (wanted,):
        reason = _reason_of_call(op, backend, tensors, needs_grad)
        if reason is None:
            reason = missing = _why_missing(backend, tensors)
            if reason is None:
                return backend
    if wanted != "auto":
        raise RuntimeError(f"{op}: the {wanted} backend is forced but cannot run this call: {reason}")
    if missing is not None:
        native.warn_once() if backend == "cpu" else gpu.warn_once(missing)
    return "reference"
