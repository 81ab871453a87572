"""The operators as PyTorch sees them: opcheck, fakes, torch.compile, export, transforms, subclasses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import (
    OPS,
    PRECISIONS,
    arguments,
    attention_parameters,
    eager_and_exact,
    inner_parameters,
    operator,
    operator_arguments,
    reference_arguments,
    run,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

from tnt_kernels import ops
from tnt_kernels.backends import reference
from tnt_kernels.dispatch import use_backend

INPUTS = dict.fromkeys(OPS, "x") | {"pixel_embed": "image", "word_to_sentence": "words"}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def with_gradients(values: dict[str, Any]) -> dict[str, Any]:
    return {n: v.detach().requires_grad_() if isinstance(v, torch.Tensor) else v for n, v in values.items()}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_opcheck(op: str, precision: str) -> None:
    dtype, compute = PRECISIONS[precision]
    torch.library.opcheck(operator(op), operator_arguments(op, arguments(op, dtype), compute))


@pytest.mark.parametrize("op", OPS)
def test_opcheck_with_gradients(op: str) -> None:
    torch.library.opcheck(operator(op), operator_arguments(op, with_gradients(arguments(op))))


def optional_arguments(op: str) -> dict[str, Any]:
    """Arguments without what is optional, their input laid out in another order."""
    values = {n: None if n.endswith("_bias") and "norm" not in n else v for n, v in arguments(op).items()}
    if op == "pixel_embed":
        values |= {"bias": None, "position": None, "legacy": True}
        values["image"] = values["image"].to(memory_format=torch.channels_last)
    elif op == "word_to_sentence":
        values |= {"bias": None, "norm2_weight": None, "norm2_bias": None}
        values["tokens"] = values["tokens"][:1].expand(2, -1, -1)
        values["words"] = values["words"].transpose(1, 2).contiguous().transpose(1, 2)
    else:
        values["x"] = values["x"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    return values


@pytest.mark.parametrize("op", OPS)
def test_opcheck_without_optional_arguments(op: str) -> None:
    torch.library.opcheck(operator(op), operator_arguments(op, optional_arguments(op)))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("make", [arguments, optional_arguments])
def test_fake_agrees_with_kernel(op: str, make: Callable[[str], dict[str, Any]]) -> None:
    for precision in PRECISIONS.values():
        values = {n: v.to(precision[0]) if isinstance(v, torch.Tensor) else v for n, v in make(op).items()}
        call = operator_arguments(op, values, precision[1])
        real = operator(op)(*call)
        meta = operator(op)(*[v.to("meta") if isinstance(v, torch.Tensor) else v for v in call])
        with FakeTensorMode() as mode:
            fake = operator(op)(*[mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in call])
        for other in (meta, fake):
            assert (other.shape, other.stride(), other.dtype) == (real.shape, real.stride(), real.dtype)
        assert meta.device.type == "meta"
        assert fake.device.type == "cpu"


def compiled(
    op: str, values: dict[str, Any], backend: Any = "aot_eager", **options: Any
) -> Callable[..., Any]:
    """The public function of some tensor arguments, inside a compiled function that does more."""

    def function(given: dict[str, Any]) -> torch.Tensor:
        return getattr(ops, op)(**given) * 2.0

    return torch.compile(function, backend=backend, fullgraph=True, **options)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("precision", ["float32", "autocast_bfloat16"])
def test_compile(op: str, grad: bool, precision: str) -> None:
    _, autocast = PRECISIONS[precision]
    values = with_gradients(arguments(op)) if grad else arguments(op)
    function = compiled(op, values)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast is not None):
        expected = getattr(ops, op)(**values) * 2.0
        actual = function(values)
    assert actual.requires_grad == grad
    torch.testing.assert_close(actual, expected)
    if grad:
        tensors = [v for v in values.values() if isinstance(v, torch.Tensor)]
        for a, b in zip(
            torch.autograd.grad(actual.sum(), tensors),
            torch.autograd.grad(expected.sum(), tensors),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", OPS)
def test_compiled_graph_holds_the_operator(op: str, needs_native: None) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph

    values = arguments(op)
    with torch.no_grad():
        compiled(op, values, backend=keep)(values)
        assert operator(op) in {node.target for node in graphs[-1].graph.nodes}
        with use_backend("reference"):  # compiled again, since the choice has changed
            compiled(op, values, backend=keep)(values)
        assert operator(op) not in {node.target for node in graphs[-1].graph.nodes}


def test_compiled_function_follows_the_backend(needs_native: None) -> None:
    values = arguments("inner_block")
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled("inner_block", values, backend=counter)
    with torch.no_grad():
        function(values)
        assert counter.frame_count == 1
        with use_backend("reference"):
            function(values)
        assert counter.frame_count == 2
        function(values)
        assert counter.frame_count == 2
    wanting = with_gradients(values)
    for backend in ("auto", "cpu", "reference"):
        with use_backend(backend):
            assert function(wanting).requires_grad
    double = {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in values.items()}
    with use_backend("cpu"), pytest.raises(Exception, match="the cpu backend is forced but cannot run"):
        function(double)


def test_use_backend_inside_a_compiled_function(needs_native: None) -> None:
    values = arguments("inner_block")

    @torch.compile(backend="aot_eager", fullgraph=True)
    def function(x: torch.Tensor) -> torch.Tensor:
        with use_backend("reference"):
            return ops.inner_block(**{**values, "x": x})

    with torch.no_grad():
        expected = run("inner_block", values, backend="reference")
        torch.testing.assert_close(function(values["x"]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("grad", [False, True])
def test_compile_any_batch(op: str, grad: bool) -> None:
    """One graph serves every batch size."""
    counter = CompileCounterWithBackend("aot_eager")
    base = with_gradients(arguments(op)) if grad else arguments(op)
    function = compiled(op, base, backend=counter)
    for batch in (2, 3, 5):
        values = dict(base)
        names = ("words", "tokens") if op == "word_to_sentence" else (INPUTS[op],)
        for name in names:
            whole = values[name].detach()
            values[name] = torch.cat([whole, whole, whole])[: batch * whole.shape[0] // 2].clone()
            torch._dynamo.mark_dynamic(values[name], 0)
        torch.testing.assert_close(function(values), getattr(ops, op)(**values) * 2.0)
    assert counter.frame_count == 1


@pytest.mark.parametrize("op", OPS)
def test_compile_dynamic(op: str) -> None:
    values = arguments(op)
    function = compiled(op, values, dynamic=True)
    torch.testing.assert_close(function(values), getattr(ops, op)(**values) * 2.0)


def test_inductor(needs_native: None) -> None:
    values = arguments("inner_block")
    stem = arguments("pixel_embed")

    @torch.compile(fullgraph=True)
    def network(image: torch.Tensor) -> torch.Tensor:
        words = ops.pixel_embed(**{**stem, "image": image.mul(2.0).sub(1.0)})
        return torch.relu(
            ops.inner_block(**{**values, "x": words.transpose(0, 1).contiguous().transpose(0, 1)})
        )

    def eager(image: torch.Tensor) -> torch.Tensor:
        words = ops.pixel_embed(**{**stem, "image": image.mul(2.0).sub(1.0)})
        return torch.relu(ops.inner_block(**{**values, "x": words}))

    with torch.no_grad():
        torch.testing.assert_close(network(stem["image"]), eager(stem["image"]))


@pytest.mark.parametrize("compiling", [False, True])
def test_bad_arguments_while_compiling(compiling: bool, needs_native: None) -> None:
    values = {**arguments("inner_block"), "norm1_weight": torch.ones(23)}
    call = compiled("inner_block", values) if compiling else lambda given: ops.inner_block(**given)
    with (
        torch.no_grad(),
        pytest.raises(Exception, match=r"norm1_weight must be of shape \[24\], got shape \[23\]"),
    ):
        call(values)


class Network(torch.nn.Module):
    """Image to sentence tokens through every operation."""

    def __init__(self) -> None:
        super().__init__()
        stem, block = arguments("pixel_embed"), arguments("inner_block")
        sentence = arguments("word_to_sentence")
        self.options = {"patch_size": 16, "stride": 4, "num_heads": 4}
        for name in ("weight", "bias", "position"):
            self.register_parameter("stem_" + name, torch.nn.Parameter(stem[name]))
        for name in inner_parameters(2):
            self.register_parameter("block_" + name, torch.nn.Parameter(block[name]))
        for name in ("norm1_weight", "norm1_bias", "weight", "bias", "norm2_weight", "norm2_bias"):
            self.register_parameter("sentence_" + name, torch.nn.Parameter(sentence[name]))
        self.tokens = torch.nn.Parameter(sentence["tokens"][:1])

    def _named(self, prefix: str) -> dict[str, torch.Tensor]:
        return {n.removeprefix(prefix): p for n, p in self.named_parameters() if n.startswith(prefix)}

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        words = ops.pixel_embed(image, **self._named("stem_"), patch_size=16, stride=4)
        words = ops.inner_block(words, **self._named("block_"), num_heads=4)
        tokens = self.tokens.expand(image.shape[0], -1, -1)
        return ops.word_to_sentence(words, tokens, **self._named("sentence_"))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_export(strict: bool, grad: bool, tmp_path: Path, needs_native: None) -> None:
    model, image = Network().eval(), torch.randn(2, 3, 32, 48)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (image,), dynamic_shapes={"image": {0: batch}}, strict=strict)
        targets = {node.target for node in program.graph.nodes}
        assert operator("inner_block") in targets
        path = tmp_path / "program.pt2"
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()
        for images in (2, 5):
            image = torch.randn(images, 3, 32, 48)
            torch.testing.assert_close(loaded(image), model(image))


@pytest.mark.parametrize("op", OPS)
def test_inference_mode(op: str) -> None:
    values = with_gradients(arguments(op))
    expected = run(op, values, backend="auto")
    with torch.inference_mode():
        assert torch.equal(getattr(ops, op)(**values), expected)
        assert torch.equal(operator(op)(*operator_arguments(op, values)), expected)


@pytest.mark.parametrize("op", OPS)
def test_default_device(op: str, needs_native: None) -> None:
    """Memory for results is taken where the arguments are, whatever torch.set_default_device says."""
    values = arguments(op)
    expected = run(op, values)
    for dtype in (torch.float32, torch.float16):
        given = {n: v.to(dtype) if isinstance(v, torch.Tensor) else v for n, v in values.items()}
        with torch.device("meta"):
            out = run(op, given)
        assert out.device.type == "cpu"
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("op", OPS)
def test_meta_tensors(op: str) -> None:
    values = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in arguments(op).items()}
    expected = run(op, arguments(op), backend="auto")
    for grad in (False, True):
        out = getattr(ops, op)(**(with_gradients(values) if grad else values))
        assert (out.device.type, out.shape, out.dtype) == ("meta", expected.shape, expected.dtype)


@pytest.mark.parametrize("op", OPS)
def test_fake_tensors(op: str) -> None:
    expected = run(op, arguments(op), backend="auto")
    with FakeTensorMode(allow_non_fake_inputs=False):
        out = getattr(ops, op)(**arguments(op))
    assert (out.shape, out.dtype, out.stride()) == (expected.shape, expected.dtype, expected.stride())


def calls_of(op: str, values: dict[str, Any]) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """The public function and the operator, as functions of the input alone."""
    name = INPUTS[op]
    return [
        lambda x: getattr(ops, op)(**{**values, name: x}),
        lambda x: operator(op)(*operator_arguments(op, {**values, name: x})),
    ]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("direct", [False, True])
def test_forward_mode(op: str, direct: bool) -> None:
    values = arguments(op, torch.float64)
    x = values[INPUTS[op]]
    tangent = torch.randn_like(x)
    call = calls_of(op, values)[direct]
    step = 1e-6
    expected = (call(x + step * tangent) - call(x - step * tangent)) / (2 * step)
    _, func_tangent = torch.func.jvp(call, (x,), (tangent,))
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(call(forward_ad.make_dual(x, tangent)))
    for actual in (func_tangent, out.tangent):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    single = arguments(op)
    call = calls_of(op, single)[direct]
    x = single[INPUTS[op]]
    with torch.no_grad(), forward_ad.dual_level():
        out = forward_ad.unpack_dual(call(forward_ad.make_dual(x, torch.ones_like(x))))
    assert out.tangent is not None


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("direct", [False, True])
def test_function_transforms(op: str, direct: bool) -> None:
    values = arguments(op)
    name = INPUTS[op]
    call = calls_of(op, values)[direct]
    x = values[name]
    plain = {n: v for n, v in values.items() if n != name}
    inputs = torch.stack([x, x * 0.5, x + 1.0])
    expected = torch.stack([getattr(ops, op)(**plain, **{name: one}) for one in inputs])
    torch.testing.assert_close(torch.func.vmap(call)(inputs), expected, rtol=1e-4, atol=1e-5)

    leaf = x.clone().requires_grad_()
    reference_call = getattr(reference, op)
    out = reference_call(**reference_arguments(op, {**values, name: leaf}))
    gradient = torch.autograd.grad(out.square().sum(), leaf)[0]
    torch.testing.assert_close(torch.func.grad(lambda v: call(v).square().sum())(x), gradient)
    per_sample = torch.func.vmap(torch.func.grad(lambda v: call(v).square().sum()))(inputs)
    torch.testing.assert_close(per_sample[0], gradient, rtol=1e-4, atol=1e-4)


def test_second_derivative() -> None:
    values = {
        n: v.double() if isinstance(v, torch.Tensor) else v
        for n, v in {"x": torch.randn(1, 2, 4), **attention_parameters(4), "num_heads": 2}.items()
    }
    x = values["x"].requires_grad_()
    for call in calls_of("inner_attention", values):
        assert torch.autograd.gradgradcheck(call, (x,))


class Tagged(torch.Tensor):
    """A subclass that keeps itself through torch's functions."""


