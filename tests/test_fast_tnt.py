"""FastTNT against the reference, golden data and float64, and where it has to leave the fast path."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import warnings

import golden_cases
import pytest
import torch
import torch.nn.functional as F
from model_cases import (
    AUTHORS,
    IMAGE,
    TIMM,
    Adapted,
    assert_near,
    images,
    make,
    randomize,
    without_inner_dropout,
)
from oracle import assert_as_accurate
from torch import nn

import tnt_kernels
from tnt_kernels import TNT, FastTNT, tnt_s_patch16_224, use_backend
from tnt_kernels._timm import import_timm
from tnt_kernels.models import fused
from tnt_kernels.models.fast_tnt import FastBlock
from tnt_kernels.models.tnt import DropPath

pytestmark = pytest.mark.usefixtures("needs_native")


def pair(**kwargs) -> tuple[TNT, FastTNT]:
    """A reference and a FastTNT of the same weights, in eval mode."""
    reference = randomize(TNT(**{**AUTHORS, **kwargs}))
    fast = FastTNT(**{**AUTHORS, **kwargs}).eval()
    fast.load_state_dict(reference.state_dict())
    return reference, fast


@pytest.fixture
def class_tokens(monkeypatch) -> list:
    """Grows by one whenever a last block computes its class token alone."""
    calls = []
    own = fused.class_token_block
    monkeypatch.setattr(
        fused, "class_token_block", lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
    )
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", golden_cases.TNT_CASES)
def test_golden(name, dtype):
    golden = golden_cases.load(name)
    model = FastTNT(**golden.kwargs).to(dtype).eval()
    model.load_state_dict(golden.weights)
    x = golden.input.to(dtype)
    with torch.no_grad():
        assert_near(model.forward_features(x), golden.features.to(dtype))
        assert_near(model(x), golden.logits.to(dtype))


@pytest.mark.parametrize("name", golden_cases.TNT_CASES)
def test_golden_gradients_in_float64(name):
    golden = golden_cases.load(name)
    model = FastTNT(**golden.kwargs).double()
    model.load_state_dict(golden.weights)
    x = golden.input.clone().requires_grad_()
    F.cross_entropy(model(x), golden.target).backward()
    assert_near(x.grad, golden.grad_input, 1e-10)
    for key, grad in golden.grads.items():
        assert_near(model.get_parameter(key).grad, grad, 1e-10)


ARGUMENTS = [
    {},
    {"se": 1},
    {"qkv_bias": True, "qk_scale": 0.3},
    {"num_classes": 0},
    {"depth": 0},
    {"depth": 1},
    {"in_chans": 1},
    {"img_size": 48, "patch_size": 12},
    {"patch_size": (16, 24)},
    {"patch_size": 8, "inner_stride": 2},
    {"img_size": (37, 53)},
    {"mlp_ratio": 2.5},
    {"inner_dim": 10, "inner_num_heads": 5},
    {"norm_layer": lambda width: nn.LayerNorm(width, eps=1e-3)},
    {"norm_layer": nn.RMSNorm},
    {"norm_layer": lambda width: nn.LayerNorm(width, elementwise_affine=False)},
    {"drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.2},
]


@pytest.mark.parametrize("kwargs", ARGUMENTS, ids=str)
def test_every_argument(kwargs):
    reference, fast = pair(**kwargs)
    x = images(channels=reference.patch_embed.in_chans, size=reference.patch_embed.img_size)
    with torch.no_grad():
        assert_near(fast(x), reference(x))
        assert_near(fast.forward_features(x), reference.forward_features(x))
        for ours, theirs in zip(fast.embed(x), reference.embed(x), strict=True):
            assert_near(ours, theirs)
    assert list(fast.state_dict()) == list(reference.state_dict())
    reference.load_state_dict(fast.state_dict())


def test_published_size():
    """TNT-S: within 1e-4 of eager, and as near to float64 as eager is, in every precision."""
    reference = randomize(tnt_s_patch16_224())
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.5)
    fast = FastTNT.from_reference(reference)
    x = images(2, size=(224, 224))
    with torch.inference_mode():
        eager, ours = reference(x), fast(x)
        assert (ours - eager).abs().max() < 1e-4
        exact = copy.deepcopy(reference).double()(x.double())
        assert_as_accurate(ours, eager, exact, what="float32")
        with torch.autocast("cpu", torch.bfloat16):
            ours, eager = fast(x), reference(x)
            assert ours.dtype == eager.dtype == torch.bfloat16
        assert_as_accurate(ours, eager, exact, what="autocast")
        reference, fast, x = reference.bfloat16(), fast.bfloat16(), x.bfloat16()
        exact = copy.deepcopy(reference).double()(x.double())
        ours, eager = fast(x), reference(x)
        assert ours.dtype == eager.dtype == torch.bfloat16
        assert_as_accurate(ours, eager, exact, what="bfloat16")


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16", "float16"])
@pytest.mark.parametrize("kwargs", [{}, {"qkv_bias": True, "qk_scale": 0.3}], ids=str)
def test_precisions(precision, kwargs):
    reference, fast = pair(num_classes=500, **kwargs)
    x = images(8)
    if precision in ("bfloat16", "float16"):
        dtype = getattr(torch, precision)
        reference, fast, x = reference.to(dtype), fast.to(dtype), x.to(dtype)
    with torch.no_grad():
        exact = copy.deepcopy(reference).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            ours, eager = fast(x), reference(x)
    assert ours.dtype == eager.dtype
    assert_as_accurate(ours, eager, exact, what=precision)


def test_class_token_alone(class_tokens):
    """The last block computes the class token alone, unless someone could see the others."""
    reference, fast = pair(qkv_bias=True)
    x = images()
    with torch.no_grad():
        expected = reference(x)
        assert_near(fast(x), expected)
        assert len(class_tokens) == 1
        seen = []
        for module in (fast.blocks[-1], fast.norm, fast.blocks[-1].outer_mlp):
            handle = module.register_forward_hook(lambda module, args, out: seen.append(out))
            assert_near(fast(x), expected)
            handle.remove()
    assert len(class_tokens) == 1
    blocks, norm, mlp = seen
    assert blocks[1].shape == norm.shape == mlp.shape == (2, 7, 96)


@pytest.mark.parametrize("autocast", [False, True])
def test_class_token_block(autocast):
    """Large means, peaked attention, biases: the class token of the whole block, as exactly."""
    _, fast = pair(qkv_bias=True)
    block = fast.blocks[0]
    with torch.no_grad():
        block.outer_attn.qk.weight.mul_(4)
        block.outer_attn.qk.bias.add_(3)
        arguments = fused.half_arguments(block, getattr(block, fused.PLAN).names.outer)
        tokens = torch.randn(64, 9, 96) * 3 + 5
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            whole = fused.outer.outer_block(tokens, *arguments.parameters, **arguments.options)[:, :1]
            alone = fused.class_token_block(tokens, *arguments.parameters, **arguments.options)
        exact = copy.deepcopy(block).double()
        exact = fused._half(
            exact, getattr(exact, fused.PLAN).names, getattr(exact, fused.PLAN).names.outer, tokens.double()
        )
    assert alone.dtype == whole.dtype
    assert_as_accurate(alone, whole, exact[:, :1])


def test_state_dict_and_weights_follow():
    """Whatever way a parameter changes, the next call sees it."""
    reference, fast = pair()
    x = images()

    def same() -> bool:
        with torch.no_grad():
            reference.load_state_dict(fast.state_dict())
            assert_near(fast(x), reference(x))
        return True

    assert same()
    fast.load_state_dict(randomize(TNT(**AUTHORS), seed=5).state_dict())
    assert same()
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.mul_(1.1)
    assert same()
    fast.blocks[1].outer_attn.proj.weight.data.mul_(0.5)
    assert same()
    fast.blocks[0].outer_mlp.fc1.weight = nn.Parameter(torch.randn(384, 96) * 0.1)
    assert same()
    optimizer = torch.optim.SGD(fast.parameters(), 0.1)
    fast(x).square().mean().backward()
    optimizer.step()
    assert same()
    fast.double().float()
    assert same()
    fast.load_state_dict({key: value.clone() for key, value in reference.state_dict().items()}, assign=True)
    assert same()


def test_nothing_but_parameters_in_the_state():
    _, fast = pair()
    with torch.no_grad():
        fast(images())
    assert list(fast.state_dict()) == list(TNT(**AUTHORS).state_dict())
    assert not list(fast.buffers())


@pytest.mark.parametrize("train", [False, True])
def test_gradients(train):
    """Gradients are those of the reference, down to its dropout outside of the inner halves."""
    rates = {"drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.3}
    reference, fast = map(without_inner_dropout, pair(**rates))
    x = images()
    results = []
    for model in (reference.train(train), fast.train(train)):
        torch.manual_seed(3)
        given = x.clone().requires_grad_()
        out = model(given)
        out.square().sum().backward()
        results.append([out, given.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for theirs, ours in zip(*results, strict=True):
        assert_near(ours, theirs, 2e-5)


def test_gradients_of_the_image_alone():
    reference, fast = pair()
    grads = []
    for model in (reference, fast):
        model.requires_grad_(False)
        x = images().requires_grad_()
        model(x).square().sum().backward()
        grads.append(x.grad)
    assert_near(grads[1], grads[0])


def test_frozen_blocks_run_fused():
    """Fine-tuning the last block leaves the first ones, which need no gradient, to the kernels."""
    reference, fast = pair()
    grads = []
    for model in (reference, fast):
        model.requires_grad_(False)
        model.blocks[-1].requires_grad_(True)
        model(images()).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert_near(grads[1][name], grad, 1e-4)


def test_active_dropout_without_gradients():
    """Monte Carlo dropout: the dropout modules alone are in training mode."""
    models = pair(drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.3)
    reference, fast = map(without_inner_dropout, models)
    outs = []
    for model in (reference, fast):
        for module in model.modules():
            if isinstance(module, (nn.Dropout, DropPath)):
                module.train()
        torch.manual_seed(0)
        with torch.no_grad():
            outs.append(model(images()))
    assert_near(*outs)


HOOKED = [
    "",
    "patch_embed",
    "patch_embed.proj",
    "proj_norm1",
    "proj",
    "pos_drop",
    "blocks.0",
    "blocks.1.inner_attn",
]
HOOKED += [
    "blocks.1.inner_mlp.act",
    "blocks.1.proj",
    "blocks.2.outer_attn.qk",
    "blocks.2.drop_path",
    "norm",
    "head",
]


@pytest.mark.parametrize("name", HOOKED)
def test_hooks(name):
    """A hook sees what it sees in the reference, and may change it."""
    seen = []
    outs = []
    for model in pair():
        model.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(out))
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out: (
                tuple(value * 1.5 for value in out) if isinstance(out, tuple) else out * 1.5
            )
        )
        with torch.no_grad():
            outs.append(model(images()))
    theirs, ours = (out if isinstance(out, tuple) else (out,) for out in (seen[0], seen[len(seen) // 2]))
    for one, two in zip(ours, theirs, strict=True):
        assert_near(one, two)
    assert_near(outs[1], outs[0])


@pytest.mark.parametrize("where", ["forward_pre", "full_backward", "global"])
def test_other_hooks(where):
    _, fast = pair()
    calls = []
    norm = fast.blocks[0].inner_norm1
    if where == "forward_pre":
        handle = norm.register_forward_pre_hook(lambda module, args: calls.append(module))
    elif where == "full_backward":
        handle = norm.register_full_backward_hook(lambda module, *args: calls.append(module))
    else:
        handle = nn.modules.module.register_module_forward_hook(lambda module, *args: calls.append(module))
    with handle, torch.set_grad_enabled(where == "full_backward"):
        out = fast(images())
        if out.requires_grad:
            out.sum().backward()
    assert norm in calls


def test_replaced_modules():
    """An adapter, a parametrization, another activation and a patched forward are honoured."""
    reference, fast = pair()
    x = images()
    for model in (reference, fast):
        torch.manual_seed(0)
        model.blocks[0].inner_attn.qk = Adapted(model.blocks[0].inner_attn.qk)
        model.blocks[2].outer_attn.v = Adapted(model.blocks[2].outer_attn.v)
        nn.utils.parametrizations.weight_norm(model.blocks[1].outer_mlp.fc1)
        model.blocks[1].inner_mlp.act = nn.ReLU()
        proj = model.blocks[0].proj
        proj.forward = lambda x, proj=proj: 2 * F.linear(x, proj.weight)
        model.blocks[2].inner_norm2 = nn.RMSNorm(24)
    with torch.no_grad():
        assert_near(fast(x), reference(x))


def test_backends():
    reference, fast = pair()
    x = images()
    with torch.no_grad():
        expected = reference(x)
        with use_backend("reference"):
            assert torch.equal(fast(x), expected)
        with use_backend("cpu"):
            assert_near(fast(x), expected)
    with torch.no_grad(), use_backend("cpu"), pytest.raises(RuntimeError, match="float64"):
        fast.double()(x.double())


def test_meta_device():
    with torch.device("meta"):
        fast = FastTNT(**AUTHORS)
        assert fast(torch.empty(2, 3, *IMAGE)).shape == (2, 7)
        with torch.no_grad():
            assert fast.eval()(torch.empty(2, 3, *IMAGE)).shape == (2, 7)


def test_images():
    """Batch sizes, strides, wrong images."""
    reference, fast = pair()
    with torch.inference_mode():
        for batch in (0, 1, 5):
            assert_near(fast(images(batch)), reference(images(batch)))
        x = images(3)
        expected = reference(x)
        assert_near(fast(x.to(memory_format=torch.channels_last)), expected)
        assert_near(fast(x.transpose(2, 3).contiguous().transpose(2, 3)), expected)
        assert_near(fast(x[:1].expand(4, -1, -1, -1)), reference(x[:1].expand(4, -1, -1, -1)))
        broken = x.clone()
        broken[1, 0, 0, 0] = torch.nan
        assert fast(broken).isnan().any(dim=1).tolist() == [False, True, False]
        for wrong in (images(size=(48, 48)), images(channels=1), images()[0]):
            with pytest.raises(ValueError, match=r"image must have the shape \[B, 3, 32, 48\]"):
                fast(wrong)


@pytest.mark.parametrize("kind", ["pickle", "deepcopy", "save"])
def test_copies(kind):
    reference, fast = pair(se=1)
    with torch.no_grad():
        fast(images())
    if kind == "pickle":
        twin = pickle.loads(pickle.dumps(fast))
    elif kind == "deepcopy":
        twin = copy.deepcopy(fast)
    else:
        file = io.BytesIO()
        torch.save(fast, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    with torch.no_grad():
        fast.blocks[0].outer_mlp.fc1.weight.zero_()
        assert_near(twin(images()), reference(images()))
    assert type(twin) is FastTNT


def test_compile():
    reference, fast = pair()
    x = images()
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_near(compiled(x), reference(x))
        assert_near(compiled(images(3)), reference(images(3)))
    torch._dynamo.reset()
    handle = fast.blocks[0].outer_attn.register_forward_hook(lambda module, args, out: out * 2)
    changed = torch.compile(fast, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_near(changed(x), fast(x))
        assert not torch.allclose(changed(x), reference(x), atol=1e-3)
    handle.remove()
    torch._dynamo.reset()
    grads = []
    for model in (torch.compile(fast, fullgraph=True, backend="aot_eager"), reference):
        given = x.clone().requires_grad_()
        model(given).square().sum().backward()
        grads.append(given.grad)
    assert_near(*grads)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    reference, fast = pair()
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(fast, (images(2),), dynamic_shapes=({0: batch},), strict=strict)
        assert_near(program.module()(images(5)), reference(images(5)))
        assert any("tnt_kernels" in str(node.target) for node in program.graph.nodes)
        with use_backend("reference"):  # for runtimes that know PyTorch's own operators alone
            program = torch.export.export(fast, (images(2),), strict=strict)
        assert not any("tnt_kernels" in str(node.target) for node in program.graph.nodes)
        assert_near(program.module()(images(2)), reference(images(2)))


def test_functional():
    reference, fast = pair()
    x = images()
    state = dict(randomize(TNT(**AUTHORS), seed=9).named_parameters())
    with torch.no_grad():
        expected = torch.func.functional_call(reference, state, x)
        assert_near(torch.func.functional_call(fast, state, x), expected)
        assert_near(torch.func.vmap(lambda one: fast(one[None])[0])(x), reference(x))
    tangent = torch.func.jvp(fast, (x,), (torch.ones_like(x),))[1]
    assert_near(tangent, torch.func.jvp(reference, (x,), (torch.ones_like(x),))[1])


SOURCES = {
    "ours": lambda: randomize(TNT(**AUTHORS, qk_scale=0.4)),
    "ours_se": lambda: randomize(TNT(**AUTHORS, se=1, mlp_ratio=3.0)),
    "authors": lambda: make("authors", qkv_bias=True, patch_size=8, inner_stride=2),
    "authors_se": lambda: make("authors", se=1),
    "authors_eps": lambda: make("authors", norm_layer=lambda width: nn.LayerNorm(width, eps=1e-3)),
    "timm": lambda: make(
        "timm", drop_path_rate=0.2, attn_drop_rate=0.1, proj_drop_rate=0.3, pos_drop_rate=0.4
    ),
    "timm_features": lambda: make("timm", num_classes=0),
}


@pytest.mark.parametrize("source", SOURCES)
def test_from_reference(source):
    model = SOURCES[source]()
    model.blocks[0].requires_grad_(False)
    fast = FastTNT.from_reference(model)
    x = images()
    with torch.no_grad():
        assert_near(fast(x), model(x))
    assert not fast.training
    assert FastTNT.from_reference(model.train()).training
    frozen = {name.partition(".")[0] for name, p in fast.named_parameters() if not p.requires_grad}
    assert {name for name, p in fast.blocks[0].named_parameters() if p.requires_grad} == set()
    assert frozen <= {"blocks", "outer_tokens"}
    addresses = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in addresses for p in fast.parameters())
    assert all(type(block) is FastBlock for block in fast.blocks)


def test_from_reference_takes_rates_and_dtype():
    model = SOURCES["timm"]().bfloat16()
    fast = FastTNT.from_reference(model)
    assert {p.dtype for p in fast.parameters()} == {torch.bfloat16}
    assert fast.pos_drop.p == 0.4
    block = fast.blocks[-1]
    assert (block.drop_path.drop_prob, block.outer_attn.attn_drop.p) == (pytest.approx(0.2), 0.1)
    assert block.inner_attn.proj_drop.p == block.inner_mlp.drop.p == 0.3


def test_from_reference_refuses():
    timm = import_timm()
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got str"):
        FastTNT.from_reference("tnt_s")
    cases = {
        "got a Linear": nn.Linear(2, 2),
        "legacy": make("timm_legacy"),
        "global_pool='avg'": make("timm", global_pool="avg"),
        r"head_drop\.p=0\.1": make("timm", drop_rate=0.1),
        "RMSNorm": randomize(TNT(**AUTHORS, norm_layer=nn.RMSNorm)),
        "not the exact GELU": _with_relu(make("authors")),
        "computes something else": _with_double_head(make("authors")),
    }
    for message, model in cases.items():
        with pytest.raises(ValueError, match=message):
            FastTNT.from_reference(model)
    assert timm.models.tnt.TNT(**TIMM).global_pool == "token"


def _with_relu(model):
    model.blocks[1].outer_mlp.act = nn.ReLU()
    return model


def _with_double_head(model):
    own = type(model)

    class Doubled(own):
        def forward(self, x):
            return 2 * super().forward(x)

    model.__class__ = Doubled
    return model


def test_threads_share_a_model():
    from concurrent.futures import ThreadPoolExecutor

    reference, fast = pair()
    inputs = [images(seed=seed) for seed in range(8)]
    with torch.no_grad():
        expected = [reference(x) for x in inputs]

    def run(x):
        with torch.no_grad():
            return fast(x)

    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(run, inputs), expected, strict=True):
            assert_near(ours, theirs)


def test_no_warnings():
    _, fast = pair()
    with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stderr(io.StringIO()) as err:
        warnings.simplefilter("error")
        fast(images())
    assert err.getvalue() == ""
    assert fast.patch_embed.img_size == IMAGE


@pytest.mark.parametrize("size", ["ti", "s", "b"])
def test_sizes_have_the_reference_state_dict(size):
    with torch.device("meta"):
        reference = getattr(tnt_kernels, f"tnt_{size}_patch16_224")(depth=1, num_classes=3)
        fast = getattr(tnt_kernels, f"fast_tnt_{size}_patch16_224")(depth=1, num_classes=3)
    assert type(fast) is FastTNT
    shapes = {name: value.shape for name, value in fast.state_dict().items()}
    assert shapes == {name: value.shape for name, value in reference.state_dict().items()}


def test_from_checkpoint_makes_a_fast_model(tmp_path):
    reference, _ = pair()
    torch.save({"state_dict": reference.state_dict()}, tmp_path / "tnt.pth.tar")
    heads = {name: AUTHORS[name] for name in ("inner_num_heads", "outer_num_heads")}
    fast = tnt_kernels.from_checkpoint(tmp_path / "tnt.pth.tar", FastTNT, img_size=IMAGE, **heads).eval()
    assert type(fast) is FastTNT
    x = images(2)
    with torch.no_grad():
        assert_near(fast(x), reference(x))
