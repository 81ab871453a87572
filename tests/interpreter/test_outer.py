"""The outer half on GPUs, in Triton's interpreter: each kernel, and the block with every gradient.

No kernel here multiplies matrices, so float16 is right in the interpreter too; it truncates to bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradients import assert_gradients_as_accurate, drop_path_factors
from oracle import assert_as_accurate, inner_parameters, linear, randn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from tnt_kernels import _ops
from tnt_kernels._autograd import composite_backward
from tnt_kernels.backends import reference
from tnt_kernels.backends.triton import gelu, layer_norm_backward, outer_block_backward, runtime
from tnt_kernels.backends.triton import outer_block as outer_block_module
from tnt_kernels.backends.triton.add_layer_norm import add_layer_norm, launch_add_layer_norm
from tnt_kernels.backends.triton.linear_gelu import launch_linear_gelu
from tnt_kernels.backends.triton.outer_block import outer_block, outer_block_train
from tnt_kernels.outer.arguments import NAMES, POSITIONS

DTYPES = [torch.float32, torch.float16]
STEP = {torch.float32: 2e-6, torch.float16: 2**-10}
SIZES = [(2, 5, 48, 3), (1, 197, 80, 5), (3, 17, 33, 3), (4, 16, 64, 1)]  # images, tokens, d, heads


def close(ours: Tensor, exact: Tensor, dtype: torch.dtype | None = None) -> None:
    """Asserts equality up to the rounding of `dtype`, as a rule that of ours."""
    step = STEP[ours.dtype if dtype is None else dtype]
    torch.testing.assert_close(ours.double(), exact, rtol=step, atol=step * exact.abs().max().item())


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("y_dtype", [None, *DTYPES])
@pytest.mark.parametrize("out_dtype", [None, *DTYPES])
@pytest.mark.parametrize("shape", [(3, 5, 48), (7, 80), (33,), (0, 16)])
def test_add_layer_norm(
    shape: tuple[int, ...], x_dtype: torch.dtype, y_dtype: torch.dtype | None, out_dtype: torch.dtype | None
) -> None:
    x, d = randn(*shape, dtype=x_dtype, mean=3.0), shape[-1]
    y = None if y_dtype is None else randn(*shape, dtype=y_dtype)
    weight, bias = randn(d, dtype=torch.float16), randn(d)
    total, out = add_layer_norm(x, y, weight, bias, 1e-5, out_dtype)
    exact = x.double() if y is None else (x.double() + y.double()).to(x_dtype).double()
    assert (total.dtype, out.dtype) == (x_dtype, x_dtype if out_dtype is None else out_dtype)
    if y is None:
        assert total.shape == (0,)
    else:
        assert torch.equal(total, x + y.to(x_dtype)) or x_dtype != y_dtype
        torch.testing.assert_close(
            total.double(), exact, rtol=2e-3 if x_dtype == torch.float16 else 1e-6, atol=0
        )
    if out.numel() > 0:
        total = x if y is None else total
        close(out, F.layer_norm(total.double(), (d,), weight.double(), bias.double(), 1e-5))


def test_add_layer_norm_of_any_layout() -> None:
    x, y = randn(6, 5, 48)[::2], randn(3, 48, 5).transpose(1, 2)
    weight, bias = randn(96)[::2], randn(1).expand(48)
    total, out = add_layer_norm(x, y, weight, bias, 1e-5, None)
    assert torch.equal(total, x + y)
    close(out, F.layer_norm((x + y).double(), (48,), weight.double(), bias.double(), 1e-5))


def test_factors_and_shift() -> None:
    x, y, factors, shift = randn(4, 7, 48), randn(28, 48), drop_path_factors(4), randn(48)
    weight, bias = randn(48), randn(48)
    total, out = torch.empty_like(x), torch.empty_like(y)
    launch_add_layer_norm(
        x, y, factors=factors, norm=(weight, bias), eps=1e-5, shift=shift, total=total, out=out
    )
    exact = x.double() + y.view(4, 7, 48).double() * factors[:, None, None]
    close(total, exact + shift)
    close(out, F.layer_norm(exact, (48,), weight.double(), bias.double(), 1e-5).flatten(0, 1))
    launch_add_layer_norm(x, y, factors=factors, total=x)  # in place, and no LayerNorm
    close(x, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize(("images", "n", "d"), [(3, 25, 48), (2, 5, 33), (1, 1, 640)])
def test_layer_norm_backward(
    images: int, n: int, d: int, dtype: torch.dtype, grad_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_norm_backward, "_PROGRAMS", 3)  # so that each takes several tiles
    x, residual = randn(images, n, d, dtype=dtype, mean=3.0), randn(images, n, d, dtype=dtype)
    grad, factors = randn(images * n, d, dtype=grad_dtype), drop_path_factors(images)
    weight, bias = randn(d, dtype=torch.float16, mean=1.0), randn(d)
    results = {
        "grad_x": torch.empty_like(x), "branch": torch.empty_like(grad), "y": torch.empty_like(grad),
    }  # fmt: skip

    def launch(**given: Any) -> Tensor | None:
        return layer_norm_backward.launch_layer_norm_backward(
            x, grad, residual, (weight, bias), 1e-5, factors=factors, **given
        )

    partial = launch(**results)
    leaves = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    y = F.layer_norm(leaves[0], (d,), *leaves[1:], 1e-5)
    grad_x, grad_weight, grad_bias = torch.autograd.grad(y, leaves, grad.view(x.shape).double())
    grad_x = grad_x + residual.double()
    close(results["grad_x"], grad_x)
    close(results["branch"], (grad_x * factors[:, None, None]).flatten(0, 1))
    close(results["y"], y.detach().flatten(0, 1))
    close(partial[0].sum(0), grad_weight)
    close(partial[1].sum(0), grad_bias)
    for name, value in results.items():  # one alone, as where not every gradient is wanted
        alone = torch.empty_like(value)
        assert launch(**{name: alone}, parameters=False) is None
        assert torch.equal(alone, value)
    assert torch.equal(launch(), partial)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(50, 192), (17, 100), (1, 5)])
def test_gelu(rows: int, hidden: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gelu, "_PROGRAMS", 3)
    h, grad = randn(rows, hidden, dtype=dtype, scale=3.0), randn(rows, hidden, dtype=dtype)
    h[0, :5] = torch.tensor([0.0, -0.0, 40.0, -40.0, 3e4])
    leaf = h.double().requires_grad_()
    exact = F.gelu(leaf)
    (exact_grad,) = torch.autograd.grad(exact, leaf, grad.double())
    out, again, grad_h = torch.empty_like(h), torch.empty_like(h), grad.clone()
    gelu.launch_gelu(h, out)
    partial = gelu.launch_gelu_backward(h, grad_h, again, True)
    assert torch.equal(again, out)
    close(out, exact.detach())
    close(grad_h, exact_grad)
    close(partial.sum(0), exact_grad.sum(0))
    alone = grad.clone()
    assert gelu.launch_gelu_backward(h, alone, None, False) is None
    assert torch.equal(alone, grad_h)
    gelu.launch_gelu(h, h)
    assert torch.equal(h, out)


def test_gelu_is_as_exact_as_eager() -> None:
    x = torch.linspace(-12, 12, 20001)[None]
    leaf = x.double().requires_grad_()
    exact = F.gelu(leaf)
    (exact_grad,) = torch.autograd.grad(exact.sum(), leaf)
    out, grad = torch.empty_like(x), torch.ones_like(x)
    gelu.launch_gelu(x, out)
    gelu.launch_gelu_backward(x, grad, None, False)
    assert (out - exact).abs().max() < 1e-6
    assert (grad - exact_grad).abs().max() < 1e-6


def test_gelu_of_special_values() -> None:
    x = torch.tensor([[float("inf"), -float("inf"), float("nan"), 1e30, -1e30]])
    leaf, out, grad = x.double().requires_grad_(), torch.empty_like(x), torch.ones_like(x)
    gelu.launch_gelu(x, out)
    gelu.launch_gelu_backward(x, grad, None, False)
    eager = F.gelu(leaf)
    torch.testing.assert_close(out.double(), eager.detach(), equal_nan=True)
    torch.testing.assert_close(grad.double(), torch.autograd.grad(eager.sum(), leaf)[0], equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "inputs", "hidden"), [(150, 48, 192), (64, 96, 128), (5, 33, 70), (1, 130, 130)]
)
def test_linear_gelu(rows: int, inputs: int, hidden: int, bias: bool, dtype: torch.dtype) -> None:
    x, weight = randn(rows, inputs, dtype=dtype), linear(hidden, inputs, dtype).t().contiguous().t()
    added = randn(hidden, dtype=dtype) if bias else None
    h, out, alone = (torch.empty(rows, hidden, dtype=dtype) for _ in range(3))
    launch_linear_gelu(x, weight, added, out, h)
    launch_linear_gelu(x, weight, added, alone)
    exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
    close(h, exact)
    close(out, F.gelu(h.double()))
    close(alone, F.gelu(exact))


def block_arguments(
    images: int,
    n: int,
    d: int,
    heads: int,
    *,
    drop_path: bool = False,
    absent: tuple[str, ...] = (),
    **options: Any,
) -> tuple[Any, ...]:
    """Arguments of the operator, biases in `absent` left out."""
    parameters = inner_parameters(d, **options)
    parameters |= dict.fromkeys(absent)
    factors = [drop_path_factors(images) if drop_path else None for _ in range(2)]
    return (
        randn(images, n, d),
        *parameters.values(),
        heads,
        0.9 * (d / heads) ** -0.5,
        1e-5,
        1e-6,
        None,
        *factors,
    )


def exact(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.double() if isinstance(value, Tensor) else value for value in args)


def needed_of(args: tuple[Any, ...], wanted: Callable[[str], bool] = lambda name: True) -> list[bool]:
    return [
        args[i] is not None and not name.startswith("drop_path") and wanted(name)
        for i, name in zip(POSITIONS, NAMES, strict=True)
    ]


def named(needed: list[bool], gradients: list[Tensor]) -> dict[str, Tensor]:
    return dict(
        zip([name for name, wants in zip(NAMES, needed, strict=True) if wants], gradients, strict=True)
    )


@sdpa_kernel(SDPBackend.MATH)
def check(args: tuple[Any, ...]) -> dict[str, Tensor]:
    """Asserts that results and gradients are as exact as eager's; returns the gradients.

    PyTorch's fused attention on the CPU now and then is not; the GPU's is another.
    """
    eager = reference.inner_block_in(*args)
    truth = reference.inner_block_in(*exact(args))
    out, *kept = outer_block_train(*args)
    assert_as_accurate(outer_block(*args), eager, truth, what="outer_block")
    assert_as_accurate(out, eager, truth, what="outer_block_train")
    grad, needed = randn(*out.shape), needed_of(args)
    ours = named(needed, outer_block_backward.outer_block_backward(grad, needed, *kept, *args))
    eager, truth = (
        named(needed, composite_backward(reference.inner_block_in, POSITIONS, given, needed, values))
        for given, values in ((grad, args), (grad.double(), exact(args)))
    )
    assert_gradients_as_accurate(ours, eager, truth)
    assert all(gradient.is_contiguous() for gradient in ours.values())
    return ours


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("drop_path", [False, True])
def test_block(size: tuple[int, int, int, int], drop_path: bool) -> None:
    check(block_arguments(*size, drop_path=drop_path))


@pytest.mark.parametrize("size", SIZES)
def test_block_with_the_gelu_in_the_product(
    size: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the 16-bit dtypes have it."""
    monkeypatch.setattr(outer_block_module, "_fuses", lambda dtype: True)
    check(block_arguments(*size, drop_path=True))
    check(block_arguments(*size, absent=("fc1_bias",)))


