"""Whole models through the Triton kernels: the CPU's operators are replaced by the launchers for GPUs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradients import assert_gradients_as_accurate
from model_cases import images, make
from oracle import assert_as_accurate
from torch import Tensor

from tnt_kernels import FastTNT
from tnt_kernels.backends.triton import LAUNCHERS
from tnt_kernels.bench.kernel_cases import launcher


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Names of the operators that were called through the launchers."""
    called: set[str] = set()

    def register(lib: torch.library.Library, op: str) -> None:
        def implementation(*args: Any) -> Any:
            called.add(op)
            return launcher(op)(*args)

        lib.impl(op, implementation, "CPU", allow_override=True)

    with torch.library._scoped_library("tnt_kernels", "IMPL") as lib, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that an implementation is replaced
        for op in LAUNCHERS:
            register(lib, op)
        yield called


def loss_and_gradients(model: Any, x: Tensor) -> dict[str, Tensor]:
    label = torch.arange(x.shape[0]) % 7
    loss = F.cross_entropy(model(x), label)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(parameters.values()))
    return {"loss": loss.detach(), **dict(zip(parameters, found, strict=True))}


def test_inference(launched: set[str]) -> None:
    model, x = make("authors"), images(2)
    fast = FastTNT.from_reference(model).eval()
    with torch.inference_mode():
        eager, exact = model(x), copy.deepcopy(model).double()(x.double())
        ours = fast(x)
    assert_as_accurate(ours, eager, exact)
    assert {"inner_block", "word_to_sentence", "outer_block"} <= launched


def test_gradients(launched: set[str]) -> None:
    model, x = make("authors"), images(2)
    fast = FastTNT.from_reference(model)
    eager = loss_and_gradients(model, x)
    exact = loss_and_gradients(copy.deepcopy(model).double(), x.double())
    ours = loss_and_gradients(fast, x)
    assert_gradients_as_accurate(ours, eager, exact)
    backward = {op for op in launched if op.endswith("_backward")}
    parts = ("inner_block", "outer_block", "pixel_embed", "word_to_sentence")
    assert backward == {f"{part}_backward" for part in parts}
    assert "outer_block_train" in launched
