"""Gradients of the outer block: its native kernels on every SIMD tier, and the operator as a whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradients import assert_gradients_as_accurate, drop_path_factors, gradients, tensors_of
from oracle import PRECISIONS, assert_as_accurate, in_dtype, inner_parameters, randn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tnt_kernels import _ops, native, outer
from tnt_kernels._autograd import tensor_positions
from tnt_kernels.backends import reference
from tnt_kernels.dispatch import use_backend
from tnt_kernels.outer import cpu, packed, products

pytestmark = pytest.mark.usefixtures("needs_native")

CODES = {torch.float32: 0, torch.bfloat16: 1}


def block_arguments(
    batch: int,
    n: int,
    d: int,
    heads: int,
    hidden: int | None = None,
    dtype: torch.dtype = torch.float32,
    drop_path: bool = False,
    **options: Any,
) -> dict[str, Any]:
    values: dict[str, Any] = {
        "tokens": randn(batch, n, d, dtype=dtype),
        **inner_parameters(d, hidden, dtype=dtype, **options),
        "num_heads": heads,
    }
    if drop_path:
        values |= {name: drop_path_factors(batch) for name in ("drop_path1", "drop_path2")}
    return values


def eager(tokens: Tensor, num_heads: int, scale: float | None = None, **given: Any) -> Tensor:
    scale = (tokens.shape[2] / num_heads) ** -0.5 if scale is None else scale
    eps = given.pop("eps1", 1e-5), given.pop("eps2", 1e-5)
    factors = given.pop("drop_path1", None), given.pop("drop_path2", None)
    return reference.inner_block(tokens, *given.values(), num_heads, scale, *eps, *factors).to(tokens.dtype)


def operator_arguments(values: dict[str, Any], compute_dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    given = dict(values)
    factors = [given.pop(name, None) for name in ("drop_path1", "drop_path2")]
    heads = given.pop("num_heads")
    scale = (given["tokens"].shape[2] / heads) ** -0.5
    return (*given.values(), heads, scale, 1e-5, 1e-5, compute_dtype, *factors)


def check(values: dict[str, Any], autocast: torch.dtype | None = None, grad: Tensor | None = None) -> None:
    grad = torch.randn(values["tokens"].shape).to(values["tokens"].dtype) if grad is None else grad
    with use_backend("cpu"):
        ours = gradients(outer.outer_block, values, grad, autocast=autocast)
    assert_gradients_as_accurate(
        ours,
        gradients(eager, values, grad, autocast=autocast),
        gradients(eager, in_dtype(values, torch.float64), grad.double()),
    )


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def attention(qkv: Tensor, heads: int, scale: float) -> Tensor:
    batch, n, width = qkv.shape
    q, k, v = qkv.view(batch, n, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)
    return (((q @ k.transpose(2, 3)) * scale).softmax(-1) @ v).transpose(1, 2).reshape(batch, n, width // 3)


def attention_backward(
    qkv: Tensor, grad: Tensor, heads: int, scale: float, compute: torch.dtype, threads: int = 1
) -> Tensor:
    module: Any = native.load()
    batch, n, d = grad.shape
    out = torch.empty_like(qkv)
    module.outer_attention_backward(
        qkv.data_ptr(), grad.data_ptr(), out.data_ptr(), CODES[qkv.dtype], CODES[compute], batch, n, heads,
        d // heads, scale, threads,
    )  # fmt: skip
    return out


@pytest.mark.parametrize(
    ("dtype", "compute"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize(
    ("n", "heads", "width"), [(197, 2, 64), (65, 3, 24), (33, 5, 11), (32, 2, 16), (16, 1, 80), (5, 2, 7)]
)
def test_attention(
    n: int, heads: int, width: int, dtype: torch.dtype, compute: torch.dtype, tier: str
) -> None:
    qkv, grad = randn(3, n, 3 * heads * width, dtype=dtype), randn(3, n, heads * width, dtype=dtype)
    scale = width**-0.5
    found = []
    for wide in (False, True):
        x = (qkv.double() if wide else qkv).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=not wide and compute != dtype):
            y = attention(x, heads, scale)
        found += torch.autograd.grad(y, x, grad.to(y.dtype))
    ours = attention_backward(qkv.detach(), grad, heads, scale, compute)
    assert_as_accurate(ours, *found, what="attention")
    for threads in (2, 3):
        again = attention_backward(qkv.detach(), grad, heads, scale, compute, threads)
        assert torch.equal(again, ours)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_attention_keeps_special_values_in_their_head(bad: float, tier: str) -> None:
    qkv, grad = randn(2, 20, 3 * 4 * 8), randn(2, 20, 32)
    clean = attention_backward(qkv, grad, 4, 0.3, torch.float32)
    for part in range(3):  # a query, a key, a value of the second image's third head
        marked = qkv.clone()
        marked[1, 7, part * 32 + 16] = bad
        x = marked.clone().requires_grad_()
        (expected,) = torch.autograd.grad(attention(x, 4, 0.3), x, grad)
        ours = attention_backward(marked, grad, 4, 0.3, torch.float32)
        other = torch.ones(96, dtype=torch.bool).view(3, 4, 8)
        other[:, 2] = False
        assert torch.equal(ours[0], clean[0])
        assert torch.equal(ours[1][:, other.flatten()], clean[1][:, other.flatten()])
        assert not (ours.isfinite() & ~expected.isfinite()).any()


def layer_norm_backward(
    x: Tensor, residual: Tensor, grad: Tensor, weight: Tensor, bias: Tensor, eps: float, threads: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module: Any = native.load()
    rows, d = x.shape
    grad_x, out, sums = torch.empty_like(x), torch.empty_like(grad), torch.empty(2, d)
    module.layer_norm_backward(
        x.data_ptr(), residual.data_ptr(), grad.data_ptr(), CODES[x.dtype], CODES[grad.dtype],
        weight.data_ptr(), bias.data_ptr(), CODES[weight.dtype], grad_x.data_ptr(), out.data_ptr(),
        sums[0].data_ptr(), sums[1].data_ptr(), rows, d, eps, threads,
    )  # fmt: skip
    return grad_x, out, sums[0], sums[1]


@pytest.mark.parametrize("x_dtype", CODES)
@pytest.mark.parametrize("grad_dtype", CODES)
@pytest.mark.parametrize("weight_dtype", CODES)
@pytest.mark.parametrize(("rows", "d"), [(197, 384), (300, 33), (17, 100), (1, 64)])
def test_layer_norm(
    rows: int, d: int, x_dtype: torch.dtype, grad_dtype: torch.dtype, weight_dtype: torch.dtype, tier: str
) -> None:
    x, residual = randn(rows, d, dtype=x_dtype, mean=3.0), randn(rows, d, dtype=x_dtype)
    grad = randn(rows, d, dtype=grad_dtype)
    weight, bias = randn(d, dtype=weight_dtype, mean=1.0), randn(d, dtype=weight_dtype)
    ours = layer_norm_backward(x, residual, grad, weight, bias, 1e-5)
    leaves = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    y = F.layer_norm(leaves[0], (d,), leaves[1], leaves[2], 1e-5)
    grad_x, grad_weight, grad_bias = torch.autograd.grad(y, leaves, grad.double())
    exact = grad_x + residual.double(), y.detach(), grad_weight, grad_bias
    for mine, truth in zip(ours, exact, strict=True):
        step = 2**-8 if mine.dtype == torch.bfloat16 else 2e-6
        scale = truth.abs().max().item()
        torch.testing.assert_close(mine.double(), truth, rtol=step, atol=step * scale / 4)
    for threads in (2, 3):
        again = layer_norm_backward(x, residual, grad, weight, bias, 1e-5, threads)
        assert all(torch.equal(a, b) for a, b in zip(again, ours, strict=True))


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize(("rows", "hidden"), [(197, 1536), (300, 33), (17, 100), (1, 5)])
def test_gelu(rows: int, hidden: int, dtype: torch.dtype, tier: str) -> None:
    module: Any = native.load()
    h, grad = randn(rows, hidden, dtype=dtype, scale=3.0), randn(rows, hidden, dtype=dtype)
    h[0, :5] = torch.tensor([0.0, -0.0, 40.0, -40.0, 1e30]).to(dtype)
    wide = h.double().requires_grad_()
    y = F.gelu(wide)
    (exact,) = torch.autograd.grad(y, wide, grad.double())
    runs = []
    for threads in (1, 2, 3):
        ours, out, bias = grad.clone(), torch.empty_like(h), torch.empty(hidden)
        module.gelu_backward(
            h.data_ptr(),
            ours.data_ptr(),
            out.data_ptr(),
            CODES[dtype],
            bias.data_ptr(),
            rows,
            hidden,
            threads,
        )
        runs.append((ours, out, bias))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
    ours, out, bias = runs[0]
    step = 2**-8 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(ours.double(), exact, rtol=step, atol=step)
    torch.testing.assert_close(out.double(), y.detach(), rtol=step, atol=step)
    torch.testing.assert_close(bias.double(), exact.sum(0), rtol=step, atol=step * rows**0.5)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(197, 96, 40), (1, 3, 5), (50, 1, 1), (7, 33, 2)])
def test_products(
    tokens: int, outputs: int, inputs: int, onednn: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not onednn:
        monkeypatch.setattr(packed, "_onednn_runs", lambda dtype: False)
    x, weight = randn(tokens, inputs, dtype=dtype), randn(outputs, inputs, dtype=dtype)
    grad, bias = randn(tokens, 2 * outputs, dtype=dtype)[:, outputs:], randn(outputs)
    step = 0.02 if dtype == torch.bfloat16 else 1e-5

    def close(ours: Tensor, exact: Tensor) -> None:
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, rtol=step, atol=step * exact.abs().max().item())

    with torch.autocast("cpu", torch.bfloat16):
        close(products.linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double()))
        back = weight.t().contiguous().t().t()  # [inputs, outputs] as no weight lies in memory
        for transposed in (weight.t(), back):
            close(products.linear(grad, transposed), grad.double() @ weight.double())
        close(products.weight_gradient(grad, x), grad.double().t() @ x.double())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("n", "d", "heads"), [(197, 384, 6), (197, 640, 10), (50, 132, 12), (65, 33, 3), (1, 48, 4)]
)
def test_accuracy(n: int, d: int, heads: int, precision: str) -> None:
    dtype, cast = PRECISIONS[precision]
    check(block_arguments(3, n, d, heads, dtype=dtype, drop_path=True), cast)


@pytest.mark.parametrize("precision", ["float32", "autocast_bfloat16"])
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_absent_biases(qkv_bias: bool, bias: bool, precision: str) -> None:
    dtype, cast = PRECISIONS[precision]
    check(block_arguments(3, 50, 64, 4, dtype=dtype, qkv_bias=qkv_bias, bias=bias), cast)


@pytest.mark.parametrize("present", ["qk_bias", "v_bias"])
def test_one_of_the_joined_biases(present: str) -> None:
    values = block_arguments(3, 50, 64, 4)
    values["qk_bias" if present == "v_bias" else "v_bias"] = None
    check(values)


def test_scale_and_eps() -> None:
    values = block_arguments(3, 40, 64, 4)
    values["tokens"] *= 0.01
    check({**values, "scale": 0.5, "eps1": 1e-2, "eps2": 1e-1})


@pytest.mark.parametrize("names", [("drop_path1",), ("drop_path2",), ("drop_path1", "drop_path2")])
def test_dropped_branches_have_no_gradient(names: tuple[str, ...]) -> None:
    values = block_arguments(4, 10, 32, 4) | {name: torch.zeros(4) for name in names}
    grad = randn(4, 10, 32)
    found = gradients(outer.outer_block, values, grad)
    branches = {"drop_path1": list(found)[1:9], "drop_path2": list(found)[9:]}
    for name in names:
        assert all(not found[parameter].any() for parameter in branches[name])
    if len(names) == 2:
        assert torch.equal(found["tokens"], grad)


@pytest.mark.parametrize("precision", ["float32", "autocast_bfloat16"])
def test_groups_of_images(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, cast = PRECISIONS[precision]
    values = block_arguments(5, 30, 64, 4, dtype=dtype, drop_path=True)
    for images in (1, 2, 3):
        monkeypatch.setattr(cpu, "_GROUP_BYTES", images * 30 * 256 * (4 if cast is None else 2))
        check(values, cast)


def test_gradient_of_any_layout() -> None:
    values = block_arguments(3, 20, 64, 4)
    values["tokens"] = randn(6, 20, 64)[::2]
    values["fc1_weight"], values["proj_weight"] = randn(64, 256).t() / 8, randn(64, 64).t() / 8
    values["norm2_weight"] = randn(128)[::2]
    check(values, grad=randn(3, 64, 20).transpose(1, 2))
    check(values, grad=randn(1).expand(3, 20, 64))
    check(values | {"tokens": randn(1, 20, 64).expand(3, -1, -1)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_layer_norms(dtype: torch.dtype) -> None:
    values = block_arguments(3, 20, 64, 4, dtype=dtype)
    for name in ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias"):
        values[name] = values[name].float()
    check(values)


@pytest.mark.parametrize("precision", ["float32", "autocast_bfloat16"])
def test_the_same_bits_for_every_number_of_threads(precision: str) -> None:
    dtype, cast = PRECISIONS[precision]
    values = block_arguments(3, 50, 64, 4, dtype=dtype, drop_path=True)
    grad = randn(3, 50, 64)
    runs = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        runs.append(gradients(outer.outer_block, values, grad, autocast=cast))
    for run in runs[1:]:
        assert all(torch.equal(run[name], runs[0][name]) for name in run)


def test_only_what_is_asked_for() -> None:
    """Each gradient alone, all but each, and every pair are what they are among all."""
    values = block_arguments(3, 10, 32, 4, drop_path=True)
    grad = randn(3, 10, 32)
    names = tensors_of(values)
    whole = gradients(outer.outer_block, values, grad)
    alone = [[name] for name in names]
    others = [[other for other in names if other != name] for name in names]
    pairs = [list(pair) for pair in itertools.combinations(names, 2)]
    for wanted in (*alone, *others, *pairs):
        found = gradients(outer.outer_block, values, grad, wanted=wanted)
        assert list(found) == wanted
        torch.testing.assert_close(found, {name: whole[name] for name in wanted}, rtol=1e-5, atol=1e-5)


def test_gradient_of_the_factors() -> None:
    values = block_arguments(3, 10, 32, 4, drop_path=True)
    grad = randn(3, 10, 32)
    found = []
    for function, dtype in ((outer.outer_block, torch.float32), (eager, torch.float64)):
        given = in_dtype(values, dtype)
        factors = [given[name].requires_grad_() for name in ("drop_path1", "drop_path2")]
        out = function(**given)
        found.append(torch.autograd.grad(out, factors, grad.to(out.dtype)))
    torch.testing.assert_close(found[0], tuple(g.float() for g in found[1]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("precision", "element"), [("float32", 4), ("bfloat16", 2), ("autocast_bfloat16", 2)]
)
def test_what_is_kept(precision: str, element: int) -> None:
    """For each token: the input, z, q, k, v, attention's output and the hidden layer; nothing else."""
    dtype, cast = PRECISIONS[precision]
    values = block_arguments(3, 20, 64, 4, dtype=dtype)
    leaves = {n: v.requires_grad_() if isinstance(v, Tensor) else v for n, v in values.items()}
    known = {value.data_ptr() for value in leaves.values() if isinstance(value, Tensor)}
    saved: dict[int, Tensor] = {}
    pack: Callable[[Tensor], Tensor] = lambda tensor: saved.setdefault(tensor.data_ptr(), tensor)  # noqa: E731
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None),
    ):
        outer.outer_block(**leaves)
    kept = sum(t.numel() * t.element_size() for p, t in saved.items() if p not in known)
    assert kept == 3 * 20 * 64 * (dtype.itemsize + (3 + 1 + 4) * (cast or dtype).itemsize)


