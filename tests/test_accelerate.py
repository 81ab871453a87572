"""accelerate, restore and explain: the same answers, nothing else touched, and every way back."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import golden_cases
import pytest
import torch
import torch.nn.functional as F
from model_cases import (
    IMAGE,
    TIMM,
    USERS_MODELS,
    Adapted,
    assert_near,
    images,
    make,
    randomize,
    without_inner_dropout,
)
from oracle import assert_as_accurate
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from user_models import huawei_style

from tnt_kernels import TNT, FastTNT, accelerate, gpu, native, restore, use_backend
from tnt_kernels._timm import import_timm
from tnt_kernels.models import fused, proof
from tnt_kernels.models.explain import explain

pytestmark = pytest.mark.usefixtures("needs_native")


def snapshot(model: nn.Module) -> list:
    """Class and attributes of every module, by identity."""
    return [
        (name, type(module), {key: id(value) for key, value in module.__dict__.items()})
        for name, module in model.named_modules()
    ]


def fused_modules(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if hasattr(type(module), fused.PLAN)}


EVERYTHING = {"", "pixel_embed", "patch_embed", "blocks.0", "blocks.1", "blocks.2"}


@pytest.mark.parametrize("kind", USERS_MODELS)
def test_same_answers(kind, counted):
    model = make(kind)
    x = images()
    with torch.no_grad():
        expected, features = model(x), model.forward_features(x)
        assert accelerate(model) is model
        counted.clear()
        assert_near(model(x), expected)
        assert counted == {
            "pixel_embed": 1,
            "inner_block": 3,
            "word_to_sentence": 4,
            "outer_block": 2,
            "class_token_block": 1,
        }
        assert_near(model.forward_features(x), features)
    assert fused_modules(model) <= EVERYTHING
    assert len(fused_modules(model)) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*golden_cases.TIMM_CASES, "plain", "bias_scale_se", "words_9_odd_patch"])
def test_golden(name, dtype):
    golden = golden_cases.load(name)
    if name in golden_cases.TIMM_CASES:
        model = import_timm().models.tnt.TNT(**golden.kwargs)
    else:
        sizes = {key: tuple(v) if isinstance(v, list) else v for key, v in golden.kwargs.items()}
        model = huawei_style.TNT(**sizes)
    model.load_state_dict(golden.weights)
    model = accelerate(model.to(dtype).eval())
    x = golden.input.to(dtype)
    with torch.no_grad():
        assert_near(model(x), golden.logits.to(dtype))
        assert_near(model.forward_features(x), golden.features.to(dtype))


@pytest.mark.parametrize("name", ["tnt_s_patch16_224", "tnt_s_legacy_patch16_224"])
def test_timm_as_registered(name):
    model = randomize(import_timm().create_model(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.5)
    x = images(1, size=(224, 224))
    exact_model = copy.deepcopy(model).double()
    with torch.inference_mode():
        eager = model(x)
        ours = accelerate(model)(x)
        assert (ours - eager).abs().max() < 1e-4
        exact = exact_model(x.double())
        assert_as_accurate(ours, eager, exact, what="float32")
        with torch.autocast("cpu", torch.bfloat16):
            ours = model(x)
            eager = restore(model)(x)
        assert ours.dtype == eager.dtype == torch.bfloat16
        assert_as_accurate(ours, eager, exact, what="autocast")


@pytest.mark.parametrize("kind", USERS_MODELS)
def test_nothing_else_changes(kind):
    model = make(kind)
    model.blocks[0].register_forward_hook(lambda *args: None)
    before, shown = snapshot(model), repr(model)
    state = {key: value.data_ptr() for key, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    rng = torch.get_rng_state()

    accelerate(model)
    assert torch.equal(torch.get_rng_state(), rng)
    assert repr(model) == shown
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == state
    for (name, _, attributes), now in zip(before, snapshot(model), strict=True):
        assert (name, attributes) == (now[0], now[2])
    for module, own in zip(model.modules(), classes, strict=True):
        assert isinstance(module, own)
        assert (type(module).__name__, type(module).__qualname__) == (own.__name__, own.__qualname__)
        assert (type(module).__module__, type(module).__doc__) == (own.__module__, own.__doc__)

    with torch.no_grad():
        model(images())
    again = snapshot(model)
    assert snapshot(accelerate(model)) == again
    assert restore(model) is model
    assert snapshot(model) == before
    assert snapshot(restore(model)) == before


def test_pooling_and_heads():
    x = images()
    for pool in ("", "avg", "token"):
        model = make("timm", global_pool=pool)
        with torch.no_grad():
            expected = model(x)
            assert_near(accelerate(model)(x), expected)
    for pool in ("avg", "", "token"):
        model.reset_classifier(5, pool)
        randomize(model)
        with torch.no_grad():
            ours = model(x)
            assert_near(ours, restore(model)(x))
        accelerate(model)


@pytest.mark.parametrize("kind", ["timm", "timm_legacy"])
def test_timm_interfaces(kind, counted):
    model = make(kind)
    x = images()
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=[0, 2], norm=True, return_prefix_tokens=True)
        accelerate(model)
        counted.clear()
        ours = model.forward_intermediates(x, indices=[0, 2], norm=True, return_prefix_tokens=True)
        assert counted["outer_block"] == 3
        assert_near(ours[0], expected[0])
        for one, two in zip(ours[1], expected[1], strict=True):
            assert_near(one[0], two[0])
            assert_near(one[1], two[1])
        model.prune_intermediate_layers([0])
        short = model(x)
        assert_near(short, restore(model)(x))


def test_timm_features_only():
    kwargs = dict(TIMM)
    kwargs.pop("num_classes")
    model = import_timm().create_model("tnt_s_patch16_224", features_only=True, out_indices=(0, 2), **kwargs)
    randomize(model)
    x = images()
    with torch.no_grad():
        expected = model(x)
        accelerate(model)
        assert len([name for name in fused_modules(model) if "blocks" in name]) == 3
        for ours, theirs in zip(model(x), expected, strict=True):
            assert_near(ours, theirs)


def test_gradient_checkpointing():
    model = make("timm", drop_path_rate=0.2).train()
    model.set_grad_checkpointing(True)
    results = []
    for change in (lambda model: model, accelerate):
        change(model)
        model.zero_grad()
        torch.manual_seed(0)
        model(images()).square().sum().backward()
        results.append([parameter.grad.clone() for parameter in model.parameters()])
    for theirs, ours in zip(*results, strict=True):
        assert_near(ours, theirs, 2e-5)


@pytest.mark.parametrize("kind", USERS_MODELS)
def test_training(kind):
    """A model has the gradients that it had, whatever its dropout outside of the inner halves."""
    rates = {"drop_rate" if kind == "authors" else "proj_drop_rate": 0.1, "drop_path_rate": 0.3}
    results = []
    for change in (lambda model: model, accelerate):
        model = change(without_inner_dropout(make(kind, **rates))).train()
        torch.manual_seed(3)
        x = images().requires_grad_()
        out = model(x)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for theirs, ours in zip(*results, strict=True):
        assert_near(ours, theirs, 2e-5)


@pytest.mark.parametrize("kind", USERS_MODELS)
def test_dropout_without_gradients(kind):
    """A part of a model left in training mode, and Monte Carlo dropout."""
    model = without_inner_dropout(make(kind, attn_drop_rate=0.1, drop_path_rate=0.3))
    model.blocks[1].train()
    outs = []
    for change in (lambda model: model, accelerate):
        torch.manual_seed(0)
        with torch.no_grad():
            outs.append(change(model)(images()))
    assert_near(outs[1], outs[0])


def test_inside_a_larger_model():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleDict({"a": make("timm"), "b": make("authors")})
            self.mix = nn.Linear(14, 3)

        def forward(self, x):
            return self.mix(torch.cat([branch(x) for branch in self.branches.values()], dim=1))

    model = Two().eval()
    before = snapshot(model)
    with torch.no_grad():
        expected = model(images())
        assert_near(accelerate(model)(images()), expected)
    assert len(fused_modules(model)) == 10
    assert snapshot(restore(model)) == before

    block = make("authors").blocks[0]  # a block alone, and one that is used twice
    twice = nn.Sequential(nn.ModuleList([block, block]))
    accelerate(twice)
    assert fused_modules(twice) == {"0.0"}


@pytest.mark.parametrize("kind", USERS_MODELS)
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "save"])
def test_copies(kind, how):
    model = accelerate(make(kind))
    with torch.no_grad():
        expected = model(images())
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    elif how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert fused_modules(twin) == fused_modules(model)
    with torch.no_grad():
        model.blocks[0].proj.weight.zero_()
        assert torch.equal(twin(images()), expected)
        assert_near(restore(twin)(images()), expected)
    assert not fused_modules(twin)


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace warns of Python numbers in a user's own code, too
@pytest.mark.parametrize("kind", USERS_MODELS)
def test_compile_and_export(kind):
    model = make(kind)
    x = images()
    with torch.no_grad():
        expected = model(x)
        accelerate(model)
        torch._dynamo.reset()
        assert_near(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
        program = torch.export.export(model, (x,))
        assert any("inner_block" in str(node.target) for node in program.graph.nodes)
        assert_near(program.module()(x), expected)
        traced = torch.jit.trace(model, x, check_trace=False)
        assert_near(traced(x), expected)
        assert "tnt_kernels" not in str(traced.inlined_graph)


def test_functional():
    model = make("timm")
    x = images()
    state = dict(make("timm", depth=3).named_parameters())
    with torch.no_grad():
        expected = torch.func.functional_call(model, state, x)
        each = torch.func.vmap(lambda one: model(one[None])[0])(x)
        accelerate(model)
        assert_near(torch.func.functional_call(model, state, x), expected)
        assert_near(torch.func.vmap(lambda one: model(one[None])[0])(x), each)
    graph = torch.fx.symbolic_trace(model.blocks[0])
    assert not any("tnt_kernels" in str(node.target) for node in graph.graph.nodes)


@pytest.mark.parametrize("where", ["attn_in", "mlp_in.act", "proj", "attn_out.qk", "drop_path", "norm_mlp"])
def test_hooks_run_and_act(where):
    outs = []
    for change in (lambda model: model, accelerate):
        model = change(make("timm"))
        model.blocks[1].get_submodule(where).register_forward_hook(lambda module, args, out: out * 1.5)
        with torch.no_grad():
            outs.append(model(images()))
    assert_near(outs[1], outs[0])


def test_hooks_on_the_way():
    """Hooks on accelerated modules themselves, and on those around them, see what they saw."""
    names = [
        "pixel_embed",
        "norm1_proj",
        "proj",
        "norm2_proj",
        "pos_drop",
        "blocks.0",
        "blocks.2",
        "norm",
        "head_drop",
        "head",
    ]
    records = []
    for change in (lambda model: model, accelerate):
        model = change(make("timm"))
        seen = {}
        for name in names:
            model.get_submodule(name).register_forward_hook(
                lambda module, args, out, name=name, seen=seen: seen.update({name: out})
            )
        with torch.no_grad():
            model(images())
        records.append(seen)
    for name in names:
        theirs, ours = (record[name] for record in records)
        for one, two in zip(
            *([out] if isinstance(out, torch.Tensor) else out for out in (ours, theirs)), strict=True
        ):
            assert_near(one, two)


def test_changes_after_accelerating():
    """What a user does to an accelerated model acts as it would on their own."""
    outs = []
    for change in (lambda model: model, accelerate):
        model = change(make("timm"))
        torch.manual_seed(0)
        model.blocks[0].attn_in.proj = Adapted(model.blocks[0].attn_in.proj)
        nn.utils.parametrizations.weight_norm(model.blocks[0].mlp.fc2)
        model.blocks[0].mlp_in.act.approximate = "tanh"
        model.blocks[1].mlp.act = nn.SiLU()
        model.blocks[1].norm1_proj = nn.Identity()
        model.blocks[1].attn_in.scale = 0.7
        model.blocks[2].norm_mlp = nn.RMSNorm(96)
        model.blocks[2].attn_out.num_heads, model.blocks[2].attn_out.head_dim = 6, 16
        model.blocks[2].norm_out.eps = 1e-2
        model.blocks[2].mlp_in.fc1 = nn.Linear(24, 40)
        model.blocks[2].mlp_in.fc2 = nn.Linear(40, 24)
        model.blocks[2].norm_out.bias = None
        model.norm = nn.RMSNorm(96)
        model.head = nn.Sequential(nn.Linear(96, 8), nn.ReLU())
        with torch.no_grad():
            model.patch_pos.add_(1)
            model.pixel_embed.proj.weight.mul_(2)
            model.head[0].weight.fill_(0.1)
            outs.append(model(images()))
    assert_near(outs[1], outs[0])


def test_pixel_embedding_replaced():
    class Zero(nn.Module):
        def __init__(self, own):
            super().__init__()
            self.proj, self.img_size, self.patch_size = own.proj, own.img_size, own.patch_size

        def forward(self, x, *position):
            return torch.zeros(x.shape[0] * 6, 16, 24)

    for model in (accelerate(make("authors")), FastTNT.from_reference(make("authors"))):
        model.patch_embed = Zero(model.patch_embed)
        model.patch_embed.check_image = lambda x: None
        with torch.no_grad():
            assert torch.equal(model(images(2, seed=1)), model(images(2, seed=2)))


def test_casts_of_a_users_forward():
    """Weights of two dtypes, which PyTorch's layers would refuse without the user's casts."""

    class Cast(nn.Linear):
        def forward(self, x):
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)

    class Casting(huawei_style.Attention):
        def forward(self, x):
            return super().forward(x.to(self.qk.weight.dtype)).to(x.dtype)

    model = make("authors")
    for block in model.blocks:
        block.outer_attn.__class__ = Casting
        block.inner_mlp.fc1.__class__ = Cast
    accelerate(model)
    for block in model.blocks:
        block.outer_attn.bfloat16()
        block.inner_mlp.fc1.bfloat16()
    with torch.no_grad():
        ours = model(images())
        assert "several dtypes" in "".join(part.why for part in explain(model).parts)
        assert_near(ours, restore(model)(images()), 1e-2)  # of bfloat16


def test_switches_of_a_users_class():
    """A setting that the test run cannot have seen takes its module off the fast path."""

    class Switched(huawei_style.Block):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.doubled = False

        def forward(self, inner_tokens, outer_tokens):
            words, sentences = super().forward(inner_tokens, outer_tokens)
            return words, sentences * 2 if self.doubled else sentences

    model = accelerate(make("authors", block_class=Switched))
    assert len(fused_modules(model)) == 5
    model.blocks[1].doubled = True
    with torch.no_grad():
        ours = model(images())
        assert_near(ours, restore(model)(images()))


class Scaled(huawei_style.Block):
    def forward(self, inner_tokens, outer_tokens):
        words, sentences = super().forward(inner_tokens, outer_tokens)
        return words, sentences * 1.01


class PostNorm(huawei_style.Block):
    def forward(self, x, z):
        x = x + self.inner_norm1(self.inner_attn(x))
        x = x + self.inner_norm2(self.inner_mlp(x))
        s = self.proj_norm2(self.proj(self.proj_norm1(x.reshape(z.shape[0], z.shape[1] - 1, -1))))
        z = torch.cat([z[:, :1], z[:, 1:] + s], 1)
        z = z + self.outer_norm1(self.outer_attn(z))
        return x, z + self.outer_norm2(self.outer_mlp(z))


class NoClassToken(huawei_style.Block):
    def forward(self, x, z):
        x, y = super().forward(x, z)
        return x, torch.cat([z[:, :1], y[:, 1:]], 1)


class TanhGelu(huawei_style.Mlp):
    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class TanhBlock(huawei_style.Block):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.outer_mlp = TanhGelu(
            self.outer_norm1.normalized_shape[0], 4 * self.outer_norm1.normalized_shape[0]
        )


class Remembering(huawei_style.Attention):
    def forward(self, x):
        self.last = x
        return super().forward(x)


class RememberingBlock(huawei_style.Block):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.outer_attn.__class__ = Remembering


class Collecting(huawei_style.Block):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.collected = []

    def forward(self, x, z):
        self.collected.append(1)
        return super().forward(x, z)


class ThreeResults(huawei_style.Block):
    def forward(self, x, z):
        return [*super().forward(x, z), None]


class Demanding(huawei_style.Block):
    def forward(self, x, z):
        assert z.shape[1] == 7, "seven tokens wanted"
        return super().forward(x, z)


class LayerScaled(huawei_style.Block):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gamma = nn.Parameter(torch.ones(96))

    def forward(self, x, z):
        x, z = super().forward(x, z)
        return x, z * self.gamma


class Silu(huawei_style.Block):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "act_layer": nn.SiLU})
        self.proj_norm2 = nn.Identity()


LIARS = {
    Scaled: "computes something else",
    PostNorm: "computes something else",
    NoClassToken: "computes something else",
    TanhBlock: "computes something else",
    RememberingBlock: "stores outer_attn.last",
    Collecting: "stores collected",
    ThreeResults: "returns something else",
    Demanding: "seven tokens wanted",
    LayerScaled: "it has gamma",
    Silu: "not ",
}


@pytest.mark.filterwarnings("ignore:no TNT block can be accelerated")
@pytest.mark.parametrize("block", LIARS, ids=lambda block: block.__name__)
def test_blocks_of_another_kind(block):
    """The names of a TNT block, but not its function: the block stays as it is, and explain says why."""
    if block is ThreeResults:
        module = huawei_style.Block(96, 24, 3, 4, 16)
        module.__class__ = ThreeResults
        accelerate(module)
        assert not fused_modules(module)
        return
    model = make("authors", block_class=block, depth=2)
    with torch.no_grad():
        before = model(images())
        for module in model.modules():
            if isinstance(module, Collecting):
                module.collected.clear()
        accelerate(model)
        assert not any(name.startswith("blocks") for name in fused_modules(model))
        assert not [1 for module in model.modules() if getattr(module, "collected", None)]
        assert_near(model(images()), before)
    whys = [part.why for part in explain(model).parts if part.module == "blocks.0"]
    assert whys
    assert all(LIARS[block] in why for why in whys), whys


def test_one_block_of_another_kind():
    """Blocks alike in all but a private attribute are proved one by one."""

    class Flagged(huawei_style.Block):
        _flag = False

        def forward(self, x, z):
            x, z = super().forward(x, z)
            return x, z * 2 if self._flag else z

    model = make("authors", block_class=Flagged)
    for index, block in enumerate(model.blocks):
        block._flag = index == 1
    with torch.no_grad():
        expected = model(images())
        assert_near(accelerate(model)(images()), expected)
    assert {name for name in fused_modules(model) if "blocks" in name} == {"blocks.0", "blocks.2"}


def test_only_training_differs():
    class Noisy(huawei_style.Block):
        def forward(self, x, z):
            x, z = super().forward(x, z)
            return x, z + 1 if self.training else z

    model = accelerate(make("authors", block_class=Noisy))
    assert len(fused_modules(model)) == 5
    with torch.no_grad():
        for train in (False, True):
            model.train(train)
            ours = model(images())
            assert_near(ours, restore(model)(images()))
            accelerate(model)


def test_unusual_parts_run_as_written():
    """Where one half of a block is of another kind, the other still runs fused."""
    model = make("timm", global_pool="avg")
    for block in model.blocks:
        block.mlp_in.act = nn.ReLU()
    with torch.no_grad():
        expected = model(images())
        assert_near(accelerate(model)(images()), expected)
        rows = {part.part: part for part in explain(model).parts if part.module in ("", "blocks.0")}
    assert "uses more than the class token" in rows["stem"].why
    assert not rows["inner half"].fused
    assert "mlp_in.act is ReLU" in rows["inner half"].why
    assert rows["projection"].fused
    assert rows["outer half"].fused


def test_model_around_the_blocks():
    """A model that reads its blocks in another way keeps its own forward; its blocks run fused."""

    class Mean(huawei_style.TNT):
        def forward(self, x):
            words = self.patch_embed(x) + self.inner_pos
            tokens = self.proj_norm2(
                self.proj(self.proj_norm1(words.flatten(1).view(x.shape[0], self.num_patches, -1)))
            )
            tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), tokens], 1) + self.outer_pos
            total = 0
            for block in self.blocks:
                words, tokens = block(words, tokens)
                total = total + tokens
            return self.head(self.norm(total)[:, 0])

    model = randomize(
        Mean(img_size=IMAGE, outer_dim=96, inner_dim=24, depth=3, outer_num_heads=3, num_classes=7)
    )
    with torch.no_grad():
        expected = model(images())
        assert_near(accelerate(model)(images()), expected)
    assert fused_modules(model) == {"patch_embed", "blocks.0", "blocks.1", "blocks.2"}


def test_whole_image_convolution_is_recognised_by_a_run():
    class Whole(huawei_style.PatchEmbed):
        def forward(self, x):
            words = nn.functional.unfold(self.proj(x), 4, stride=4).transpose(1, 2)
            return words.reshape(x.shape[0] * self.num_patches, self.inner_dim, -1).transpose(1, 2)

    model = make("authors")
    model.patch_embed.__class__ = Whole
    with torch.no_grad():
        expected = model(images())
        assert_near(accelerate(model)(images()), expected)
    assert getattr(type(model.patch_embed), fused.PLAN).legacy


def test_images():
    model = make("timm")
    with torch.inference_mode():
        expected = {batch: model(images(batch)) for batch in (1, 3)}
        accelerate(model)
        for batch, wanted in expected.items():
            assert_near(model(images(batch).to(memory_format=torch.channels_last)), wanted)
        with pytest.raises(AssertionError, match="doesn't match model"):
            model(images(size=(48, 48)))
        assert model(images(0)).shape == (0, 7)


def test_backends():
    model = make("timm")
    x = images()
    with torch.no_grad():
        expected = model(x)
        accelerate(model)
        with use_backend("reference"):
            assert torch.equal(model(x), expected)
        with use_backend("cpu"):
            assert_near(model(x), expected)


def test_meta_and_double_models():
    model = import_timm().models.tnt.TNT(**TIMM, device="meta")
    assert len(fused_modules(accelerate(model))) == 5
    model.to_empty(device="cpu")
    randomize(model).double()
    with torch.no_grad():
        ours = model(images().double())
        assert torch.equal(ours, restore(model)(images().double()))


def test_test_run_is_cheap_and_alone(monkeypatch):
    """One run for each kind of block, and never of the user's module."""
    runs = []
    own = proof.prove_block
    module = __import__("tnt_kernels.models.accelerate", fromlist=["prove_block"])
    monkeypatch.setattr(module, "prove_block", lambda *args: runs.append(1) or own(*args))
    model = make("authors", depth=6)
    for child in model.modules():
        child.register_forward_hook(lambda *args: pytest.fail("a hook of the user's was called"))
        child.register_forward_pre_hook(lambda *args: pytest.fail("a hook of the user's was called"))
    accelerate(model)
    assert len(runs) == 1


