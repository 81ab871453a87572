"""The CUDA backend: registered operators on the kernels for NVIDIA GPUs of ``tnt_kernels._native``.

Where those cannot run, or Triton is asked for, the operators run on Triton's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tnt_kernels import _checks, dispatch, gpu, native
from tnt_kernels._ops import lib
from tnt_kernels.backends import reference, triton

__all__ = ["pixel_embed", "pixel_embed_backward"]

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}  # of the native module


def _runs(image: Tensor, out_dtype: torch.dtype) -> bool:
    """Whether the call is for these kernels."""
    if dispatch.requested_anywhere() == "triton" or out_dtype not in CODES or image.dtype not in CODES:
        return False
    cuda = native.cuda()
    if cuda is None or gpu.why_no_cuda(image.device.index or 0) is not None:
        return False
    return image.dtype != torch.uint8 or image.shape[1] <= cuda.most_byte_channels


@contextlib.contextmanager
def _stream_of(device: torch.device) -> Iterator[int]:
    """Makes the device current and gives its current stream."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


@contextlib.contextmanager
def _errors_of(op: str, image: Tensor) -> Iterator[None]:
    """Adds to an error of CUDA what was launched, and where."""
    try:
        yield
    except RuntimeError as error:
        shape, dtype = list(image.shape), str(image.dtype).removeprefix("torch.")
        raise RuntimeError(
            f"{op}: the CUDA kernel failed on {image.device} with image {shape} {dtype}: {error}"
        ) from error


def _workspace(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _call(
    image: Tensor,
    parameters: Sequence[Tensor | None],  # weight, bias, position; contiguous
    out: Tensor | None,
    options: tuple[int, int, int, bool],
    dtype: torch.dtype,  # in which it is convolved
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Any:
    """The call as the native module knows it; it holds addresses alone."""
    cuda, weight = native.cuda(), parameters[0]
    assert cuda is not None
    assert weight is not None
    # Of a uint8 image pixel * scale + shift is convolved. Not allow_tf32, which raises once a program has
    # set fp32_precision.
    scale = [1 / (255 * s) for s in std or ()]
    shift = [-m / s for m, s in zip(mean or (), std or (), strict=True)]
    return cuda.PixelEmbed(
        image.data_ptr(), CODES[image.dtype], list(image.stride()), *image.shape,
        [_address(tensor) for tensor in parameters],
        [0 if tensor is None else CODES[tensor.dtype] for tensor in parameters],
        _address(out), 0 if out is None else CODES[out.dtype], CODES[dtype],
        torch.backends.cuda.matmul.fp32_precision == "tf32", weight.shape[0], weight.shape[3], *options,
        scale, shift,
    )  # fmt: skip


def pixel_embed(
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
    parameters, options = (weight, bias, position), (patch_h, patch_w, stride, legacy)
    n, m, c = _checks.check_pixel_embed(image, weight, bias, position, *options, compute_dtype, mean, std)
    out_dtype = reference.pixel_embed_dtype(image, weight, position, compute_dtype)
    if not _runs(image, out_dtype):
        return triton.launcher("pixel_embed")(image, *parameters, *options, compute_dtype, mean, std)
    # Read where it lies, whatever its strides.
    out = image.new_empty((image.shape[0] * n, m, c), dtype=out_dtype)
    held = [None if tensor is None else tensor.contiguous() for tensor in parameters]
    if out.numel() > 0:
        with _stream_of(image.device) as stream, _errors_of("pixel_embed", image):
            dtype = reference.convolution_dtype(image, weight, compute_dtype)
            call = _call(image, held, out, options, dtype, mean, std)
            workspace = _workspace(call.workspace(), image.device)
            call.run(workspace.data_ptr(), stream)
    return out


def pixel_embed_backward(
    grad: Tensor,
    needed: Sequence[bool],
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
) -> list[Tensor]:
    parameters, options = (weight, bias, position), (patch_h, patch_w, stride, legacy)
    n, m, c = _checks.check_pixel_embed(image, weight, bias, position, *options, compute_dtype, mean, std)
    out_dtype = reference.pixel_embed_dtype(image, weight, position, compute_dtype)
    _checks.check_gradient("pixel_embed_backward", grad, (image.shape[0] * n, m, c), out_dtype, image.device)
    if not _runs(image, out_dtype):
        backward = triton.launcher("pixel_embed_backward")
        return backward(grad, needed, image, *parameters, *options, compute_dtype, mean, std)
    cuda = native.cuda()
    assert cuda is not None
    wanted = [tensor if wants else None for wants, tensor in zip(needed, (image, *parameters), strict=True)]
    if image.numel() == 0:
        return [torch.zeros_like(tensor) for tensor in wanted if tensor is not None]
    gradients = [
        None
        if tensor is None
        else image.new_empty(tensor.shape, dtype=image.dtype if i == 0 else torch.float32)
        for i, tensor in enumerate(wanted)
    ]
    grad, held = grad.contiguous(), [weight.contiguous(), None, None]
    with _stream_of(image.device) as stream, _errors_of("pixel_embed_backward", image):
        dtype = reference.convolution_dtype(image, weight, compute_dtype)
        call = _call(image, held, None, options, dtype, mean, std)
        pointers = cuda.PixelEmbedGradients(
            grad.data_ptr(), CODES[grad.dtype], _address(gradients[0]),
            0 if gradients[0] is None else CODES[image.dtype], *map(_address, gradients[1:]),
        )  # fmt: skip
        workspace = _workspace(call.backward_workspace(pointers), image.device)
        call.run_backward(pointers, workspace.data_ptr(), stream)
    return [
        gradient.to(tensor.dtype)
        for gradient, tensor in zip(gradients, wanted, strict=True)
        if gradient is not None and tensor is not None
    ]


for _launcher in (pixel_embed, pixel_embed_backward):
    lib.impl(_launcher.__name__, _launcher, "CUDA")
