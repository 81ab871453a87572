"""The reference TNT against golden data, against timm, and the details no checkpoint shows."""

from __future__ import annotations

import copy
import math
import pickle

import golden_cases
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tnt_kernels._timm import import_timm
from tnt_kernels.models import TNT, tnt_b_patch16_224, tnt_s_patch16_224, tnt_ti_patch16_224
from tnt_kernels.models.checkpoint import load_checkpoint, to_authors
from tnt_kernels.models.tnt import SE, Attention, Block, DropPath, PatchEmbed

TINY = {
    "img_size": 32,
    "num_classes": 5,
    "outer_dim": 32,
    "inner_dim": 8,
    "depth": 2,
    "outer_num_heads": 2,
    "inner_num_heads": 2,
}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter, biases and gains too, a value that matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.3 * value if gain else 0.2 * value)
    return model


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = "") -> None:
    assert actual.shape == expected.shape, what
    scale = expected.abs().max().item()
    error = (actual.double() - expected).abs().max().item()
    assert error <= tolerance * scale, f"{what}: error {error:.2e} at scale {scale:.2e}"


PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 1e-5)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["float64", "float32"])
@pytest.mark.parametrize("name", golden_cases.TNT_CASES)
def test_golden(name, dtype, tolerance):
    golden = golden_cases.load(name)
    model = TNT(**golden.kwargs).to(dtype).eval()
    model.load_state_dict(golden.weights)
    x = golden.input.to(dtype).clone().requires_grad_()
    logits = model(x)
    loss = F.cross_entropy(logits, golden.target)
    loss.backward()

    assert_near(model.forward_features(x), golden.features, tolerance, "features")
    assert_near(logits, golden.logits, tolerance, "logits")
    assert_near(loss, golden.loss, tolerance, "loss")
    assert_near(x.grad, golden.grad_input, tolerance, "input")
    grads = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert grads.keys() == golden.grads.keys()
    for key, grad in grads.items():
        assert_near(grad, golden.grads[key], tolerance, key)


def test_golden_average_pool():
    golden = golden_cases.load("timm_avg_pool")
    model = TNT(
        img_size=32,
        num_classes=6,
        outer_dim=32,
        inner_dim=8,
        depth=2,
        inner_num_heads=4,
        outer_num_heads=2,
    ).double()
    model.load_state_dict(to_authors(golden.weights))
    tokens = []
    model.norm.register_forward_hook(lambda module, args, out: tokens.append(out))
    x = golden.input.clone().requires_grad_()
    model.forward_features(x)
    logits = model.head(tokens[0][:, 1:].mean(dim=1))
    F.cross_entropy(logits, golden.target).backward()

    assert_near(tokens[0], golden.features, 1e-12, "features")
    assert_near(logits, golden.logits, 1e-12, "logits")
    assert_near(x.grad, golden.grad_input, 1e-12, "input")
    expected = to_authors(golden.grads)
    del expected["outer_tokens"]
    for key, grad in expected.items():
        assert_near(model.get_parameter(key).grad, grad, 1e-12, key)


TIMM_CONFIGS = {
    "square": {},
    "non_square_gray": {"img_size": (32, 48), "in_chans": 1},
    "bias": {"qkv_bias": True, "inner_dim": 12, "num_heads_inner": 3},
    "nine_words": {"img_size": 36, "patch_size": 12},
    "stride_2": {"img_size": 24, "patch_size": 8, "first_stride": 2},
    "patch_not_divided": {"img_size": (41, 35), "patch_size": 10},
    "patch_not_square": {"img_size": (32, 48), "patch_size": (16, 12)},
    "no_head": {"num_classes": 0},
}


@pytest.mark.parametrize("name", TIMM_CONFIGS)
def test_equals_timm(name):
    try:
        import_timm()
    except ImportError as error:
        pytest.skip(str(error))
    from timm.models.tnt import TNT as TimmTNT

    sizes = {"img_size": 32, "num_classes": 5, "inner_dim": 8, "depth": 2, "num_heads_inner": 2}
    kwargs = {**sizes, "embed_dim": 32, "num_heads_outer": 2, **TIMM_CONFIGS[name]}
    theirs = randomize(TimmTNT(**kwargs).double())
    names = {
        "embed_dim": "outer_dim",
        "num_heads_inner": "inner_num_heads",
        "num_heads_outer": "outer_num_heads",
        "first_stride": "inner_stride",
    }
    ours = TNT(**{names.get(key, key): value for key, value in kwargs.items()}).double()
    load_checkpoint(ours, theirs.state_dict())

    height, width = theirs.pixel_embed.img_size
    x = torch.randn(2, kwargs.get("in_chans", 3), height, width, dtype=torch.float64, requires_grad=True)
    expected = theirs(x)
    weight = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), x, retain_graph=True)
    actual = ours(x)
    (actual_grad,) = torch.autograd.grad((actual * weight).sum(), x, retain_graph=True)
    assert_near(actual, expected, 1e-12)
    assert_near(actual_grad, expected_grad, 1e-12)
    assert_near(ours.forward_features(x), theirs.forward_features(x)[:, 0], 1e-12)