def test_without_the_native_module(monkeypatch):
    model = make("timm")
    with torch.no_grad():
        expected = model(images())
        accelerate(model)
        monkeypatch.setattr(native, "_module", None)
        monkeypatch.setattr(native, "_reason", "the native module is not built")
        monkeypatch.setattr(native, "_warned", False)
        with pytest.warns(RuntimeWarning, match="not built"):
            assert torch.equal(model(images()), expected)
        assert {part.why for part in explain(model).parts} == {"the native module is not built"}
        with use_backend("cpu"), pytest.raises(RuntimeError, match="not built"):
            model(images())


def test_errors():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got str"):
        accelerate("tnt_s")
    with pytest.raises(ValueError, match=r"nothing to accelerate in Sequential: .*outer_norm1.*norm_out"):
        accelerate(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="got int"):
        restore(3)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(make("timm"), images())
    with pytest.raises(ValueError, match="nothing to accelerate"):
        accelerate(script)
    with pytest.raises(ValueError, match="must be a TNT"):
        FastTNT.from_reference(script)
    model = make("authors", norm_layer=nn.RMSNorm)
    with pytest.warns(UserWarning, match=r"blocks\.0, blocks\.1, blocks\.2: inner_norm1 is a RMSNorm"):
        accelerate(model)
    assert not fused_modules(model) - {"", "patch_embed"}