@pytest.mark.parametrize(
    "absent",
    [
        ("qk_bias", "v_bias"),
        ("qk_bias",),
        ("v_bias", "fc2_bias"),
        ("qk_bias", "v_bias", "proj_bias", "fc1_bias", "fc2_bias"),
    ],
)
def test_absent_biases(absent: tuple[str, ...]) -> None:
    check(block_arguments(2, 9, 48, 3, absent=absent))


def test_one_drop_path_and_any_hidden_width() -> None:
    args = block_arguments(3, 9, 48, 4, hidden=70, drop_path=True)
    check((*args[:-2], None, args[-1]))
    check((*args[:-1], None))


def test_one_token() -> None:
    """Attention has nothing to choose from: its scores have no gradient but for rounding."""
    args = block_arguments(4, 1, 48, 3)
    out, *kept = outer_block_train(*args)
    close(out, reference.inner_block_in(*exact(args)))
    grad, needed = randn(*out.shape), needed_of(args)
    ours = outer_block_backward.outer_block_backward(grad, needed, *kept, *args)
    truth = composite_backward(reference.inner_block_in, POSITIONS, grad.double(), needed, exact(args))
    for gradient, value in zip(ours, truth, strict=True):
        torch.testing.assert_close(gradient.double(), value, rtol=1e-4, atol=1e-4)


