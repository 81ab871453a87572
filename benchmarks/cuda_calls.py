"""Calls every CUDA kernel of the native module at small sizes, for compute-sanitizer to look on.

    compute-sanitizer --tool memcheck python benchmarks/cuda_calls.py

Nothing else runs on the GPU but copies: what is reported is the kernels' own. Exit status: 0, 1 where a value
is not finite, 2 without a GPU that they run on.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
from torch import Tensor

from tnt_kernels import gpu
from tnt_kernels.backends import cuda

# Batch, channels, patches down and across, patch, stride, kernel, c, legacy. The first ones have TNT's shape.
SHAPES = [
    *((2, 3, (1, 3), (16, 16), 4, 7, c, legacy) for c in (12, 24, 40, 48) for legacy in (False, True)),
    (3, 4, (2, 1), (14, 14), 7, 7, 24, False),
    (2, 5, (1, 2), (6, 9), 4, 3, 37, False),
    (2, 1, (2, 2), (8, 8), 2, 5, 70, True),
]
LAYOUTS = ("contiguous", "channels_last", "misaligned")
# Of the image, of the parameters, of the products; TF32 or not.
PRECISIONS = [
    (torch.float32, torch.float32, None, False),
    (torch.float32, torch.float32, None, True),
    (torch.float32, torch.float32, torch.bfloat16, False),
    (torch.bfloat16, torch.bfloat16, None, False),
    (torch.float16, torch.float16, None, False),
    (torch.uint8, torch.float32, None, False),
    (torch.uint8, torch.bfloat16, None, False),
]


def main() -> int:
    why = gpu.why_no_cuda(0)
    if why is not None:
        print(f"cuda_calls: {why}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    wrong = calls = 0
    for shape, layout, precision in itertools.product(SHAPES, LAYOUTS, PRECISIONS):
        calls += 1
        if not all(bool(value.isfinite().all()) for value in call(shape, layout, *precision)):
            print(f"not finite: {shape} {layout} {precision}", file=sys.stderr)
            wrong += 1
    print(f"{calls} calls, {wrong} with values that are not finite")
    return 1 if wrong else 0


def call(
    shape: tuple[Any, ...],
    layout: str,
    image_dtype: torch.dtype,
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None,
    tf32: bool,
) -> list[Tensor]:
    """The result and all gradients, on the CPU."""
    batch, channels, (rows, columns), patch, stride, kernel, c, legacy = shape
    m = -(-patch[0] // stride) * -(-patch[1] // stride)
    image = torch.randn(batch, channels, rows * patch[0], columns * patch[1])
    statistics: tuple[Any, Any] = (None, None)
    if image_dtype == torch.uint8:
        image, statistics = 255 * image.sigmoid(), ([0.5] * channels, [0.2] * channels)
    weight = torch.randn(c, channels, kernel, kernel) * (channels * kernel**2) ** -0.5
    parameters = (weight, torch.randn(c), torch.randn(1, m, c))
    tensors = [placed(image, layout, image_dtype), *(placed(t, layout, dtype) for t in parameters)]
    grad = placed(torch.randn(batch * rows * columns, m, c), layout, dtype)
    options = (*patch, stride, legacy, compute_dtype, *statistics)
    needed = [image_dtype != torch.uint8, True, True, True]
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        out = cuda.pixel_embed(*tensors, *options)
        gradients = cuda.pixel_embed_backward(grad, needed, *tensors, *options)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    return [value.cpu() for value in (out, *gradients)]


def placed(tensor: Tensor, layout: str, dtype: torch.dtype) -> Tensor:
    """The tensor on the GPU; it is arranged on the CPU, so that a copy is all that the GPU sees."""
    tensor = tensor.to(dtype)
    if layout == "channels_last" and tensor.dim() == 4 and tensor.shape[1] > 1:
        return tensor.to(memory_format=torch.channels_last).cuda()
    if layout == "misaligned":
        flat = torch.cat([tensor.new_zeros(1), tensor.flatten()]).cuda()
        return flat[1:].view(tensor.shape)
    return tensor.cuda()


if __name__ == "__main__":
    sys.exit(main())
