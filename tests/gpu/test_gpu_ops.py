"""Every operation on the GPU: as accurate as eager PyTorch against float64, the same bits every run."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import (
    DEVICE,
    RUNS,
    USUAL_RUNS,
    eager_and_exact,
    exactly,
    make,
    our_gradients,
    ours,
    plain_gradients,
    upstream,
)
from gradients import assert_gradients_as_accurate
from oracle import PRECISIONS, assert_as_accurate, assert_same_special_values


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("case", "backend"), RUNS)
def test_forward(case: str, backend: str, precision: str) -> None:
    dtype, autocast = PRECISIONS[precision]
    op, given = make(case, dtype)
    eager, exact = eager_and_exact(op, given, autocast)
    out = ours(op, given, autocast, backend)
    assert out.dtype == eager.dtype
    assert out.device.type == DEVICE
    assert out.is_contiguous()
    assert_as_accurate(out, eager, exact, what=case)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("case", "backend"), RUNS)
def test_gradients(case: str, backend: str, precision: str) -> None:
    dtype, autocast = PRECISIONS[precision]
    op, given = make(case, dtype)
    grad = upstream(op, given)
    assert_gradients_as_accurate(
        our_gradients(op, given, grad, autocast, backend),
        plain_gradients(op, given, grad, autocast),
        plain_gradients(op, exactly(given), grad.double()),
    )


@pytest.mark.parametrize("precision", ["float32", "autocast_bfloat16"])
@pytest.mark.parametrize(("case", "backend"), USUAL_RUNS)
def test_the_same_bits_every_run(case: str, backend: str, precision: str) -> None:
    dtype, autocast = PRECISIONS[precision]
    op, given = make(case, dtype)
    grad = upstream(op, given)
    out = ours(op, given, autocast, backend)
    found = our_gradients(op, given, grad, autocast, backend)
    for _ in range(3):
        assert torch.equal(ours(op, given, autocast, backend), out)
        for name, gradient in our_gradients(op, given, grad, autocast, backend).items():
            assert torch.equal(gradient, found[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("case", "backend"), USUAL_RUNS)
def test_special_values_stand_where_eager_has_them(case: str, backend: str, value: float) -> None:
    op, given = make(case)
    name = next(name for name in ("x", "words", "tokens", "image") if name in given)
    given[name][1, 1, 1] = value
    eager, _ = eager_and_exact(op, given)
    assert eager.isnan().any()
    assert_same_special_values(ours(op, given, backend=backend), eager)


@pytest.mark.parametrize(("case", "backend"), USUAL_RUNS)
def test_any_strides(case: str, backend: str) -> None:
    op, given = make(case)
    strided = {
        name: value.repeat_interleave(2, 0)[::2] if isinstance(value, torch.Tensor) else value
        for name, value in given.items()
    }
    assert not all(value.is_contiguous() for value in strided.values() if isinstance(value, torch.Tensor))
    assert torch.equal(ours(op, strided, backend=backend), ours(op, given, backend=backend))


@pytest.mark.parametrize(
    ("case", "backend"), [run for run in USUAL_RUNS if run[0] in ("inner_block c=24", "pixel_embed c=24")]
)
def test_tf32_is_torchs_switch(case: str, backend: str) -> None:
    op, given = make(case)
    exact = eager_and_exact(op, given)[1]
    errors = []
    for allowed in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        try:
            errors.append((ours(op, given, backend=backend).double() - exact).abs().max().item())
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
    assert errors[0] < 1e-5 < errors[1] < 1e-1, errors