def test_any_layout() -> None:
    args = list(block_arguments(3, 9, 48, 4, drop_path=True))
    args[0] = randn(6, 9, 48)[::2]
    for name in ("qk_weight", "fc1_weight", "fc2_weight"):
        i = POSITIONS[NAMES.index(name)]
        args[i] = args[i].t().contiguous().t()
    args[-1] = randn(6).abs()[::2]
    check(tuple(args))


@pytest.mark.parametrize(
    "wanted",
    [
        lambda name: name == "tokens",
        lambda name: name != "tokens",
        lambda name: "fc" in name,
        lambda name: name == "fc2_bias",
        lambda name: name == "fc2_weight",
        lambda name: name == "norm2_bias",
        lambda name: name == "proj_weight",
        lambda name: name == "qk_bias",
        lambda name: name in ("v_weight", "fc1_bias"),
        lambda name: name == "norm1_weight",
    ],
)
@pytest.mark.parametrize("drop_path", [False, True])
def test_only_what_is_asked_for(wanted: Callable[[str], bool], drop_path: bool) -> None:
    args = block_arguments(2, 9, 48, 3, drop_path=drop_path)
    grad = randn(2, 9, 48)
    kept = outer_block_train(*args)[1:]
    needed = needed_of(args)
    whole = named(needed, outer_block_backward.outer_block_backward(grad, needed, *kept, *args))
    needed = needed_of(args, wanted)
    part = named(needed, outer_block_backward.outer_block_backward(grad, needed, *kept, *args))
    assert list(part) == [name for name in whole if wanted(name)]
    assert all(torch.equal(part[name], whole[name]) for name in part)