def test_fast_tnt_and_reference():
    fast = FastTNT(img_size=IMAGE, outer_dim=96, inner_dim=24, depth=2, outer_num_heads=3)
    before = snapshot(fast)
    assert accelerate(fast) is fast
    assert snapshot(fast) == before
    assert restore(fast) is fast
    assert snapshot(fast) == before
    model = randomize(TNT(img_size=IMAGE, outer_dim=96, inner_dim=24, depth=2, outer_num_heads=3))
    with torch.no_grad():
        expected = model(images())
        assert_near(accelerate(model)(images()), expected)


def test_explain_before_and_after():
    model = make("timm")
    before = explain(model)
    assert {part.runs for part in before.parts} == {"as written"}
    assert all("not accelerated" in part.why for part in before.parts)
    assert not fused_modules(model)
    accelerate(model)
    with torch.no_grad():
        parts = explain(model).parts
        assert all(part.fused and part.runs == "cpu" for part in parts), parts
        assert [part.part for part in parts if part.module == "blocks.1"] == [
            "inner half",
            "projection",
            "outer half",
        ]
        text = str(explain(model))
    assert "blocks.0 to blocks.2" in text
    assert "mode: eval" in text
    assert "gradients: recorded" in str(explain(model))
    assert all(part.fused for part in explain(model).parts)


