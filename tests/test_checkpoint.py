"""Dialects of checkpoints: recognised, converted both ways, resized, inferred from, and refused clearly."""

from __future__ import annotations

import argparse
import re

import golden_cases
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tnt_kernels._timm import import_timm
from tnt_kernels.models import TNT, tnt_s_patch16_224
from tnt_kernels.models.checkpoint import (
    dialect_of,
    from_checkpoint,
    infer_arguments,
    load_checkpoint,
    read_checkpoint,
    resize_outer_pos,
    to_authors,
    to_timm,
)

TINY = {
    "img_size": 32,
    "num_classes": 5,
    "outer_dim": 32,
    "inner_dim": 8,
    "depth": 2,
    "outer_num_heads": 2,
    "inner_num_heads": 2,
}
HEADS = {"outer_num_heads": 2, "inner_num_heads": 2}


def tnt(**kwargs) -> TNT:
    model = TNT(**{**TINY, **kwargs}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key != "outer_tokens":
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def timm_tnt(**kwargs) -> nn.Module:
    try:
        import_timm()
    except ImportError as error:
        pytest.skip(str(error))
    from timm.models.tnt import TNT as TimmTNT

    sizes = {"img_size": 32, "num_classes": 5, "embed_dim": 32, "inner_dim": 8, "depth": 2}
    return TimmTNT(**{**sizes, "num_heads_inner": 2, "num_heads_outer": 2, **kwargs}).eval()


def mmpretrain_state() -> dict[str, torch.Tensor]:
    block = "backbone.layers.0.inner_block"
    names = [f"{block}.attn.attn.in_proj_weight", f"{block}.norm_attn.weight", "backbone.projection.weight"]
    return {name: torch.zeros(2) for name in names}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key in expected:
        assert torch.equal(actual[key], expected[key]), key


def message_of(error: pytest.ExceptionInfo) -> str:
    return str(error.value)


def test_dialects_are_recognised():
    state = tnt().state_dict()
    assert dialect_of(state) == "authors"
    assert dialect_of(to_timm(state)) == "timm"
    assert dialect_of(golden_cases.load("timm_avg_pool").weights) == "timm"
    assert dialect_of(golden_cases.load("timm_legacy").weights) == "timm_legacy"
    assert dialect_of(mmpretrain_state()) == "mmpretrain"
    with pytest.raises(ValueError, match=r"not a TNT checkpoint .*: 2 keys \(weight, bias\)"):
        dialect_of(nn.Linear(2, 2).state_dict())


@pytest.mark.parametrize("legacy", [False, True])
def test_dialect_with_one_word_per_sentence(legacy):
    state = timm_tnt(patch_size=4, first_stride=4, img_size=8, legacy=legacy).state_dict()
    assert dialect_of(state) == ("timm_legacy" if legacy else "timm")


@pytest.mark.parametrize("kwargs", [{}, {"qkv_bias": True}, {"num_classes": 0}, {"img_size": (32, 48)}])
def test_round_trip(kwargs):
    state = tnt(**kwargs).state_dict()
    assert_same(to_authors(to_timm(state)), state)
    assert_same(to_authors(state), state)
    theirs = to_timm(state)
    assert_same(to_timm(theirs), theirs)
    assert_same(to_timm(to_authors(theirs)), theirs)


def test_words_that_form_no_square():
    state = tnt(patch_size=(16, 8), img_size=32).state_dict()
    with pytest.raises(ValueError, match="words_grid must be given: 8 positions form no square"):
        to_timm(state)
    with pytest.raises(ValueError, match=r"words_grid must hold 8 positions, got \(3, 2\)"):
        to_timm(state, words_grid=(3, 2))
    theirs = to_timm(state, words_grid=(4, 2))
    assert theirs["pixel_pos"].shape == (1, 8, 4, 2)
    assert_same(to_authors(theirs), state)
    model = timm_tnt(patch_size=(16, 8), img_size=32)
    load_checkpoint(model, state)
    assert torch.equal(model.pixel_pos, theirs["pixel_pos"])


def test_converts_as_timm_does():
    model = timm_tnt()
    from timm.models.tnt import checkpoint_filter_fn

    state = tnt().state_dict()
    assert_same(to_timm(state), checkpoint_filter_fn(dict(state), model))


@pytest.mark.parametrize("kwargs", [{}, {"qkv_bias": True, "img_size": (32, 48)}])
def test_both_models_answer_alike(kwargs):
    ours, theirs = tnt(**kwargs), timm_tnt(**kwargs)
    load_checkpoint(theirs, ours.state_dict())
    x = torch.randn(2, 3, *ours.patch_embed.img_size)
    expected = theirs(x)
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
    again = TNT(**{**TINY, **kwargs}).eval()
    load_checkpoint(again, theirs.state_dict())
    assert_same(again.state_dict(), ours.state_dict())


def test_legacy_golden_into_timm():
    golden = golden_cases.load("timm_legacy")
    model = timm_tnt(**golden.kwargs).double()
    load_checkpoint(model, golden.weights)
    x = golden.input.clone()
    torch.testing.assert_close(model(x), golden.logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.forward_features(x), golden.features, rtol=1e-10, atol=1e-10)


def test_squeeze_and_excitation_has_no_timm_names():
    with pytest.raises(ValueError, match=r"timm's TNT has no squeeze-and-excitation: 12 keys .* and 4 more"):
        to_timm(tnt(se=1).state_dict())


@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".safetensors"])
@pytest.mark.parametrize("dialect", ["authors", "timm"])
def test_files(tmp_path, suffix, dialect):
    state = tnt().state_dict()
    stored = state if dialect == "authors" else to_timm(state)
    path = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(stored, path)
    else:
        torch.save({"epoch": 3, "arch": "tnt", "state_dict": stored}, path)
    assert_same(read_checkpoint(path), stored)
    assert_same(read_checkpoint(str(path)), stored)
    model = TNT(**TINY)
    load_checkpoint(model, path)
    assert_same(model.state_dict(), state)
    assert_same(from_checkpoint(path, **HEADS).state_dict(), state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state},
        lambda state: {"model": state, "optimizer": {"state": {}}},
        lambda state: {"ema": {"module": state}},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    ],
)
def test_wrappers(wrap):
    state = tnt().state_dict()
    assert_same(read_checkpoint(wrap(state)), state)