def test_gradient_of_the_factors() -> None:
    args = block_arguments(2, 5, 48, 3, drop_path=True)
    grad = randn(2, 5, 48)
    needed = [name.startswith("drop_path") for name in NAMES]
    kept = outer_block_train(*args)[1:]
    ours = outer_block_backward.outer_block_backward(grad, needed, *kept, *args)
    expected = composite_backward(reference.inner_block_in, POSITIONS, grad.double(), needed, exact(args))
    for mine, truth in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-5)


def test_arguments_and_activations_are_not_written() -> None:
    args = block_arguments(2, 9, 48, 3, drop_path=True)
    kept, grad, needed = outer_block_train(*args)[1:], randn(2, 9, 48), needed_of(args)
    tensors = [value for value in (grad, *kept, *args) if isinstance(value, Tensor)]
    before = [tensor.clone() for tensor in tensors]
    first = outer_block_backward.outer_block_backward(grad, needed, *kept, *args)
    outer_block(*args)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    second = outer_block_backward.outer_block_backward(grad, needed, *kept, *args)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({tensor.untyped_storage().data_ptr() for tensor in first}) == len(first)


def test_surroundings_have_no_influence() -> None:
    """Below autograd, where the dispatcher calls an operator, and under an autocast that is not asked for."""
    args = block_arguments(2, 9, 48, 3, drop_path=True)
    grad, needed = randn(2, 9, 48), needed_of(args)

    def run() -> list[Tensor]:
        out, *kept = outer_block_train(*args)
        found = outer_block_backward.outer_block_backward(grad, needed, *kept, *args)
        return [outer_block(*args), out, *kept, *found]

    expected = run()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch._C._AutoDispatchBelowAutograd():
        found = run()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with torch.inference_mode():
        assert torch.equal(outer_block(*args), expected[0])


def test_special_values_stay_in_their_image() -> None:
    args = block_arguments(3, 7, 48, 3)
    clean = outer_block(*args)
    args[0][1, 3, 5] = float("nan")
    for out in (outer_block(*args), outer_block_train(*args)[0]):
        torch.testing.assert_close(out[::2], clean[::2])
        assert torch.equal(out.isnan(), reference.inner_block_in(*args).isnan())