def test_special_values_stay_in_their_image() -> None:
    for bad in (float("nan"), float("inf")):
        values = block_arguments(3, 20, 64, 4)
        values["tokens"][1, 7, 5] = bad
        grad = randn(3, 20, 64)
        ours = gradients(outer.outer_block, values, grad, wanted=["tokens"])["tokens"]
        theirs = gradients(eager, values, grad, wanted=["tokens"])["tokens"]
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert ours[1].isnan().any()
        assert not ours[::2].isnan().any()


def test_gradcheck() -> None:
    values = block_arguments(2, 3, 6, 2, 5, dtype=torch.float64)
    values |= {"drop_path1": torch.tensor([0.0, 2.0]), "drop_path2": torch.tensor([1.5, 0.5])}
    names = tensors_of(values)
    tensors = [values[name].requires_grad_() for name in names]

    def public(*args: Tensor) -> Tensor:
        return outer.outer_block(**{**values, **dict(zip(names, args, strict=True))})

    def registered(*args: Tensor) -> Tensor:
        return _ops.outer_block(*operator_arguments({**values, **dict(zip(names, args, strict=True))}))

    for function in (public, registered):
        assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16", "autocast_bfloat16"])
def test_opcheck(precision: str) -> None:
    dtype, cast = PRECISIONS[precision]
    values = block_arguments(2, 6, 32, 4, dtype=dtype, drop_path=True)
    args = operator_arguments(values, cast)
    train, backward = (
        getattr(torch.ops.tnt_kernels, f"outer_block_{kind}") for kind in ("train", "backward")
    )
    torch.library.opcheck(train.default, args)
    _, *activations = train(*args)
    positions = tensor_positions(_ops.outer_block)
    for needed in ([True] * 15 + [False] * 2, [i == 3 for i in range(len(positions))]):
        torch.library.opcheck(
            backward.default, (torch.randn(2, 6, 32).to(dtype), needed, *activations, *args)
        )
    for name in tensors_of(values):
        values[name].requires_grad_()
    torch.library.opcheck(_ops.outer_block, operator_arguments(values, cast))