def test_explain_says_why():
    def whys(module="blocks.1") -> dict[str, str]:
        return {part.part: part.why for part in explain(model).parts if part.module == module}

    model = accelerate(make("timm", attn_drop_rate=0.1))
    with torch.no_grad():
        handle = model.blocks[1].attn_out.register_forward_hook(lambda *args: None)
        assert whys() == {"inner half": "", "projection": "", "outer half": "attn_out has a forward hook"}
        handle.remove()
        model.blocks[1].attn_in.qk = Adapted(model.blocks[1].attn_in.qk)
        assert whys()["inner half"] == "attn_in.qk is a Adapted and was a Linear"
        with use_backend("reference"):
            assert "reference backend" in whys()["outer half"]
        model.train()
        assert whys()["inner half"] == "attn_in.qk is a Adapted and was a Linear"
        assert whys()["projection"] == ""
        assert whys()["outer half"] == "attn_out.attn_drop is active (p=0.1)"
        assert whys("") == {"stem": "", "last block, class token alone": whys()["outer half"]}
        model.eval().double()
        assert "float64" in whys()["outer half"]
        with use_backend("cpu"):
            assert next(part for part in explain(model).parts if part.module == "pixel_embed").runs == "error"
    assert "no blocks with the children" in str(explain(nn.Linear(2, 2)))
    squeezed = FastTNT(img_size=IMAGE, outer_dim=96, inner_dim=24, depth=2, outer_num_heads=3, se=1).eval()
    with torch.no_grad():
        found = {part.part: part for part in explain(squeezed).parts if part.module == "blocks.0"}
    assert "squeeze" in found["outer half"].why
    assert found["inner half"].fused