def test_published_sizes():
    # Trainable parameters of the paper's table, and the shapes at 224 px.
    counts = {tnt_ti_patch16_224: 6.1, tnt_s_patch16_224: 23.8, tnt_b_patch16_224: 65.4}
    for factory, millions in counts.items():
        with torch.device("meta"):
            model = factory()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert round(trained / 1e6, 1) == millions
        assert model.num_patches == 196
        assert model.inner_pos.shape[1] == 16
    assert tnt_s_patch16_224(depth=1, inner_num_heads=2).blocks[0].inner_attn.num_heads == 2


def test_initialisation():
    torch.manual_seed(0)
    model = TNT(img_size=64, depth=3, qkv_bias=True, se=1, num_classes=300)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05), name
            assert module.bias is None or not module.bias.any(), name
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert not module.bias.any(), name
    for parameter in (model.cls_token, model.outer_pos, model.inner_pos):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.15)
    bound = 1 / math.sqrt(3 * 49)
    assert 0.95 * bound < model.patch_embed.proj.weight.abs().max().item() <= bound
    assert not model.outer_tokens.any()
    assert not model.outer_tokens.requires_grad
    assert model.no_weight_decay() == {"outer_pos", "inner_pos", "cls_token"}


def test_outer_tokens_are_unused():
    model = TNT(**TINY).eval()
    x = torch.randn(1, 3, 32, 32)
    before = model(x)
    with torch.no_grad():
        model.outer_tokens.normal_()
    assert torch.equal(model(x), before)


def test_patches_do_not_see_each_other():
    embed = PatchEmbed(img_size=(32, 48), patch_size=16, inner_dim=4)
    x = torch.randn(2, 3, 32, 48)
    before = embed(x).reshape(2, 6, 16, 4)
    x[0, :, 15, 16] += 1  # the first patch's lower neighbours' border: row 0, column 1 of the patches
    after = embed(x).reshape(2, 6, 16, 4)
    changed = (before != after).flatten(2).any(dim=2)
    assert changed[0].tolist() == [False, True, False, False, False, False]
    assert not changed[1].any()


def test_block_without_inner_half():
    block = randomize(Block(16, 0, 2, 4, 16)).double()
    assert not any(key.startswith(("inner", "proj")) for key in block.state_dict())
    words = torch.randn(4, 16, 8, dtype=torch.float64)
    sentences = torch.randn(2, 3, 16, dtype=torch.float64)
    expected = sentences + block.outer_attn(block.outer_norm1(sentences))
    expected = expected + block.outer_mlp(block.outer_norm2(expected))
    out_words, out = block(words, sentences)
    assert out_words is words
    assert torch.equal(out, expected)

    model = TNT(**TINY)
    model.blocks[1] = Block(32, -1, 2, 2, 16)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_squeeze_and_excitation():
    se = randomize(SE(12)).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    norm, first, _, second, _ = se.fc
    assert first.out_features == 3
    pooled = F.layer_norm(x.mean(1), (12,), norm.weight, norm.bias)
    a = torch.tanh(second(torch.relu(first(pooled))))
    assert_near(se(x), x * a[:, None], 1e-12)


def test_attention_scale():
    assert Attention(24, 24, num_heads=4).scale == 6**-0.5
    assert Attention(24, 24, num_heads=4, qk_scale=0.3).scale == 0.3
    model = TNT(**TINY, qk_scale=0.3)
    assert {m.scale for m in model.modules() if isinstance(m, Attention)} == {0.3}


def test_drop_path_rises_linearly():
    model = TNT(**{**TINY, "depth": 5}, drop_path_rate=0.2)
    assert isinstance(model.blocks[0].drop_path, nn.Identity)
    rates = [block.drop_path.drop_prob for block in model.blocks[1:]]
    assert rates == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert isinstance(TNT(**{**TINY, "depth": 1}, drop_path_rate=0.2).blocks[0].drop_path, nn.Identity)