def test_no_images() -> None:
    args = block_arguments(0, 7, 48, 3)
    out, *kept = outer_block_train(*args)
    assert outer_block(*args).shape == out.shape == (0, 7, 48)
    assert [tuple(tensor.shape) for tensor in kept] == [(0, 7, 144), (0,), (0, 7, 48), (0, 7, 192)]
    needed = needed_of(args)
    found = named(needed, outer_block_backward.outer_block_backward(out, needed, *kept, *args))
    assert all(not gradient.any() for gradient in found.values())
    assert found["qk_weight"].shape == (96, 48)


@pytest.mark.parametrize(
    ("dtype", "compute_dtype"),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize("drop_path", [False, True])
def test_dtypes(dtype: torch.dtype, compute_dtype: torch.dtype | None, drop_path: bool) -> None:
    """What each operator returns on a GPU, and that its fake says so."""
    made = block_arguments(2, 7, 48, 3, dtype=dtype, drop_path=drop_path)
    args = (made[0].to(dtype), *made[1:19], compute_dtype, *made[20:])

    def on(device: str) -> tuple[Any, ...]:
        return tuple(
            torch.empty(value.shape, dtype=value.dtype, device=device) if isinstance(value, Tensor) else value
            for value in args
        )

    with FakeTensorMode():
        fake = [(tuple(t.shape), t.dtype) for t in torch.ops.tnt_kernels.outer_block_train(*on("cuda"))]
    given, needed = on("meta"), needed_of(args)
    with runtime.recording(90) as launches:
        out, *kept = outer_block_train(*given)
        assert outer_block(*given).dtype == dtype
        found = outer_block_backward.outer_block_backward(torch.empty_like(out), needed, *kept, *given)
    assert [(tuple(t.shape), t.dtype) for t in (out, *kept)] == fake
    held = dtype if compute_dtype is None else compute_dtype
    assert [t.dtype for t in (out, *kept)] == [dtype, held, held, dtype, held]
    for gradient, i in zip(
        found, (i for i, wants in zip(POSITIONS, needed, strict=True) if wants), strict=True
    ):
        assert (gradient.shape, gradient.dtype) == (args[i].shape, args[i].dtype)
    assert {launch.kernel.__name__ for launch in launches} == {
        "_add_layer_norm_kernel", "_gelu_backward_kernel", "_layer_norm_backward_kernel",
        "_gelu_kernel" if held == torch.float32 else "_linear_gelu_kernel",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tokens", torch.zeros(2, 0, 48), "tokens must be of at least one token"),
        ("qk_weight", torch.zeros(48, 48), r"qk_weight must be of shape \[96, 48\]"),
        ("fc2_bias", torch.zeros(47), r"fc2_bias must be of shape \[48\]"),
        ("v_weight", torch.zeros(48, 48, device="meta"), "v_weight must be on cpu"),
        ("drop_path1", torch.zeros(3), "drop_path1 must be"),
    ],
)
def test_bad_input(name: str, value: Tensor, message: str) -> None:
    args = list(block_arguments(2, 7, 48, 3, drop_path=True))
    args[POSITIONS[NAMES.index(name)]] = value
    for launcher in (outer_block, outer_block_train):
        with pytest.raises(ValueError, match=message):
            launcher(*args)


@pytest.mark.parametrize("name", ["grad", "qkv", "z", "h"])
def test_bad_input_of_backward(name: str) -> None:
    args = block_arguments(2, 7, 48, 3)
    out, qkv, attended, z, h = outer_block_train(*args)
    given = {"grad": out, "qkv": qkv, "attended": attended, "z": z, "h": h}
    needed = needed_of(args)
    for bad in (given[name][:, :-1], given[name].double()):
        values = {**given, name: bad}
        with pytest.raises(ValueError, match=f"outer_block_backward: {name} must be torch.float32 of shape"):
            outer_block_backward.outer_block_backward(values.pop("grad"), needed, *values.values(), *args)


def test_float64() -> None:
    args = exact(block_arguments(2, 7, 48, 3))
    assert torch.equal(outer_block(*args), reference.inner_block_in(*args))
    with pytest.raises(ValueError, match="tokens must be float32, bfloat16 or float16"):
        outer_block_train(*args)
    x, weight = randn(3, 48).double(), randn(48).double()
    assert add_layer_norm(x, x, weight, weight, 1e-5, None)[1].dtype == torch.float64


def test_the_operators_are_registered_for_gpus() -> None:
    for name in ("add_layer_norm", "outer_block", "outer_block_train", "outer_block_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tnt_kernels::{name}", "CUDA")
    assert _ops.outer_block is not None