def test_explanation_agrees_with_what_runs(counted):
    """The parts said to run fused are those that do."""
    model = accelerate(make("timm"))
    model.blocks[0].mlp_in.drop1.register_forward_hook(lambda *args: None)
    model.blocks[1].norm2_proj = nn.Identity()
    model.blocks[2].attn_out.proj.register_forward_pre_hook(lambda *args: None)
    with torch.no_grad():
        said = [part.part for part in explain(model).parts if part.fused]
        counted.clear()
        model(images())
    assert counted.get("inner_block", 0) == said.count("inner half") == 2
    assert counted.get("word_to_sentence", 0) == said.count("projection") + said.count("stem") == 3
    assert counted.get("outer_block", 0) == said.count("outer half") == 2
    assert counted.get("pixel_embed", 0) == said.count("pixel embedding") == 1


def test_explain_of_a_model_on_a_gpu(monkeypatch):
    """Its parameters are fake tensors here: only their device is looked at."""
    model = accelerate(make("authors"))
    with FakeTensorMode():
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device="cuda"))

    def runs():
        with torch.no_grad():
            return {(part.part, part.runs, part.why) for part in explain(model).parts}

    monkeypatch.setattr(gpu, "why_unusable", lambda index: None)
    assert ("inner half", "triton", "") in runs()
    monkeypatch.setattr(gpu, "why_no_cuda", lambda index: "built without CUDA")
    assert ("pixel embedding", "triton", "not cuda: built without CUDA") in runs()
    monkeypatch.setattr(gpu, "why_no_cuda", lambda index: None)
    assert ("pixel embedding", "cuda", "") in runs()
    assert not {part for part in runs() if part[1] == "cpu"}
    monkeypatch.setattr(gpu, "why_unusable", lambda index: "Triton cannot be imported")
    assert ("inner half", "as written", "Triton cannot be imported") in runs()
    with use_backend("cpu"):
        (why,) = {why for part, _, why in runs() if part == "inner half"}
        assert "cuda:0, not on the CPU" in why
    with use_backend("triton"):
        assert ("inner half", "error", "the triton backend is forced: Triton cannot be imported") in runs()