def test_train_refuses_what_it_cannot_run() -> None:
    values = block_arguments(2, 6, 32, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"outer_block_train: the cpu backend cannot run .*float64"):
        torch.ops.tnt_kernels.outer_block_train(*operator_arguments(values))


def test_backward_refuses_what_does_not_belong_to_the_call() -> None:
    args = operator_arguments(block_arguments(2, 6, 32, 4))
    names = ("qkv", "attended", "z", "h")
    _, *activations = torch.ops.tnt_kernels.outer_block_train(*args)
    given = dict(zip(("grad", *names), (randn(2, 6, 32), *activations), strict=True))
    needed = [True] * 15 + [False] * 2

    def call(**change: Tensor) -> None:
        grad, *rest = (given | change).values()
        torch.ops.tnt_kernels.outer_block_backward(grad, needed, *rest, *args)

    call()
    for name, tensor in given.items():
        for wrong in (tensor[:1], tensor.bfloat16()):
            with pytest.raises(ValueError, match=rf"outer_block_backward: {name} must be torch[.]float32 of"):
                call(**{name: wrong})


class Block(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        for name, value in inner_parameters(d).items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor, factors: Tensor | None = None) -> Tensor:
        return outer.outer_block(x, *self._parameters.values(), num_heads=self.heads, drop_path1=factors)


