"""Dropout inside the inner operators: what is dropped, how often, and the gradients behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradients import check_gradients, gradients
from oracle import PRECISIONS, arguments, check, operator, operator_arguments, randn, run

from tnt_kernels import ops
from tnt_kernels.backends.philox import dropout_factors, philox

RATES = {
    "inner_attention": ("attn_drop", "proj_drop"),
    "inner_mlp": ("hidden_drop", "out_drop"),
    "inner_block": ("attn_drop", "proj_drop", "hidden_drop", "out_drop"),
}


def dropout(op: str, rate: float = 0.3, seed: int = 1234567890123456789) -> dict[str, Any]:
    return {"seed": torch.tensor([seed]), **dict.fromkeys(RATES[op], rate)}


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    """The test vectors that its authors publish."""
    found = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [int(word) for word in found] == words


@pytest.mark.parametrize("op", RATES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_drops_what_the_reference_drops(tier: str, op: str, precision: str) -> None:
    dtype, autocast = PRECISIONS[precision]
    check(op, {**arguments(op, dtype), **dropout(op)}, autocast)


@pytest.mark.parametrize("op", RATES)
@pytest.mark.parametrize("m", [1, 7, 16, 21])
@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_any_number_of_words(tier: str, op: str, m: int, rate: float) -> None:
    values = {**arguments(op), **dropout(op, rate, seed=-5), "x": randn(13, m, 24)}
    check(op, values)
    check_gradients(op, values)


@pytest.mark.parametrize("op", RATES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients(tier: str, op: str, precision: str) -> None:
    dtype, autocast = PRECISIONS[precision]
    check_gradients(op, {**arguments(op, dtype), **dropout(op)}, autocast)


@pytest.mark.parametrize(("op", "rate"), [(op, rate) for op, rates in RATES.items() for rate in rates])
def test_each_place_alone(tier: str, op: str, rate: str) -> None:
    values = {**arguments(op), "seed": torch.tensor([77]), rate: 0.5}
    check(op, values)
    check_gradients(op, values)


@pytest.mark.parametrize("op", RATES)
def test_everything_dropped(tier: str, op: str) -> None:
    values = {**arguments(op), **dropout(op, 1.0)}
    grad = randn(12, 16, 24)
    assert torch.equal(run(op, values), values["x"])
    assert torch.equal(gradients(getattr(ops, op), values, grad)["x"], grad)


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.8])
def test_distribution(rate: float) -> None:
    """As many are dropped as should be, everywhere alike, neighbours and places independently."""
    factors = [
        dropout_factors(torch.tensor([3]), place, 64, 16, 96, rate, torch.empty(0)) for place in range(4)
    ]
    kept = [factor.ne(0).double() for factor in factors]
    count = kept[0].numel()
    deviation = (rate * (1 - rate) / count) ** 0.5
    for factor, keeps in zip(factors, kept, strict=True):
        assert set(factor.unique().tolist()) == {0.0, torch.tensor(1.0).div(1 - rate).item()}
        assert abs(keeps.mean().item() - (1 - rate)) < 5 * deviation
        for dim in range(3):
            other = [d for d in range(3) if d != dim]
            means = keeps.mean(other)
            assert (means - (1 - rate)).abs().max() < 5 * deviation * len(means) ** 0.5
    centred = [keeps - (1 - rate) for keeps in kept]
    pairs = [(centred[0], centred[place]) for place in (1, 2, 3)]
    pairs += [(centred[0].narrow(d, 0, 15), centred[0].narrow(d, 1, 15)) for d in range(3)]
    for a, b in pairs:
        assert abs((a * b).mean().item()) < 5 * rate * (1 - rate) / a.numel() ** 0.5


def test_the_expectation_is_that_without_dropout(needs_native: None) -> None:
    values = arguments("inner_mlp")
    plain = run("inner_mlp", values)
    runs = [run("inner_mlp", {**values, "seed": torch.tensor([i]), "out_drop": 0.5}) for i in range(200)]
    branch = (plain - values["x"]).square().mean().sqrt()
    error = (torch.stack(runs).mean(0) - plain).square().mean().sqrt()
    assert error < 2 * branch / 200**0.5


@pytest.mark.parametrize("op", RATES)
def test_opcheck_and_compile(op: str, needs_native: None) -> None:
    values = {**arguments(op), **dropout(op)}
    torch.library.opcheck(operator(op), operator_arguments(op, values))

    def loss(x: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
        return getattr(ops, op)(**{**values, "x": x, "seed": seed}).square().sum()

    x = values["x"].requires_grad_()
    (expected,) = torch.autograd.grad(loss(x, values["seed"]), x)
    (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x, values["seed"]), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("op", RATES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_arguments(op: str, backend: str) -> None:
    from tnt_kernels.dispatch import use_backend

    rate = RATES[op][0]
    for change, message in (
        ({rate: 0.1}, rf"{op}: seed must be an int64 tensor of one element where {rate} is not 0"),
        ({"seed": 3, rate: 0.1}, f"{op}: seed must be an int64 tensor"),
        ({"seed": torch.tensor(3), rate: 0.1}, f"{op}: seed must be int64 of shape"),
        ({"seed": torch.tensor([3.0]), rate: 0.1}, f"{op}: seed must be int64 of shape"),
        ({"seed": torch.tensor([3]), rate: 1.1}, rf"{op}: {rate} must be in .0, 1., got 1.1"),
        ({"seed": torch.tensor([3]), rate: -0.1}, rf"{op}: {rate} must be in .0, 1., got -0.1"),
    ):
        with use_backend(backend), pytest.raises((ValueError, TypeError), match=message):
            getattr(ops, op)(**{**arguments(op), **change})


@pytest.mark.parametrize("op", RATES)
def test_public_functions_on_the_reference_backend(op: str) -> None:
    values = {**arguments(op), **dropout(op)}
    torch.testing.assert_close(run(op, values, backend="reference"), run(op, values), rtol=1e-4, atol=1e-5)
