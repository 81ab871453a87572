"""How launchers run kernels, on a kernel that scales a vector."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_kernels.backends.triton import runtime
from tnt_kernels.backends.triton.configs import Config

CONFIG = Config(rows=8, warps=2)


@triton.jit
def _scale_kernel(
    x_ptr,  # [n]
    out_ptr,  # [n]
    factor,
    n,
    ROWS: tl.constexpr,
):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(out_ptr + i, tl.load(x_ptr + i, i < n) * factor, i < n)


def scale(x: Tensor, factor: Any) -> Tensor:
    out = torch.empty_like(x)
    arguments = {"x_ptr": x, "out_ptr": out, "factor": factor, "n": x.numel()}
    runtime.launch(_scale_kernel, (triton.cdiv(x.numel(), 8),), arguments, {"ROWS": CONFIG.rows}, CONFIG)
    return out


def test_a_kernel_runs_on_cpu_tensors() -> None:
    assert runtime.in_interpreter()
    x = torch.randn(19)
    assert torch.equal(scale(x, 3.0), 3.0 * x)


def test_what_is_never_written_stays_nan() -> None:
    assert torch.empty(4).isnan().all()


def test_an_error_names_kernel_shapes_and_device() -> None:
    with pytest.raises(RuntimeError, match=r"kernel _scale_kernel failed on cpu with x_ptr \[3, 5\] float32"):
        scale(torch.ones(3, 5), "no number")


def test_recording_runs_nothing() -> None:
    x = torch.ones(19, device="meta")
    with runtime.recording(80) as launches:
        assert runtime.architecture(x.device) == 80
        scale(x, 3.0)
    (launch,) = launches
    assert (launch.kernel, launch.grid, launch.config) == (_scale_kernel, (3,), CONFIG)
    assert launch.arguments["x_ptr"] is x
    assert launch.constants == {"ROWS": 8}
    assert torch.equal(scale(torch.ones(3), 2.0), torch.full((3,), 2.0))  # afterwards kernels run again


def test_tf32_is_torchs_switch() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision, expected in (("tf32", "tf32"), ("ieee", "tf32x3")):
            matmul.fp32_precision = precision
            assert runtime.dot_precision(torch.float32) == expected
            assert runtime.dot_precision(torch.bfloat16) == "tf32x3"
    finally:
        matmul.fp32_precision = before
