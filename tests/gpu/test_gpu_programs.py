"""Operations inside CUDA graphs, torch.compile, torch.export and AOTInductor packages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_cases import USUAL_RUNS, make, our_gradients, ours, public, upstream
from gradients import tensors_of
from oracle import assert_as_accurate
from torch import Tensor, nn

from tnt_kernels.dispatch import use_backend


@pytest.fixture(autouse=True)
def _forced(backend: str) -> Iterator[None]:
    with use_backend(backend):
        yield


class Called(nn.Module):
    """An operation as a module: its first tensor is the input, the other ones are parameters."""

    def __init__(self, op: str, given: dict[str, Any]) -> None:
        super().__init__()
        self.op, self.first, self.options = op, next(iter(given)), {}
        for name, value in given.items():
            if isinstance(value, Tensor) and name != self.first:
                self.register_parameter(name, nn.Parameter(value))
            elif name != self.first:
                self.options[name] = value

    def forward(self, x: Tensor) -> Tensor:
        return public(self.op)(**{self.first: x}, **dict(self.named_parameters()), **self.options)


def called(case: str) -> tuple[Called, Tensor, dict[str, Any]]:
    op, given = make(case)
    return Called(op, given), next(iter(given.values())), given


@pytest.mark.parametrize(("case", "backend"), USUAL_RUNS)
def test_a_graph_sees_new_inputs_and_new_weights(case: str, backend: str) -> None:
    op, given = make(case)
    first = next(iter(given))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            ours(op, given, backend=backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ours(op, given, backend=backend)
    weight = next(name for name in ("weight", "fc1_weight", "qk_weight") if name in given)
    for changed in (first, weight):
        with torch.no_grad():
            given[changed].copy_(torch.randn_like(given[changed]) * 0.1)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, ours(op, given, backend=backend)), f"replayed with another {changed}"


@pytest.mark.parametrize(("case", "backend"), USUAL_RUNS)
def test_a_captured_training_step(case: str, backend: str) -> None:
    module, x, given = called(case)
    grad = upstream(module.op, given)
    expected = our_gradients(module.op, given, grad, backend=backend)
    graphed = torch.cuda.make_graphed_callables(module, (x.clone().requires_grad_(),))
    inputs = x.clone().requires_grad_()
    graphed(inputs).backward(grad)
    assert torch.equal(inputs.grad, expected[module.first])
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize(("case", "backend"), USUAL_RUNS)
def test_compile(case: str, backend: str, mode: str | None) -> None:
    module, x, given = called(case)
    grad = upstream(module.op, given)
    expected = ours(module.op, given, backend=backend)
    expected_gradients = our_gradients(module.op, given, grad, backend=backend)
    compiled = torch.compile(module, fullgraph=True, mode=mode)
    for _ in range(3):  # the first calls of reduce-overhead record
        torch.compiler.cudagraph_mark_step_begin()
        inputs = x.clone().requires_grad_()
        out = compiled(inputs)
        torch.testing.assert_close(out, expected)
        found = torch.autograd.grad(out, [inputs, *module.parameters()], grad)
        names = [module.first, *(name for name, _ in module.named_parameters())]
        assert set(names) == set(tensors_of(given))
        for name, gradient in zip(names, found, strict=True):
            torch.testing.assert_close(gradient, expected_gradients[name])


@pytest.mark.parametrize(("case", "backend"), USUAL_RUNS)
def test_export(case: str, backend: str) -> None:
    module, x, given = called(case)
    with torch.no_grad():
        program = torch.export.export(module, (x,))
        targets = {str(node.target) for node in program.graph.nodes}
        assert any("tnt_kernels" in target for target in targets), targets
        assert torch.equal(program.module()(x), ours(module.op, given, backend=backend))


@pytest.mark.parametrize(("case", "backend"), USUAL_RUNS)
def test_aot_inductor_package(case: str, backend: str, tmp_path: Path) -> None:
    module, x, given = called(case)
    with torch.no_grad():
        program = torch.export.export(module, (x,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "op.pt2"))
        out = torch._inductor.aoti_load_package(path)(x)
    expected = ours(module.op, given, backend=backend)
    assert_as_accurate(out, expected, expected.double(), ratio=1.0, floor=1e-5)
