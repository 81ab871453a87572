"""A kernel that does next to nothing: whether it runs tells whether Triton works on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tnt_kernels.backends.triton.runtime import on_device


@triton.jit
def _probe(out_ptr):  # type: ignore[no-untyped-def]
    tl.store(out_ptr, 1)


def run(device: int) -> None:
    """Compiles and launches the kernel on GPU number `device`; raises whatever goes wrong."""
    with on_device(torch.device("cuda", device)):
        out = torch.empty(1, dtype=torch.int32, device="cuda")
        _probe[(1,)](out)