class Wrapped(torch.Tensor):
    """A wrapper of another tensor, as sharded or quantised tensors are."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Wrapped, lambda v: v.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, Wrapped, func(*args, **kwargs))


@pytest.mark.parametrize("op", OPS)
def test_tensor_subclasses(op: str, needs_native: None) -> None:
    values = arguments(op)
    name = INPUTS[op]
    expected = run(op, values, backend="reference")
    with torch.no_grad():
        out = getattr(ops, op)(**{**values, name: values[name].as_subclass(Tagged)})
        assert type(out) is Tagged
        torch.testing.assert_close(out.as_subclass(torch.Tensor), expected, rtol=0, atol=0)
        out = getattr(ops, op)(**{**values, name: Wrapped(values[name])})
        assert type(out) is Wrapped
        torch.testing.assert_close(out.inner, expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="Tagged, not a plain tensor"):
        run(op, {**values, name: values[name].as_subclass(Tagged)}, backend="cpu")


@pytest.mark.parametrize("op", OPS)
def test_operator_keeps_to_its_compute_dtype(op: str, needs_native: None) -> None:
    """Ambient autocast has no influence on a direct call, with or without gradients."""
    values = arguments(op)
    expected = run(op, values)
    _, exact = eager_and_exact(op, values)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = operator(op)(*operator_arguments(op, values))
        recorded = operator(op)(*operator_arguments(op, with_gradients(values)))
    assert torch.equal(out, expected)
    torch.testing.assert_close(recorded.detach().double(), exact, rtol=1e-4, atol=1e-4)


def test_profiler_names_the_operator(needs_native: None) -> None:
    values = arguments("inner_block")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run("inner_block", values)
    assert "tnt_kernels::inner_block" in {event.key for event in profile.key_averages()}
