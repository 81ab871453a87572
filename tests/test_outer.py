"""The outer half: accuracy, shapes, special values, bad input, and packed weights that are never stale."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_accurate, inner_parameters, randn
from torch import Tensor, nn

from tnt_kernels import _ops, native, outer
from tnt_kernels.backends import reference
from tnt_kernels.dispatch import use_backend
from tnt_kernels.outer import cpu, packed

pytestmark = pytest.mark.usefixtures("needs_native", "_empty_cache")

PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {  # dtype of tensors, of autocast
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "float32, autocast bfloat16": (torch.float32, torch.bfloat16),
    "float32, autocast float16": (torch.float32, torch.float16),
    "bfloat16, autocast bfloat16": (torch.bfloat16, torch.bfloat16),
}


@pytest.fixture
def _empty_cache() -> None:
    outer.clear_caches()


def autocast(dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def run(
    tokens: Tensor,
    parameters: dict[str, Tensor | None],
    num_heads: int,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor:
    with torch.no_grad(), use_backend("cpu"), autocast(dtype):
        return outer.outer_block(tokens, **parameters, num_heads=num_heads, **options)


def eager(
    tokens: Tensor, parameters: dict[str, Tensor | None], num_heads: int, dtype: torch.dtype | None = None,
    scale: float | None = None, eps1: float = 1e-5, eps2: float = 1e-5,
) -> Tensor:  # fmt: skip
    if scale is None:
        scale = (tokens.shape[2] / num_heads) ** -0.5
    with torch.no_grad(), autocast(dtype):
        return reference.inner_block(tokens, *parameters.values(), num_heads, scale, eps1, eps2)


def exact(tokens: Tensor, parameters: dict[str, Tensor | None], num_heads: int, **options: Any) -> Tensor:
    wide = {name: None if value is None else value.double() for name, value in parameters.items()}
    return eager(tokens.double(), wide, num_heads, **options)


def check(
    tokens: Tensor,
    parameters: dict[str, Tensor | None],
    num_heads: int,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor:
    ours = run(tokens, parameters, num_heads, dtype, **options)
    assert ours.dtype == tokens.dtype
    assert_as_accurate(
        ours,
        eager(tokens, parameters, num_heads, dtype, **options).to(tokens.dtype),
        exact(tokens, parameters, num_heads, **options),
        what="outer_block",
    )
    return ours


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("n", "d", "heads"), [(197, 384, 6), (197, 640, 10), (50, 132, 12), (65, 33, 3), (16, 768, 12)]
)
def test_accuracy(n: int, d: int, heads: int, precision: str) -> None:
    dtype, cast = PRECISIONS[precision]
    check(randn(2, n, d, dtype=dtype), inner_parameters(d, dtype=dtype), heads, cast)


@pytest.mark.parametrize("precision", ["float32", "float32, autocast bfloat16"])
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_absent_biases(qkv_bias: bool, bias: bool, precision: str) -> None:
    dtype, cast = PRECISIONS[precision]
    check(
        randn(3, 50, 64, dtype=dtype),
        inner_parameters(64, qkv_bias=qkv_bias, bias=bias, dtype=dtype),
        4,
        cast,
    )


@pytest.mark.parametrize("present", ["qk_bias", "v_bias"])
def test_one_of_the_joined_biases(present: str) -> None:
    parameters = inner_parameters(64)
    parameters["qk_bias" if present == "v_bias" else "v_bias"] = None
    check(randn(3, 50, 64), parameters, 4)


def test_scale_and_eps() -> None:
    tokens, parameters = randn(2, 40, 64, scale=0.01), inner_parameters(64)
    ours = check(tokens, parameters, 4, scale=0.5, eps1=1e-2, eps2=1e-1)
    assert not torch.allclose(ours, run(tokens, parameters, 4), atol=1e-3)


@settings(max_examples=40)
@given(
    batch=st.integers(0, 5),
    n=st.integers(1, 40),
    heads=st.integers(1, 5),
    width=st.integers(1, 20),
    hidden=st.integers(1, 70),
    threads=st.integers(1, 3),
    half=st.booleans(),
)
def test_any_size(batch: int, n: int, heads: int, width: int, hidden: int, threads: int, half: bool) -> None:
    d = heads * width
    tokens, parameters = randn(batch, n, d), inner_parameters(d, hidden)
    torch.set_num_threads(threads)
    ours = run(tokens, parameters, heads, torch.bfloat16 if half else None)
    tolerance = 0.15 if half else 1e-4
    torch.testing.assert_close(
        ours.double(), exact(tokens, parameters, heads), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("batch", [1, 5, 8])
def test_groups_of_images(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, parameters = randn(batch, 30, 64), inner_parameters(64)
    whole = run(tokens, parameters, 4)
    for images in (1, 2, 3):
        monkeypatch.setattr(cpu, "_GROUP_BYTES", images * 30 * 256 * 4)
        torch.testing.assert_close(run(tokens, parameters, 4), whole, atol=1e-5, rtol=1e-5)


def test_strides() -> None:
    parameters = inner_parameters(64)
    tokens = randn(3, 20, 64)
    expected = run(tokens, parameters, 4)
    for strided in (
        tokens.transpose(0, 2).contiguous().transpose(0, 2),
        randn(3, 20, 128)[..., ::2].copy_(tokens),
        torch.cat([tokens, tokens], 1)[:, :20],
    ):
        assert torch.equal(run(strided, parameters, 4), expected)
    one = tokens[:1].expand(3, -1, -1)
    assert torch.equal(run(one, parameters, 4), run(one.contiguous(), parameters, 4))
    strided_parameters = {
        name: value.t().contiguous().t() if value.dim() == 2 else value.repeat_interleave(2)[::2]
        for name, value in parameters.items()
        if value is not None
    }
    torch.testing.assert_close(run(tokens, strided_parameters, 4), expected, atol=1e-6, rtol=1e-6)


def test_the_arguments_are_not_written() -> None:
    tokens, parameters = randn(2, 20, 64), inner_parameters(64)
    before = copy.deepcopy((tokens, parameters))
    ours = run(tokens, parameters, 4)
    assert ours.data_ptr() != tokens.data_ptr()
    torch.testing.assert_close((tokens, parameters), before, atol=0, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("cast", [None, torch.bfloat16])
def test_special_values_stay_in_their_image(bad: float, cast: torch.dtype | None) -> None:
    tokens, parameters = randn(3, 20, 64), inner_parameters(64)
    clean = run(tokens, parameters, 4, cast)
    tokens[1, 7, 5] = bad
    ours = run(tokens, parameters, 4, cast)
    assert torch.equal(ours[::2], clean[::2])
    assert torch.equal(ours.isnan(), eager(tokens, parameters, 4, cast).isnan())


def test_special_values_of_a_weight() -> None:
    tokens, parameters = randn(2, 20, 64), inner_parameters(64)
    parameters["fc2_weight"][3, 5] = float("nan")
    for _ in range(2):  # from the cache too
        assert torch.equal(run(tokens, parameters, 4).isnan(), eager(tokens, parameters, 4).isnan())


@pytest.mark.parametrize("cast", [None, torch.bfloat16])
def test_the_same_bits_on_any_number_of_threads(cast: torch.dtype | None) -> None:
    tokens, parameters = randn(3, 50, 64), inner_parameters(64)
    expected = run(tokens, parameters, 4, cast)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(run(tokens, parameters, 4, cast), expected)


def test_float64_takes_the_reference_path() -> None:
    tokens, parameters = randn(2, 10, 32, dtype=torch.float64), inner_parameters(32, dtype=torch.float64)
    ours = outer.outer_block(tokens, **parameters, num_heads=4)
    assert torch.equal(ours, exact(tokens, parameters, 4))
    assert torch.equal(_ops.outer_block(tokens, *parameters.values(), 4, 8**-0.5, 1e-5, 1e-5, None), ours)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tokens", torch.zeros(10, 32), r"tokens must be .*\[images, tokens, d\]"),
        ("tokens", torch.zeros(2, 0, 32), "tokens must be of at least one token"),
        ("tokens", torch.zeros(2, 10, 32, dtype=torch.int64), "tokens must be of dtype"),
        ("tokens", torch.zeros(2, 10, 31), "num_heads must be a positive divisor"),
        ("num_heads", 5, "num_heads must be a positive divisor of the 32 channels"),
        ("num_heads", 0, "num_heads must be"),
        ("qk_weight", torch.zeros(32, 32), r"qk_weight must be of shape \[64, 32\]"),
        ("fc1_weight", torch.zeros(128, 31), r"fc1_weight must be of shape \[128, 32\]"),
        ("fc1_weight", torch.zeros(0, 32), "at least one hidden unit"),
        ("fc2_bias", torch.zeros(31), r"fc2_bias must be of shape \[32\]"),
        (
            "proj_weight",
            torch.zeros(32, 32, dtype=torch.bfloat16),
            "proj_weight must be of dtype torch.float32",
        ),
        ("v_weight", torch.zeros(32, 32, device="meta"), "v_weight must be on cpu"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_input(name: str, value: Any, message: str, backend: str) -> None:
    arguments = {"tokens": torch.zeros(2, 10, 32), **inner_parameters(32), "num_heads": 4, name: value}
    with use_backend(backend), pytest.raises(ValueError, match=f"outer_block: .*{message}"):
        outer.outer_block(**arguments)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("shape", [(197,), (0,), (2, 30), (2, 0), (1,), ()])
def test_linear(shape: tuple[int, ...], gelu: bool, precision: str) -> None:
    dtype, cast = PRECISIONS[precision]
    x, weight, bias = (
        randn(*shape, 96, dtype=dtype),
        randn(50, 96, dtype=dtype, scale=0.1),
        randn(50, dtype=dtype),
    )
    with torch.no_grad(), autocast(cast):
        ours = outer.linear(x, weight, bias, gelu=gelu)
        theirs = F.linear(x, weight, bias)
        theirs = F.gelu(theirs) if gelu else theirs
    y = F.linear(x.double(), weight.double(), bias.double())
    assert ours.dtype == theirs.dtype
    if y.numel() > 1000:
        assert_as_accurate(ours, theirs, F.gelu(y) if gelu else y)
    torch.testing.assert_close(ours.double(), F.gelu(y) if gelu else y, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_layer_norm(precision: str) -> None:
    dtype, cast = PRECISIONS[precision]
    x, weight, bias = randn(40, 3, 96, dtype=dtype, mean=3.0), randn(96, dtype=dtype), randn(96, dtype=dtype)
    with autocast(cast):
        ours, theirs = outer.layer_norm(x, weight, bias, 1e-6), F.layer_norm(x, (96,), weight, bias, 1e-6)
    assert ours.dtype == x.dtype
    assert_as_accurate(
        ours, theirs.to(x.dtype), F.layer_norm(x.double(), (96,), weight.double(), bias.double(), 1e-6)
    )
    assert outer.layer_norm(x[:0], weight, bias).shape == (0, 3, 96)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("y_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_add_layer_norm(
    x_dtype: torch.dtype, y_dtype: torch.dtype | None, out_dtype: torch.dtype | None, tier: str
) -> None:
    x, weight, bias = randn(5, 7, 33, dtype=x_dtype), randn(33), randn(33, dtype=x_dtype)
    y = None if y_dtype is None else randn(5, 7, 33, dtype=y_dtype)
    total, normed = _ops.add_layer_norm(x, y, weight, bias, 1e-5, out_dtype)
    exact_total = x.double() if y is None else x.double() + y.double()
    step = (
        0.02
        if torch.bfloat16 in (x_dtype, out_dtype)
        else 2e-3
        if torch.float16 in (x_dtype, out_dtype)
        else 1e-5
    )
    if y is None:
        assert total.shape == (0,)
    else:
        torch.testing.assert_close(total.double(), exact_total, atol=step, rtol=step)
    assert normed.dtype == (x_dtype if out_dtype is None else out_dtype)
    expected = F.layer_norm(exact_total, (33,), weight.double(), bias.double())
    torch.testing.assert_close(normed.double(), expected, atol=2 * step, rtol=2 * step)


def test_bad_input_of_the_layers() -> None:
    with pytest.raises(ValueError, match=r"linear: weight must be a tensor of shape \[outputs, inputs\]"):
        outer.linear(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"linear: x must be of shape \[..., 3\]"):
        outer.linear(torch.zeros(2, 4), torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"linear: bias must be of shape \[5\]"):
        outer.linear(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(4))
    with pytest.raises(ValueError, match="linear: weight must be of dtype"):
        outer.linear(torch.zeros(2, 3), torch.zeros(5, 3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="weight must be"):
        outer.layer_norm(torch.zeros(2, 3), torch.zeros(4), torch.zeros(3))


# Ways to change a layer. Each takes a layer and returns the one to use afterwards.


def in_place(layer: nn.Linear) -> nn.Linear:
    with torch.no_grad():
        layer.weight.mul_(2)
    return layer


def in_place_one_element(layer: nn.Linear) -> nn.Linear:
    with torch.no_grad():
        layer.weight[1, 2] += 5
    return layer


def in_inference_mode(layer: nn.Linear) -> nn.Linear:
    with torch.inference_mode():
        layer.weight[1, 2] += 5
    return layer


def through_an_alias(layer: nn.Linear) -> nn.Linear:
    layer.weight.detach().view(-1)[7] += 5
    return layer


def optimizer_step(layer: nn.Linear, **options: Any) -> nn.Linear:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, **options)
    layer(randn(4, layer.in_features)).square().sum().backward()
    optimizer.step()
    return layer


def fused_optimizer_step(layer: nn.Linear) -> nn.Linear:
    return optimizer_step(layer, fused=True)


def foreach_optimizer_step(layer: nn.Linear) -> nn.Linear:
    return optimizer_step(layer, foreach=True)


def load_state_dict(layer: nn.Linear) -> nn.Linear:
    layer.load_state_dict({name: randn(*value.shape) for name, value in layer.state_dict().items()})
    return layer


def load_state_dict_assigning(layer: nn.Linear) -> nn.Linear:
    layer.load_state_dict(
        {name: randn(*value.shape) for name, value in layer.state_dict().items()}, assign=True
    )
    return layer


def through_data(layer: nn.Linear) -> nn.Linear:
    layer.weight.data.mul_(2)
    return layer


def replaced_data(layer: nn.Linear) -> nn.Linear:
    layer.weight.data = randn(*layer.weight.shape)
    return layer


def through_numpy(layer: nn.Linear) -> nn.Linear:
    layer.weight.detach().numpy()[...] *= 2
    return layer


def set_to_another_storage(layer: nn.Linear) -> nn.Linear:
    with torch.no_grad():
        layer.weight.set_(randn(*layer.weight.shape))
    return layer


def swapped(layer: nn.Linear) -> nn.Linear:
    torch.utils.swap_tensors(layer.weight, nn.Parameter(randn(*layer.weight.shape)))
    return layer


def to_double_and_back(layer: nn.Linear) -> nn.Linear:
    layer.double()
    with torch.no_grad():
        layer.weight.mul_(2)
    return layer.float()


def deep_copy(layer: nn.Linear) -> nn.Linear:
    return in_place_one_element(copy.deepcopy(layer))


def pickled(layer: nn.Linear) -> nn.Linear:
    return in_place_one_element(pickle.loads(pickle.dumps(layer)))


def saved(layer: nn.Linear) -> nn.Linear:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return in_place_one_element(torch.load(file, weights_only=False))


CHANGES: tuple[Callable[[nn.Linear], nn.Linear], ...] = (
    in_place, in_place_one_element, in_inference_mode, through_an_alias, optimizer_step, fused_optimizer_step,
    foreach_optimizer_step, load_state_dict, load_state_dict_assigning, through_data, replaced_data,
    through_numpy, set_to_another_storage, swapped, to_double_and_back, deep_copy, pickled, saved,
)  # fmt: skip


def assert_current(layer: nn.Linear, x: Tensor, cast: torch.dtype | None = None) -> None:
    """Asserts that linear and packed_linear of the layer with itself give what the layer itself gives."""
    with torch.no_grad(), use_backend("cpu"), autocast(cast):
        expected = F.linear(x, layer.weight, layer.bias)
        ours = outer.linear(x, layer.weight, layer.bias)
        held = x.to(expected.dtype)
        joined = _ops.packed_linear(held, [layer.weight, layer.weight], [layer.bias, None], False)
        second = F.linear(x, layer.weight)
    tolerance = 1e-4 if cast is None else 0.05
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(joined, torch.cat([expected, second], -1), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("cast", [None, torch.bfloat16])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_packed_anew(
    change: Callable[[nn.Linear], nn.Linear],
    missing: bool,
    cast: torch.dtype | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if missing:  # the fingerprint without the native module
        monkeypatch.setattr(packed, "native", SimpleNamespace(load=lambda: None))
    layer, x = nn.Linear(48, 32), randn(5, 48)
    for _ in range(2):
        assert_current(layer, x, cast)
    layer = change(layer)
    for _ in range(2):
        assert_current(layer, x, cast)
    layer = change(layer)
    assert_current(layer, x, cast)


@pytest.mark.parametrize("name", ["qk_bias", "v_bias", "proj_bias", "fc1_bias", "norm1_weight", "norm2_bias"])
def test_a_changed_bias_is_seen(name: str) -> None:
    tokens, parameters = randn(2, 20, 64), inner_parameters(64)
    check(tokens, parameters, 4)
    parameters[name].add_(1)
    check(tokens, parameters, 4)
    parameters[name].data.mul_(2)
    check(tokens, parameters, 4)


@pytest.mark.parametrize("cast", [None, torch.bfloat16])
def test_a_weight_is_packed_once(cast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    packs = []
    pack = packed._pack
    monkeypatch.setattr(packed, "_pack", lambda *args: packs.append(args) or pack(*args))
    parameters = {
        name: None if value is None else nn.Parameter(value) for name, value in inner_parameters(64).items()
    }
    with torch.inference_mode():
        for batch in (1, 4, 2):
            run(randn(batch, 20, 64), parameters, 4, cast)
    aliases = {name: None if value is None else value.detach() for name, value in parameters.items()}
    run(randn(1, 20, 64), aliases, 4, cast)
    assert len(packs) == 4
    assert outer.cache_info()["entries"] == 4


def test_a_packed_weight_dies_with_its_weight() -> None:
    layers = [nn.Linear(48, 32) for _ in range(5)]
    for layer in layers:
        assert_current(layer, randn(5, 48))
    assert outer.cache_info() == {"entries": 10, "bytes": 5 * (32 * 48 + 64 * 48 + 64) * 4}
    alias = layers[0].weight.detach()
    del layer, layers
    gc.collect()
    assert outer.cache_info()["entries"] == 1  # the joined entry has lost its bias
    del alias
    gc.collect()
    assert outer.cache_info() == {"entries": 0, "bytes": 0}


def test_clear_caches() -> None:
    layer = nn.Linear(48, 32)
    assert_current(layer, randn(5, 48))
    outer.clear_caches()
    assert outer.cache_info()["entries"] == 0
    assert_current(layer, randn(5, 48))


def test_a_weight_at_the_address_of_a_dead_one() -> None:
    addresses = set()
    for _ in range(200):
        layer = nn.Linear(48, 32)
        addresses.add(layer.weight.data_ptr())
        assert_current(layer, randn(2, 48))
    assert len(addresses) < 200, "no address was used twice: the test shows nothing"


def test_views_of_one_storage() -> None:
    both, x = randn(64, 48), randn(5, 48)
    for weight in (both[:32], both[32:], both[::2], both[:, :].t()[:, :48].contiguous(), both):
        torch.testing.assert_close(outer.linear(x, weight), F.linear(x, weight), atol=1e-5, rtol=1e-5)
    both[40] += 1
    for weight in (both[:32], both[32:], both[::2], both):
        torch.testing.assert_close(outer.linear(x, weight), F.linear(x, weight), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cast", [None, torch.bfloat16])
def test_inference_tensors_are_never_cached(cast: torch.dtype | None) -> None:
    with torch.inference_mode():
        layer, x = nn.Linear(48, 32), randn(5, 48)
        assert_current(layer, x, cast)
        layer.weight[1, 2] += 5
        assert_current(layer, x, cast)
    assert outer.cache_info()["entries"] == 0


def test_inference_mode_leaves_no_inference_tensor_behind() -> None:
    parameters, tokens = inner_parameters(64), randn(2, 20, 64)
    with torch.inference_mode():
        run(tokens, parameters, 4)
    assert not any(entry.packed.weight.is_inference() for entry in packed._cache.values())
    check(tokens, parameters, 4)


def test_state_dicts_and_copies_hold_nothing_more() -> None:
    layer = nn.Linear(48, 32)
    before = len(pickle.dumps(layer))
    assert_current(layer, randn(5, 48))
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert set(vars(layer.weight)) == set()
    assert len(pickle.dumps(layer)) == before


def test_two_threads_at_once() -> None:
    tokens, parameters = randn(2, 20, 64), inner_parameters(64)
    expected = run(tokens, parameters, 4)
    wrong: list[object] = []

    def work() -> None:
        try:
            for i in range(60):
                if i % 5 == 0:
                    outer.clear_caches()
                own = {name: None if value is None else value.clone() for name, value in parameters.items()}
                for weights in (parameters, own):
                    if not torch.equal(run(tokens, weights, 4), expected):
                        wrong.append(i)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("precision", PRECISIONS)
def test_without_onednn(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, cast = PRECISIONS[precision]
    tokens, parameters = randn(2, 50, 64, dtype=dtype), inner_parameters(64, dtype=dtype)
    before = run(tokens, parameters, 4, cast)
    with torch.backends.mkldnn.flags(enabled=False):
        after = check(tokens, parameters, 4, cast)
    torch.testing.assert_close(before, after, atol=0.1, rtol=0.1)
    monkeypatch.setattr(packed, "_onednn_runs", lambda dtype: False)
    check(tokens, parameters, 4, cast)
    layer, x = nn.Linear(48, 32), randn(5, 48)
    assert_current(layer, x, cast)
    assert_current(in_place_one_element(layer), x, cast)


def test_another_precision_of_float32_products() -> None:
    layer, x = nn.Linear(48, 32), randn(5, 48)
    assert_current(layer, x)
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.no_grad():
            torch.testing.assert_close(
                outer.linear(x, layer.weight, layer.bias), layer(x), atol=0.05, rtol=0.05
            )
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_current(layer, x)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_operators_without_the_native_module(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, cast = PRECISIONS[precision]
    tokens, parameters = randn(2, 50, 64, dtype=dtype), inner_parameters(64, dtype=dtype)
    arguments = (tokens, *parameters.values(), 4, 0.25, 1e-5, 1e-5, cast)
    with_native = _ops.outer_block(*arguments)
    monkeypatch.setattr(native, "load", lambda: None)
    without = _ops.outer_block(*arguments)
    assert without.dtype == with_native.dtype
    torch.testing.assert_close(without, with_native, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_operators_pass_opcheck(precision: str) -> None:
    dtype, cast = PRECISIONS[precision]
    tokens, parameters = randn(2, 6, 32, dtype=dtype), inner_parameters(32, dtype=dtype)
    torch.library.opcheck(_ops.outer_block, (tokens, *parameters.values(), 4, 0.25, 1e-5, 1e-5, cast))
    p = parameters
    torch.library.opcheck(
        _ops.add_layer_norm, (tokens, tokens, p["norm1_weight"], p["norm1_bias"], 1e-5, cast)
    )
    torch.library.opcheck(_ops.add_layer_norm, (tokens, None, p["norm1_weight"], p["norm1_bias"], 1e-5, None))
    linears = [p["qk_weight"], p["v_weight"]], [p["qk_bias"], None]
    torch.library.opcheck(_ops.packed_linear, (tokens, *linears, True))


@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16])
def test_compile(cast: torch.dtype | None) -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in inner_parameters(32).items():
                self.register_parameter(name, nn.Parameter(value))

        def forward(self, x: Tensor) -> Tensor:
            x = outer.linear(x, self.proj_weight, self.proj_bias, gelu=True).float()
            x = outer.outer_block(x, *self._parameters.values(), num_heads=4)
            return outer.layer_norm(x, self.norm1_weight, self.norm1_bias)

    torch._dynamo.reset()
    layers = Layers()
    compiled = torch.compile(layers, fullgraph=True)
    for batch in (2, 3, 5):
        x = randn(batch, 6, 32)
        for _ in range(2):
            with torch.no_grad(), autocast(cast):
                torch.testing.assert_close(
                    compiled(x), layers(x), atol=1e-2 if cast else 1e-6, rtol=1e-2 if cast else 1e-6
                )
            with torch.inference_mode(), autocast(cast):
                torch.testing.assert_close(
                    compiled(x), layers(x), atol=1e-2 if cast else 1e-6, rtol=1e-2 if cast else 1e-6
                )
            with torch.no_grad():
                layers.fc1_weight[1, 2] += 1
                layers.proj_weight.data.mul_(1.1)


def test_export() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in inner_parameters(32).items():
                self.register_parameter(name, nn.Parameter(value, requires_grad=False))

        def forward(self, x: Tensor) -> Tensor:
            return outer.outer_block(x, *self._parameters.values(), num_heads=4)

    block, x = Block(), randn(3, 6, 32)
    program = torch.export.export(
        block, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    )
    for batch in (3, 7):
        x = randn(batch, 6, 32)
        assert torch.equal(program.module()(x), block(x))
