"""python/train.py: where weights come from, ways to train, presets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from program_runs import SHORT, image_folder, losses, run, tiny, weights

import predict
import train
from tnt_programs import checkpoints, models, network, options, presets, recipe


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return image_folder(tmp_path / "images")


def test_checkpoint_starts_from_weights_and_keeps_the_head(folder, capsys):
    assert tiny(folder, "first", "--ema-decay", "0.5") == 0
    assert run("--data", folder, "--checkpoint", "first/best.pt", "--output", "second", *SHORT) == 0
    assert "finetune" in checkpoints.read("second/last.pt")["args"]["preset"]
    chosen, given = options.parse(["--data", str(folder), "--checkpoint", "first/best.pt"])
    model, described, origin = network.start(chosen, given, ["dark", "light"])
    assert described.name == "tnt_digits"
    assert described.arguments["outer_dim"] == 16
    assert origin == "those of first/best.pt"
    averaged = checkpoints.read("first/best.pt")["state_dict_ema"]
    assert all(torch.equal(value, averaged[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_of_other_classes_is_refused_or_gets_a_new_head(folder, capsys):
    assert tiny(folder, "first") == 0
    for part in ("train", "val"):
        (folder / part / "dark").rename(folder / part / "night")
    start = ["--data", folder, "--checkpoint", "first/best.pt", "--output", "second", *SHORT]
    assert run(*start) == 2
    said = capsys.readouterr().err
    assert "only there: dark; only in the data: night" in said
    assert "--new-head" in said
    assert run("--resume", "first/last.pt", "--epochs", "5") == 2
    assert "other classes" in capsys.readouterr().err
    assert run(*start, "--new-head") == 0
    assert "the head new" in capsys.readouterr().out


def test_weights_of_another_program_get_a_new_head_where_the_classes_differ(folder, capsys):
    torch.manual_seed(1)
    source = models.build("tnt_digits", {"num_classes": 7})[0]
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, "theirs.pth.tar")
    chosen, given = options.parse(
        ["--data", str(folder), "--model", "tnt_digits", "--checkpoint", "theirs.pth.tar"]
    )
    for classes, kept in ((7, True), (2, False)):
        model, _, origin = network.start(chosen, given, [str(index) for index in range(classes)])
        assert torch.equal(model.blocks[3].outer_mlp.fc2.weight, source.blocks[3].outer_mlp.fc2.weight)
        assert (model.head.out_features == 7 and torch.equal(model.head.weight, source.head.weight)) == kept
        assert ("the head new" in origin) != kept


def test_a_checkpoint_of_another_timm_model_is_refused(folder, capsys):
    vit = ["--model", "vit_tiny_patch16_224", "--img-size", "32", "--model-args", "depth=1", "embed_dim=24"]
    assert tiny(folder, "vit", *vit) == 0
    assert tiny(folder, "again", *vit, "--checkpoint", "vit/best.pt") == 0
    narrow = [*vit[:-1], "embed_dim=12"]
    assert tiny(folder, "other", *narrow, "--checkpoint", "vit/best.pt") == 2
    assert "does not fit a VisionTransformer" in capsys.readouterr().err


def test_pretrained_takes_timms_weights(monkeypatch):
    published = models.timm.create_model("tnt_s_patch16_224", num_classes=11, depth=1)
    created = []

    def create(name, pretrained=False, **arguments):
        created.append((name, pretrained))
        return published

    monkeypatch.setattr(models.timm, "create_model", create)
    model, _ = models.build("tnt_s_patch16_224", {"num_classes": 5, "depth": 1}, pretrained=True)
    assert created == [("tnt_s_patch16_224", True)]
    assert torch.equal(model.cls_token, published.cls_token)
    assert model.head.out_features == 5


def test_freeze_trains_the_head_alone(folder):
    start = ["--freeze", "--drop-path", "0.3", "--weight-decay", "0"]
    assert tiny(folder, "out", *start) == 0
    after = weights("out")
    arguments = checkpoints.read("out/last.pt")["network"]["arguments"]
    torch.manual_seed(0)
    before = models.build("tnt_digits", arguments)[0].state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    "extra",
    [
        ["--checkpoint-activations"],
        ["--amp", "bfloat16"],
        ["--amp", "float16"],
        ["--opt", "lamb", "--sched", "step", "--sched-per", "epoch"],
        ["--repeated-aug", "3", "--no-aug"],
        ["--ema-decay", "0.99", "--ema-warmup"],
        ["--aa", "augmix-m3", "--color-jitter", "0.1", "--vflip", "0.5"],
    ],
    ids=lambda extra: " ".join(extra),
)
def test_ways_to_train(folder, extra):
    assert tiny(folder, "out", "--lr", "0.01", *extra) == 0
    found = losses("out")
    assert len(found) == 9
    assert np.isfinite(found).all()
    assert len(set(found)) == 9


def test_activation_checkpointing_changes_no_loss(folder):
    assert tiny(folder, "plain", "--drop-path", "0.3") == 0
    assert tiny(folder, "checkpointed", "--drop-path", "0.3", "--checkpoint-activations") == 0
    assert losses("plain") == pytest.approx(losses("checkpointed"), abs=1e-5)


@pytest.mark.slow
def test_compile_changes_no_loss(folder):
    assert tiny(folder, "plain", "--drop-path", "0") == 0
    assert tiny(folder, "compiled", "--drop-path", "0", "--compile") == 0
    assert losses("plain") == pytest.approx(losses("compiled"), abs=1e-4)


def test_accumulation_changes_no_loss(folder):
    assert tiny(folder, "whole", "--drop-path", "0") == 0
    assert tiny(folder, "parts", "--drop-path", "0", "--accumulate", "4") == 0
    assert losses("whole") == pytest.approx(losses("parts"), abs=1e-5)


def test_presets():
    chosen, _ = options.parse([])
    assert (chosen.dataset, chosen.preset, chosen.model) == ("digits", "digits", "tnt_digits")
    chosen, _ = options.parse(["--data", "x", "--pretrained"])
    assert (chosen.dataset, chosen.preset, chosen.mixup) == ("folder", "finetune", 0.0)
    chosen, _ = options.parse(["--data", "x", "--preset", "authors", "--lr", "0.003", "--aa", "none"])
    assert (chosen.lr, chosen.aa) == (0.003, None)  # given by hand
    assert (chosen.epochs, chosen.batch_size, chosen.repeated_aug) == (300, 1024, 3)
    assert (chosen.ema_decay, chosen.weight_decay, chosen.drop_path) == (0.99996, 0.05, 0.1)
    chosen, _ = options.parse(["--epochs", "1"])
    assert chosen.warmup_epochs == 0
    assert all(preset.keys() <= presets.DEFAULTS.keys() for preset in presets.PRESETS.values())
    assert presets.DEFAULTS.keys() >= presets.MAY_CHANGE


def test_weight_decay_spares_biases_norms_and_positions():
    chosen, _ = options.parse([])
    model = models.build("tnt_digits", {"num_classes": 10})[0]
    optimizer = recipe.optimizer(model, chosen)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    spared: set[str] = set()
    decayed: set[str] = set()
    for group in optimizer.param_groups:
        (decayed if group["weight_decay"] else spared).update(names[id(p)] for p in group["params"])
    assert {"cls_token", "outer_pos", "inner_pos", "norm.weight", "blocks.0.outer_mlp.fc1.bias"} <= spared
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    assert spared | decayed == set(names.values()) - {"outer_tokens"}


def test_help_fits_the_options(capsys):
    for program in (train, predict):
        with pytest.raises(SystemExit) as stopped:
            program.main(["--help"])
        assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in presets.DEFAULTS)