def test_drop_path_draws_per_row():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    out = drop(torch.ones(4000, 3, 2))
    rows = out.flatten(1)
    assert (rows == rows[:, :1]).all()
    assert set(rows[:, 0].tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (rows[:, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(drop.eval()(out), out)
    assert not DropPath(1.0)(torch.ones(3, 2)).any()


def test_drop_path_rows_are_sentences_in_the_inner_half():
    torch.manual_seed(0)
    model = TNT(**TINY, drop_path_rate=0.5)
    block = model.blocks[1]
    branches = []
    block.drop_path.register_forward_hook(lambda module, args, out: branches.append((args[0], out)))
    words, sentences = model.embed(torch.randn(8, 3, 32, 32))
    block(words, sentences)
    assert [before.shape[0] for before, _ in branches] == [32, 32, 8, 8]
    for before, after in branches:
        kept = after.flatten(1).any(dim=1)
        assert torch.equal(after[kept], before[kept] / 0.5)
    sentences_kept = branches[0][1].flatten(1).any(dim=1).reshape(8, 4)
    assert (sentences_kept.any(dim=1) & ~sentences_kept.all(dim=1)).any()


@pytest.mark.parametrize("rate", ["drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_dropout_only_while_training(rate):
    model = randomize(TNT(**TINY, **{rate: 0.5}))
    x = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    model.eval()
    plain = TNT(**TINY)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x), plain(x))


def test_classifier():
    model = TNT(**TINY).double().eval()
    assert model.get_classifier() is model.head
    model.reset_classifier(9)
    assert model(torch.randn(1, 3, 32, 32, dtype=torch.float64)).shape == (1, 9)
    assert model.num_classes == 9
    assert not model.head.training
    model.reset_classifier(0)
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(model(x), model.forward_features(x))
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(3, "avg")


def test_norm_layer_and_mlp_ratio():
    model = TNT(**TINY, norm_layer=lambda dim: nn.LayerNorm(dim, eps=1e-3), mlp_ratio=2.5)
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-3}
    assert model.blocks[0].inner_mlp.fc1.out_features == 20
    assert model.blocks[0].outer_mlp.fc1.out_features == 80


def test_subclass_changes_the_parts():
    class OurEmbed(PatchEmbed):
        pass

    class OurBlock(Block):
        pass

    class OurTNT(TNT):
        patch_embed_class = OurEmbed
        block_class = OurBlock

    model = OurTNT(**TINY)
    assert type(model.patch_embed) is OurEmbed
    assert {type(block) for block in model.blocks} == {OurBlock}
    assert model.state_dict().keys() == TNT(**TINY).state_dict().keys()


def test_no_images():
    for kwargs in (TINY, {**TINY, "se": 1}):
        assert TNT(**kwargs)(torch.zeros(0, 3, 32, 32)).shape == (0, 5)


def test_strides_do_not_matter():
    model = TNT(**TINY).double().eval()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    expected = model(x)
    assert_near(model(x.contiguous(memory_format=torch.channels_last)), expected, 1e-12)
    assert_near(model(x.transpose(2, 3).contiguous().transpose(2, 3)), expected, 1e-12)
    assert_near(model(x[:1].expand(3, -1, -1, -1)), expected[:1].expand(3, -1), 1e-12)


@pytest.mark.parametrize("shape", [(2, 3, 32), (2, 1, 32, 32), (2, 3, 32, 48), (2, 3, 16, 16), (3, 32, 32)])
def test_image_that_does_not_fit(shape):
    with pytest.raises(ValueError, match=r"image must have the shape \[B, 3, 32, 32\].*got"):
        TNT(**TINY)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"inner_num_heads": 3}, "inner_num_heads must divide inner_dim=8, got 3"),
        ({"outer_num_heads": 0}, "outer_num_heads must divide outer_dim=32, got 0"),
        ({"inner_dim": 0}, "inner_dim must be positive, got 0"),
        ({"img_size": 8}, "img_size must hold a patch: got 8"),
        ({"img_size": (32, 32, 32)}, "img_size must be"),
        ({"patch_size": 0}, "patch_size must be"),
        ({"drop_path_rate": -0.5}, r"drop_path_rate must lie in \[0, 1\], got -0.5"),
        ({"num_classes": -1}, "num_classes must not be negative"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TNT(**{**TINY, **kwargs})


def test_pickle_deepcopy_compile_export():
    model = TNT(**TINY, se=1).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert_near(exported.module()(torch.cat([x, x])), torch.cat([expected, expected]).double(), 1e-6)
