"""Streams, several GPUs, bad input, no memory left."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import DEVICE, USUAL, USUAL_RUNS, make, our_gradients, ours, public, upstream
from oracle import on_device

from tnt_kernels.dispatch import can_run_triton, choose


@pytest.mark.parametrize(("case", "backend"), USUAL_RUNS)
def test_kernels_go_to_the_current_stream(case: str, backend: str) -> None:
    op, given = make(case)
    expected, first = ours(op, given, backend=backend), next(iter(given))
    stream = torch.cuda.Stream()
    late = torch.zeros_like(given[first])
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a kernel on another stream would read the zeros
        late.copy_(given[first])
        out = ours(op, {**given, first: late}, backend=backend)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize(("case", "backend"), USUAL_RUNS)
def test_several_gpus_in_one_process(case: str, backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    op, given = make(case)
    there = on_device(given, "cuda:1")
    grad = upstream(op, given)
    assert torch.cuda.current_device() == 0
    out = ours(op, there, backend=backend)
    assert out.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(out.to("cuda:0"), ours(op, given, backend=backend))
    here = our_gradients(op, given, grad, backend=backend)
    found = our_gradients(op, there, grad.to("cuda:1"), backend=backend)
    for name, gradient in found.items():
        assert torch.equal(gradient.to("cuda:0"), here[name]), name


@pytest.mark.parametrize("case", USUAL)
def test_tensors_on_different_devices_are_refused(case: str) -> None:
    op, given = make(case)
    others = ["cpu"] + ["cuda:1"] * (torch.cuda.device_count() > 1)
    for name in ("norm1_weight", "norm_weight", "bias"):
        for other in others if given.get(name) is not None else ():
            with pytest.raises((TypeError, ValueError), match=rf"{name}.*{other}"):
                public(op)(**{**given, name: given[name].to(other)})


def test_out_of_memory_is_torchs_own_error() -> None:
    op, given = make("inner_block c=24")
    expected = ours(op, given)
    sentences = torch.cuda.get_device_properties(0).total_memory // (16 * 24 * 4) + 1
    with pytest.raises(torch.OutOfMemoryError):
        ours(op, {**given, "x": given["x"][:1].expand(sentences, 16, 24)})
    assert torch.equal(ours(op, given), expected)  # nothing is left broken


def test_more_words_than_the_kernels_take() -> None:
    x = torch.randn(3, 65, 24, device=DEVICE)
    assert "65 words" in str(can_run_triton("inner_block", x))
    assert choose("inner_block", x) == "reference"
