"""Whole models on the GPU: FastTNT and accelerated models against eager PyTorch and float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import DEVICE
from model_cases import AUTHORS, images, make
from oracle import assert_as_accurate
from torch import Tensor

import tnt_kernels
from tnt_kernels import FastTNT
from tnt_kernels.bench.accuracy import as_accurate_as_eager
from tnt_kernels.bench.training import step_gradients
from tnt_kernels.models.tnt import TNT

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def reference(**kwargs: Any) -> Any:
    return make("authors", **kwargs).to(DEVICE)


def fast(model: Any) -> Any:
    return FastTNT.from_reference(copy.deepcopy(model).cpu()).to(DEVICE)


def answer(model: Any, x: Tensor, autocast: torch.dtype | None) -> Tensor:
    enabled = autocast is not None
    with torch.inference_mode(), torch.autocast(DEVICE, autocast or torch.bfloat16, enabled=enabled):
        return model(x)


def batch_of(images_: int = 64) -> Tensor:
    return images(images_).to(DEVICE)


@pytest.mark.parametrize("precision", AUTOCAST)
def test_inference(precision: str) -> None:
    model, x = reference(num_classes=200), batch_of()
    eager = answer(model, x, AUTOCAST[precision])
    exact = answer(copy.deepcopy(model).double(), x.double(), None)
    for name, ours in (
        ("FastTNT", fast(model)),
        ("accelerate", tnt_kernels.accelerate(copy.deepcopy(model))),
    ):
        assert_as_accurate(answer(ours.eval(), x, AUTOCAST[precision]), eager, exact, what=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inference_of_a_model_in_half_precision(dtype: torch.dtype) -> None:
    model, x = reference(num_classes=200).to(dtype), batch_of().to(dtype)
    exact = answer(copy.deepcopy(model).double(), x.double(), None)
    assert_as_accurate(answer(fast(model).eval(), x, None), answer(model, x, None), exact)


def test_explain_says_triton() -> None:
    model = fast(reference()).eval()
    with torch.inference_mode():
        found = tnt_kernels.explain(model)
    inner = [part for part in found.parts if part.part in ("inner half", "projection", "outer half")]
    assert inner
    assert {part.runs for part in inner} == {"triton"}, found


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_a_training_step(dtype: str, drop_path: float) -> None:
    """dtype as the benchmarks have it: bfloat16 is autocast over float32 parameters."""
    sizes = {name: value for name, value in AUTHORS.items() if name != "depth"}
    model = TNT(**sizes, depth=3, drop_path_rate=drop_path).to(DEVICE)
    x, label = batch_of(32), torch.randint(7, (32,), device=DEVICE)
    double = copy.deepcopy(model).double()
    exact = step_gradients(double, double, x.double(), label, "float32")
    eager = step_gradients(model, model, x, label, dtype)
    ours = fast(model)
    found = as_accurate_as_eager(step_gradients(ours, ours, x, label, dtype), eager, exact)
    assert found.passed, found


def test_training_follows_eager() -> None:
    model, x = reference(), batch_of(16)
    label = torch.randint(7, (16,), device=DEVICE)
    histories = []
    for network in (model, fast(model)):
        network.train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
        losses = []
        for _ in range(10):
            loss = F.cross_entropy(network(x), label)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        histories.append(torch.tensor(losses))
    assert histories[0][-1] < histories[0][0]
    torch.testing.assert_close(histories[1], histories[0], rtol=1e-2, atol=1e-3)


def test_a_graph_of_the_model() -> None:
    model, x = fast(reference()).eval(), batch_of(4)
    with torch.inference_mode():
        expected = model(x)
        static = torch.zeros_like(x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                model(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(static)
        static.copy_(x)
        graph.replay()
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compile(mode: str | None) -> None:
    model, x = fast(reference()).eval(), batch_of(4)
    with torch.inference_mode():
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