def step(
    function: Callable[..., Tensor], block: Block, *args: Tensor, cast: torch.dtype | None
) -> list[Tensor]:
    block.zero_grad()
    x = args[0].detach().requires_grad_()
    with torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None):
        out = function(x, *args[1:])
    out.square().sum().backward()
    return [out.detach(), x.grad, *(parameter.grad for parameter in block.parameters())]


@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("drop_path", [False, True])
def test_compile(drop_path: bool, cast: torch.dtype | None) -> None:
    torch._dynamo.reset()
    block = Block(32, 4)
    compiled = torch.compile(block, fullgraph=True)
    for batch in (2, 3, 5):
        args = [randn(batch, 6, 32), *([drop_path_factors(batch)] if drop_path else [])]
        expected = step(block, block, *args, cast=cast)
        torch.testing.assert_close(step(compiled, block, *args, cast=cast), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    block, x = Block(32, 4), randn(3, 6, 32)

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=reentrant)

    expected, found = step(block, block, x, cast=None), step(checkpointed, block, x, cast=None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradient_of_the_gradient() -> None:
    values = block_arguments(2, 6, 32, 4)
    found = []
    for dtype in (torch.float32, torch.float64):
        cast = in_dtype(values, dtype)
        x, weight = cast["tokens"].requires_grad_(), cast["fc1_weight"].requires_grad_()
        (first,) = torch.autograd.grad(outer.outer_block(**cast).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), weight)[0])
    torch.testing.assert_close(found[0].double(), found[1], rtol=1e-3, atol=1e-2)


