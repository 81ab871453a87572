"""More sentences than a grid's other axes have, and more elements than 32 bits address."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_cases import (
    BACKEND,
    DEVICE,
    MAKERS,
    backends,
    eager_and_exact,
    exactly,
    our_gradients,
    ours,
    plain_gradients,
    public,
)
from gradients import assert_gradients_as_accurate
from oracle import assert_as_accurate, on_device

from tnt_kernels.dispatch import use_backend

PIECE = 1024  # sentences at either end that are compared


def needs_gib(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib:.0f} GiB of GPU memory, {free:.0f} are free")


def ends(given: dict[str, Any], first: bool) -> dict[str, Any]:
    """The call on the first or the last sentences alone."""
    return {**given, "x": given["x"][:PIECE] if first else given["x"][-PIECE:]}


@pytest.mark.parametrize(
    ("op", "sizes", "backend"),
    [
        ("inner_block", (70_001, 16, 24, 4), BACKEND),
        ("word_to_sentence", (359, 196, 16, 24, 384), BACKEND),
        *(("pixel_embed", (359, 14, 14, 24), backend) for backend in backends("pixel_embed")),
    ],
)
def test_more_than_65535_sentences(op: str, sizes: tuple[int, ...], backend: str) -> None:
    given = on_device(MAKERS[op](*sizes, dtype=torch.float32), DEVICE)
    eager, exact = eager_and_exact(op, given)
    assert eager.shape[:-1].numel() > 65_535
    assert_as_accurate(ours(op, given, backend=backend), eager, exact)
    grad = torch.randn_like(eager)
    del eager, exact
    found, eagers = our_gradients(op, given, grad, backend=backend), plain_gradients(op, given, grad)
    for name, gradient in found.items():  # float64 would need tens of gigabytes
        scale = eagers[name].abs().max()
        assert (gradient - eagers[name]).abs().max() <= 1e-3 * scale, name


def test_more_than_2_to_31_elements() -> None:
    dtype = torch.bfloat16
    sentences = 2**31 // (16 * 24) + 1001
    needs_gib(sentences * 16 * 24 * dtype.itemsize * 5 / 2**30)
    given = on_device(MAKERS["inner_block"](1, 16, 24, 4, dtype=dtype), DEVICE)
    given["x"] = torch.empty(sentences, 16, 24, dtype=dtype, device=DEVICE).normal_()
    out = ours("inner_block", given)
    for first in (True, False):
        piece = ends(given, first)
        eager, exact = eager_and_exact("inner_block", piece)
        assert_as_accurate(out[:PIECE] if first else out[-PIECE:], eager, exact)
    del out
    grad = torch.empty_like(given["x"]).normal_()
    given = {n: v.requires_grad_(n == "x") if isinstance(v, torch.Tensor) else v for n, v in given.items()}
    found = words_gradient(given, grad)
    for first in (True, False):
        piece, upstream = ends(given, first), grad[:PIECE] if first else grad[-PIECE:]
        piece = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in piece.items()}
        eager = plain_gradients("inner_block", piece, upstream)
        exact = plain_gradients("inner_block", exactly(piece), upstream.double())
        of_piece = found[:PIECE] if first else found[-PIECE:]
        assert_gradients_as_accurate({"x": of_piece}, {"x": eager["x"]}, {"x": exact["x"]})


def words_gradient(given: dict[str, Any], grad: torch.Tensor) -> torch.Tensor:
    with use_backend(BACKEND):
        return torch.autograd.grad(public("inner_block")(**given), given["x"], grad)[0]


def test_projection_of_more_than_2_to_31_elements() -> None:
    batch = 2**31 // (196 * 16 * 24) + 3
    needs_gib(batch * 196 * 16 * 24 * 2 * 3 / 2**30)
    given = on_device(MAKERS["word_to_sentence"](1, 1, 16, 24, 64, dtype=torch.bfloat16), DEVICE)
    given["words"] = torch.empty(batch * 196, 16, 24, dtype=torch.bfloat16, device=DEVICE).normal_()
    given["tokens"] = torch.empty(batch, 197, 64, dtype=torch.bfloat16, device=DEVICE).normal_()
    out = ours("word_to_sentence", given)
    for images in (slice(0, 4), slice(-4, None)):
        words = given["words"].view(batch, 196, 16, 24)[images].flatten(0, 1)
        piece = {**given, "words": words, "tokens": given["tokens"][images]}
        eager, exact = eager_and_exact("word_to_sentence", piece)
        assert_as_accurate(out[images], eager, exact)


@pytest.mark.parametrize("backend", backends("pixel_embed"))
def test_images_of_more_than_2_to_31_elements(backend: str) -> None:
    batch, size = 2**31 // (3 * 224 * 224) + 3, 14 * 16
    needs_gib(batch * 3 * size * size * 2 * 5 / 2**30)
    given = on_device(MAKERS["pixel_embed"](1, 14, 14, 24, dtype=torch.bfloat16), DEVICE)
    given["image"] = torch.empty(batch, 3, size, size, dtype=torch.bfloat16, device=DEVICE).normal_()
    out = ours("pixel_embed", given, backend=backend)
    grad = torch.empty_like(out).normal_()
    with use_backend(backend):
        image = given["image"].requires_grad_()
        (found,) = torch.autograd.grad(public("pixel_embed")(**given), image, grad)
    for images in (slice(0, 4), slice(-4, None)):
        piece = {**given, "image": image.detach()[images]}
        eager, exact = eager_and_exact("pixel_embed", piece)
        of_piece = out.view(batch, -1, 24)[images].view_as(eager)
        assert_as_accurate(of_piece, eager, exact)
        of_piece = grad.view(batch, -1, 24)[images].view_as(eager)
        eagers = plain_gradients("pixel_embed", piece, of_piece)
        exacts = plain_gradients("pixel_embed", exactly(piece), of_piece.double())
        assert_gradients_as_accurate(
            {"image": found[images]}, {"image": eagers["image"]}, {"image": exacts["image"]}
        )