def test_averaged_weights_are_preferred():
    state = tnt().state_dict()
    average = {key: value + 1 for key, value in state.items()}
    for plain, ema in (("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "ema")):
        both = {plain: state, ema: average}
        assert_same(read_checkpoint(both), average)
        assert_same(read_checkpoint(both, use_ema=False), state)


def test_file_of_a_training_script(tmp_path):
    state = tnt().state_dict()
    torch.save({"args": argparse.Namespace(lr=0.1), "state_dict": state}, tmp_path / "last.pth.tar")
    assert_same(read_checkpoint(tmp_path / "last.pth.tar"), state)


class Harmful:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_files_that_are_refused(tmp_path, capsys):
    torch.save({"state_dict": tnt().state_dict(), "extra": Harmful()}, tmp_path / "harmful.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    torch.save(tnt().state_dict(), tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"harmful.pth' holds more than weights: print; save its state dict"):
        read_checkpoint(tmp_path / "harmful.pth")
    for name in ("text.pth", "empty.pth", "text.safetensors", "cut.pth"):
        with pytest.raises(ValueError, match=f"{name}' is damaged or not a checkpoint"):
            read_checkpoint(tmp_path / name)
    assert "this must not run" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "absent.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="it holds a list"):
        read_checkpoint(tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"2 entries \(epoch, arch\) no tensor"):
        read_checkpoint({"epoch": 3, "arch": "tnt"})
    with pytest.raises(ValueError, match="an empty dict"):
        read_checkpoint({})


@pytest.mark.parametrize("grid", [(5, 5), (3, 6), (2, 2), (24, 24)])
def test_resize_equals_timm(grid):
    timm_tnt()
    from timm.layers import resample_abs_pos_embed

    position = torch.randn(1, 17, 8)
    actual = resize_outer_pos(position, grid)
    expected = resample_abs_pos_embed(position, new_size=list(grid), num_prefix_tokens=1)
    assert torch.equal(actual, expected)
    assert torch.equal(actual[:, 0], position[:, 0])


def test_resize_keeps_what_it_should():
    position = torch.randn(1, 7, 8, dtype=torch.bfloat16)
    assert resize_outer_pos(position, (4, 6), source_grid=(2, 3)).dtype == torch.bfloat16
    assert torch.equal(resize_outer_pos(position, (2, 3), source_grid=(2, 3)), position)
    with pytest.raises(ValueError, match="source_grid must be given: 6 positions form no square"):
        resize_outer_pos(position, (4, 6))
    with pytest.raises(ValueError, match=r"source_grid must hold 6 positions, got \(2, 2\)"):
        resize_outer_pos(position, (4, 6), source_grid=(2, 2))
    with pytest.raises(ValueError, match=r"outer_pos must have the shape \[1, n \+ 1, d\], got \[7, 8\]"):
        resize_outer_pos(position[0], (4, 6))
    # A linear ramp over the columns stays one away from the borders, in the right direction.
    ramp = torch.arange(8.0).repeat(8, 1).reshape(1, 64, 1)
    resized = resize_outer_pos(torch.cat([torch.zeros(1, 1, 1), ramp], 1), (8, 16))[0, 1:, 0].reshape(8, 16)
    expected = (torch.arange(16.0) + 0.5) / 2 - 0.5
    torch.testing.assert_close(resized[:, 4:12], expected[4:12].expand(8, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dialect", ["authors", "timm"])
def test_another_resolution(dialect):
    source = tnt()
    state = source.state_dict() if dialect == "authors" else to_timm(source.state_dict())
    model = TNT(**{**TINY, "img_size": (48, 64)})
    load_checkpoint(model, state)
    assert torch.equal(model.outer_pos, resize_outer_pos(source.outer_pos, (3, 4)))
    assert torch.equal(model.inner_pos, source.inner_pos)
    larger = from_checkpoint(state, img_size=(48, 64), **HEADS)
    assert_same(larger.state_dict(), model.state_dict())
    theirs = timm_tnt(img_size=(48, 64))
    load_checkpoint(theirs, state)
    assert torch.equal(theirs.patch_pos, model.outer_pos)


def test_source_that_is_not_square():
    source = tnt(img_size=(32, 48))
    wide = tnt(img_size=(48, 32))
    with pytest.raises(ValueError, match="source_grid must be given"):
        load_checkpoint(TNT(**TINY), source.state_dict())
    load_checkpoint(wide, source.state_dict(), source_grid=(2, 3))
    assert torch.equal(wide.outer_pos, resize_outer_pos(source.outer_pos, (3, 2), source_grid=(2, 3)))
    same = from_checkpoint(source.state_dict(), source_grid=(2, 3), **HEADS)
    assert same.patch_embed.img_size == (32, 48)
    assert_same(same.state_dict(), source.state_dict())


def test_legacy_positions_are_resized_too():
    source = timm_tnt(legacy=True)
    model = timm_tnt(legacy=True, img_size=64)
    load_checkpoint(model, source.state_dict())
    assert torch.equal(model.patch_pos, resize_outer_pos(source.patch_pos, (4, 4)))


@pytest.mark.parametrize(
    ("name", "dialect"),
    [(name, "authors") for name in golden_cases.TNT_CASES]
    + [(name, "timm") for name in golden_cases.TNT_CASES if not golden_cases.INDEX[name]["kwargs"].get("se")],
)
def test_arguments_are_inferred(name, dialect):
    golden = golden_cases.load(name)
    kwargs = dict(golden.kwargs)
    state = golden.weights if dialect == "authors" else to_timm(golden.weights)
    # What no shape tells is given, the rest inferred.
    told = ("outer_num_heads", "inner_num_heads", "patch_size", "inner_stride", "qk_scale")
    given = {key: kwargs[key] for key in told if key in kwargs}
    grid = (2, 3) if name == "bias_scale_se" else None
    inferred = infer_arguments(state, source_grid=grid, **given)
    size = kwargs["img_size"]
    kwargs["img_size"] = tuple(size) if isinstance(size, list) else (size, size)
    assert {key: inferred[key] for key in kwargs} == kwargs
    model = from_checkpoint(state, source_grid=grid, **given).double()
    loss = F.cross_entropy(model(golden.input), golden.target)
    assert loss.item() == pytest.approx(golden.loss.item(), abs=1e-6)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.7, 3.3, 4.0, 4.1])
@pytest.mark.parametrize(("inner_dim", "outer_dim"), [(8, 32), (10, 48), (24, 384)])
def test_mlp_ratio_is_inferred(ratio, inner_dim, outer_dim):
    sizes = {"inner_dim": inner_dim, "outer_dim": outer_dim, "depth": 1}
    state = TNT(**{**TINY, **sizes}, mlp_ratio=ratio).state_dict()
    again = TNT(**{**TINY, **sizes}, mlp_ratio=infer_arguments(state, **HEADS)["mlp_ratio"])
    again.load_state_dict(state)


def test_published_size_is_inferred():
    with torch.device("meta"):
        state = tnt_s_patch16_224().state_dict()
    assert infer_arguments(state) == {
        "img_size": (224, 224),
        "patch_size": 16,
        "in_chans": 3,
        "num_classes": 1000,
        "outer_dim": 384,
        "inner_dim": 24,
        "depth": 12,
        "outer_num_heads": 6,
        "inner_num_heads": 4,
        "mlp_ratio": 4.0,
        "qkv_bias": False,
        "inner_stride": 4,
        "se": 0,
    }


def test_what_cannot_be_inferred():
    state = tnt().state_dict()
    with pytest.raises(ValueError, match="outer_num_heads and inner_num_heads must be given"):
        infer_arguments(state)
    with pytest.raises(ValueError, match="must give the checkpoint's 4 words per sentence"):
        infer_arguments(tnt(patch_size=8).state_dict(), **HEADS)
    with pytest.raises(ValueError, match="source_grid must be given"):
        infer_arguments(tnt(img_size=(32, 48)).state_dict(), **HEADS)
    del state["inner_pos"]
    with pytest.raises(ValueError, match="the checkpoint has no inner_pos"):
        infer_arguments(state, **HEADS)


@pytest.mark.parametrize("dialect", ["authors", "timm"])
def test_missing_and_foreign_keys(dialect):
    model = tnt() if dialect == "authors" else timm_tnt()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = tnt(num_classes=5).state_dict()
    del state["norm.weight"], state["blocks.1.outer_attn.v.weight"]
    state["extra.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="does not fit the model") as error:
        load_checkpoint(model, state)
    v = "blocks.1.outer_attn.v.weight" if dialect == "authors" else "blocks.1.attn_out.v.weight"
    assert re.search(r"2 keys \((.*)\) missing", message_of(error)).group(1).split(", ") == [v, "norm.weight"]
    assert "1 key (extra.weight) foreign" in message_of(error)
    assert_same(model.state_dict(), before)


def test_another_number_of_classes():
    state = tnt(num_classes=7).state_dict()
    model = tnt()
    with pytest.raises(ValueError, match=r"it has 7 classes, the model 5 \(num_classes=7 makes a model"):
        load_checkpoint(model, state)
    own = model.head.weight.clone()
    load_checkpoint(model, state, head=False)
    assert torch.equal(model.head.weight, own)
    assert torch.equal(model.cls_token, state["cls_token"])
    with pytest.raises(ValueError, match=r"2 keys \(head.weight, head.bias\) foreign; head=False leaves"):
        load_checkpoint(tnt(num_classes=0), state)
    load_checkpoint(tnt(num_classes=0), state, head=False)
    with pytest.raises(ValueError, match=r"2 keys \(head.weight, head.bias\) missing"):
        load_checkpoint(model, tnt(num_classes=0).state_dict())
    assert from_checkpoint(state, num_classes=3, **HEADS)(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert from_checkpoint(tnt(num_classes=0).state_dict(), **HEADS).num_classes == 0


def test_other_shapes():
    with pytest.raises(
        ValueError, match=r"another shape of \d+ tensors \(cls_token \[1, 1, 32\], the model's"
    ):
        load_checkpoint(tnt(outer_dim=48), tnt().state_dict())
    nine = tnt(patch_size=12, img_size=24).state_dict()
    with pytest.raises(ValueError, match=r"inner_pos \[1, 9, 8\], the model's \[1, 16, 8\]"):
        load_checkpoint(tnt(), nine)
    with pytest.raises(ValueError, match=r"9 words per sentence, the model 4 x 4"):
        load_checkpoint(timm_tnt(), nine)
    with pytest.raises(ValueError, match=r"\d+ keys \(blocks\.2\..* more\) missing"):
        load_checkpoint(tnt(depth=3), tnt().state_dict())


def test_another_network():
    legacy, current = timm_tnt(legacy=True), timm_tnt()
    state, message = tnt().state_dict(), "the checkpoint is of {}, the model is {}"
    old = "timm's legacy TNT"
    new = "the current TNT"
    for model in (tnt(), current):
        with pytest.raises(ValueError, match=message.format(old, new)):
            load_checkpoint(model, legacy.state_dict())
        with pytest.raises(ValueError, match=r"mmpretrain's TNT .* the model is the current TNT"):
            load_checkpoint(model, mmpretrain_state())
    for given in (state, to_timm(state)):
        with pytest.raises(ValueError, match=message.format(new, old)):
            load_checkpoint(legacy, given)
    for convert in (to_authors, to_timm, from_checkpoint):
        with pytest.raises(ValueError, match="timm's legacy TNT, another network"):
            convert(legacy.state_dict())
    with pytest.raises(ValueError, match="model must be a TNT"):
        load_checkpoint(nn.Linear(2, 2), state)


def test_outer_tokens_are_kept_but_may_be_absent():
    model, state = tnt(), tnt().state_dict()
    state["outer_tokens"] = torch.ones(1, 4, 32)
    load_checkpoint(model, state)
    assert torch.equal(model.outer_tokens, state["outer_tokens"])
    model = tnt()
    del state["outer_tokens"]
    load_checkpoint(model, state)
    assert not model.outer_tokens.any()


def test_precision_of_the_model_is_kept():
    model = tnt().to(torch.bfloat16)
    load_checkpoint(model, {key: value.half() for key, value in tnt().state_dict().items()})
    assert model.outer_pos.dtype == torch.bfloat16