def test_a_graph_is_gone_through_twice() -> None:
    values = block_arguments(2, 6, 32, 4)
    x = values["tokens"].requires_grad_()
    out = outer.outer_block(**values).square().sum()
    first = torch.autograd.grad(out, x, retain_graph=True)
    assert torch.equal(torch.autograd.grad(out, x)[0], first[0])
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(out, x)


def test_a_changed_weight_is_noticed() -> None:
    values = block_arguments(2, 6, 32, 4)
    values["fc1_weight"].requires_grad_()
    out = outer.outer_block(**values)
    with torch.no_grad():
        values["fc1_weight"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("batch", [0, 1])
def test_few_images(batch: int) -> None:
    values = block_arguments(batch, 10, 32, 4, drop_path=True)
    values |= {name: torch.ones(batch) for name in ("drop_path1", "drop_path2")}
    found = gradients(outer.outer_block, values, randn(batch, 10, 32))
    assert all(gradient.shape == values[name].shape for name, gradient in found.items())
    assert all(bool(gradient.any()) == (batch > 0) for name, gradient in found.items() if name != "tokens")
    if batch:
        check(values)


@pytest.mark.parametrize(("n", "d", "heads", "hidden"), [(1, 4, 1, 1), (2, 4, 4, 3), (3, 5, 5, 7)])
def test_hardly_any_channels(n: int, d: int, heads: int, hidden: int) -> None:
    values = block_arguments(4, n, d, heads, hidden)
    grad = randn(4, n, d)
    ours = gradients(outer.outer_block, values, grad)
    exact = gradients(eager, in_dtype(values, torch.float64), grad.double())
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient.double(), exact[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_without_onednn(precision: str) -> None:
    dtype, cast = PRECISIONS[precision]
    values = block_arguments(3, 20, 64, 4, dtype=dtype)
    with torch.backends.mkldnn.flags(enabled=False):
        check(values, cast)


def test_without_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    values = block_arguments(2, 6, 32, 4)
    grad = randn(2, 6, 32)
    with_native = gradients(outer.outer_block, values, grad)
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(native, "why_missing", lambda: "taken away")
    torch.testing.assert_close(gradients(outer.outer_block, values, grad), with_native, atol=1e-4, rtol=1e-4)
    with use_backend("cpu"), pytest.raises(RuntimeError, match="taken away"):
        gradients(outer.outer_block, values, grad)


def test_linear_and_layer_norm_are_differentiable() -> None:
    values = {"x": randn(5, 32), "weight": randn(48, 32), "bias": randn(48)}
    grad = randn(5, 48)
    ours = gradients(lambda **given: outer.linear(**given, gelu=True), values, grad)
    theirs = gradients(lambda x, weight, bias: F.gelu(F.linear(x, weight, bias)), values, grad)
    torch.testing.assert_close(ours, theirs)
    values = {"x": randn(5, 32), "weight": randn(32), "bias": randn(32)}
    ours = gradients(outer.layer_norm, values, grad[:, :32])
    theirs = gradients(lambda x, weight, bias: F.layer_norm(x, (32,), weight, bias), values, grad[:, :32])
    torch.testing.assert_close(ours, theirs)


def test_native_functions_check_what_they_get() -> None:
    module: Any = native.load()
    p = torch.ones(64).data_ptr()
    calls: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
        (
            "outer_attention_backward",
            {"qkv": p, "grad": p, "grad_qkv": p, "io_dtype": 0, "compute_dtype": 0, "batch": 1, "n": 2,
             "heads": 1, "head_dim": 2, "scale": 1.0, "threads": 1},
            change, message,
        )
        for change, message in (
            ({"heads": 0}, "heads"), ({"grad": 0}, "must not be null"), ({"io_dtype": 2}, "dtype code 2"),
        )
    ] + [
        (
            "layer_norm_backward",
            {"x": p, "residual": p, "grad": p, "x_dtype": 0, "grad_dtype": 0, "weight": p, "bias": p,
             "weight_dtype": 0, "grad_x": 0, "out": 0, "grad_weight": 0, "grad_bias": 0, "rows": 2, "d": 4,
             "eps": 1e-5, "threads": 1},
            change, message,
        )
        for change, message in (
            ({"rows": 0}, "rows"), ({"x": 0}, "must not be null"), ({"residual": 0, "grad_x": p}, "residual"),
        )
    ] + [
        (
            "gelu_backward",
            {"h": p, "grad": p, "out": 0, "dtype": 0, "grad_bias": 0, "rows": 2, "hidden": 4, "threads": 1},
            change, message,
        )
        for change, message in (({"hidden": 0}, "hidden"), ({"h": 0}, "must not be null"))
    ]  # fmt: skip
    for name, values, change, message in calls:
        function = getattr(module, name)
        with pytest.raises(ValueError, match=f"{name}: .*{message}|{message}"):
            function(**{**values, **change})
