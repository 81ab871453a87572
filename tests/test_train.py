"""python/train.py: what a run leaves behind, resuming it, models, the digits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from program_runs import (
    EVERYTHING,
    PROGRAMS,
    TINY_MODEL,
    environment,
    image_folder,
    interrupt_after,
    losses,
    rows,
    run,
    same_run,
    tiny,
    weights,
)

import digits as digits_program
import predict
from tnt_kernels import TNT, FastTNT
from tnt_kernels.models.accelerate import is_accelerated
from tnt_programs import checkpoints, datasets, history, models, network, options
from tnt_programs.interrupts import Interrupts


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return image_folder(tmp_path / "images")


def test_a_run_leaves_checkpoints_figures_and_curves(folder, capsys):
    assert tiny(folder, "out") == 0
    found = rows(Path("out/history.csv"))
    assert tuple(found[0]) == history.COLUMNS
    assert [row["epoch"] for row in found] == ["1", "2", "3"]
    assert all(float(row["seconds"]) > 0 and float(row["train_images_per_s"]) > 0 for row in found)
    assert found[0]["top5"] == ""  # two classes
    assert [float(row["train_loss"]) for row in found] == pytest.approx(
        np.reshape(losses("out"), (3, 3)).mean(1)
    )
    with Image.open("out/curves.png") as image:
        assert image.width > 500
        image.load()
    content = checkpoints.read("out/best.pt")
    assert content is not None
    assert content["network"]["classes"] == ["dark", "light"]
    assert content["network"]["preprocessing"]["input_size"] == [3, 32, 32]
    assert "blocks.0.inner_attn.qk.weight" in content["state_dict"]
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "best.pt",
        "curves.png",
        "history.csv",
        "last.pt",
        "steps.csv",
    ]
    assert "out/best.pt" in capsys.readouterr().out


def test_a_second_run_does_not_overwrite_the_first(folder, capsys):
    assert tiny(folder, "out", "--epochs", "2") == 0
    before = Path("out/last.pt").read_bytes()
    assert tiny(folder, "out") == 2
    assert "--output out holds a run: --resume goes on with it, --overwrite" in capsys.readouterr().err
    assert Path("out/last.pt").read_bytes() == before
    assert tiny(folder, "out", "--overwrite") == 0


def test_the_same_seed_gives_the_same_run_with_any_number_of_workers(folder):
    assert tiny(folder, "one", *EVERYTHING) == 0
    assert tiny(folder, "two", *EVERYTHING, "--workers", "2") == 0
    same_run("one", "two")
    assert tiny(folder, "three", *EVERYTHING, "--seed", "1") == 0
    assert losses("three") != losses("one")


@pytest.mark.parametrize("step", [4, 6], ids=["inside an epoch", "at the end of an epoch"])
@pytest.mark.parametrize("amp", ["none", "float16"])
def test_resume_gives_the_numbers_of_an_uninterrupted_run(folder, monkeypatch, capsys, step, amp):
    options = [*EVERYTHING, "--amp", amp, "--accumulate", "2", "--clip-grad", "1"]
    assert tiny(folder, "straight", *options) == 0
    interrupt_after(step, monkeypatch)
    assert tiny(folder, "broken", *options) == 130
    said = capsys.readouterr().out
    assert f"--resume {Path('broken/last.pt')}" in said
    assert len(losses("broken")) == step
    assert run("--resume", "broken/last.pt") == 0
    same_run("straight", "broken")


def test_resume_twice_in_one_epoch_and_from_an_earlier_checkpoint(folder, monkeypatch):
    assert tiny(folder, "straight", *EVERYTHING) == 0
    for step in (1, 2):
        interrupt_after(step, monkeypatch)
        assert tiny(folder, "broken", *EVERYTHING, *(["--resume"] if step > 1 else [])) == 130
    Path("earlier.pt").write_bytes(Path("broken/last.pt").read_bytes())
    assert run("--resume", "--output", "broken") == 0
    same_run("straight", "broken")
    assert run("--resume", "earlier.pt", "--output", "broken") == 0
    same_run("straight", "broken")


def test_resume_in_the_middle_of_the_validation(folder, monkeypatch):
    assert tiny(folder, "straight", *EVERYTHING) == 0
    plain = torch.nn.functional.cross_entropy

    def interrupted(*arguments, **settings):
        monkeypatch.setattr(torch.nn.functional, "cross_entropy", plain)
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments, **settings)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", interrupted)
    assert tiny(folder, "broken", *EVERYTHING) == 130
    assert not Path("broken/history.csv").exists()
    assert run("--resume", "--output", "broken") == 0
    same_run("straight", "broken")


def test_resume_may_train_longer_and_nothing_else(folder, capsys):
    assert tiny(folder, "out", "--epochs", "2") == 0
    assert tiny(folder, "out", "--resume", "--lr", "0.5", "--epochs", "2") == 2
    assert "--lr 0.5 (it runs with 0.0005)" in capsys.readouterr().err
    assert run("--resume", "out/last.pt", "--epochs", "4") == 0
    assert [row["epoch"] for row in rows(Path("out/history.csv"))] == ["1", "2", "3", "4"]


def test_resume_needs_a_checkpoint(folder, capsys):
    assert run("--data", folder, "--resume", "--output", "nothing") == 2
    assert f"--resume: there is no {Path('nothing/last.pt')}" in capsys.readouterr().err
    Path("junk.pt").write_bytes(b"junk")
    assert run("--resume", "junk.pt") == 2
    assert "junk.pt is no checkpoint of train.py" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number):
    command = [sys.executable, PROGRAMS / "train.py", *TINY_MODEL, "--threads", "1", "--output", "out"]
    process = subprocess.Popen(
        list(map(str, command)), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            break
    time.sleep(0.2)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert f"train.py --resume {Path('out/last.pt')}" in out
    content = checkpoints.read("out/last.pt")
    assert content is not None
    assert content["position"]["total"] > 0


def test_a_second_ctrl_c_leaves_at_once():
    former = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with Interrupts(second_raises=False):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is former


@pytest.mark.parametrize("amp", ["none", "bfloat16"])
def test_fast_tnt_and_the_reference_give_the_same_losses(amp):
    """From the same seed, with drop path: over 50 steps on the digits."""
    arguments = [*TINY_MODEL, "--epochs", "3", "--warmup-epochs", "1", "--drop-path", "0.2", "--log-steps"]
    arguments += ["--batch-size", "64", "--lr", "2e-3", "--amp", amp]
    assert run(*arguments, "--output", "fast") == 0
    assert run(*arguments, "--output", "plain", "--reference") == 0
    fast, plain = losses("fast")[:50], losses("plain")[:50]
    assert len(fast) == 50
    assert max(abs(a - b) for a, b in zip(fast, plain, strict=True)) <= (1e-4 if amp == "none" else 2e-2)
    # Of ten steps each: a batch's loss is half noise, and another torch or numpy shuffles otherwise.
    assert sum(fast[-10:]) / 10 < sum(fast[:10]) / 10 - 0.01


TIMM_TNT = [
    *("--model", "timm:tnt_s_patch16_224", "--img-size", "32", "--model-args", "embed_dim=16", "inner_dim=8"),
    *("num_heads_inner=2", "num_heads_outer=2", "depth=1", "patch_size=8"),
]


def test_timms_tnt_is_accelerated_and_saved_in_the_authors_names(folder, monkeypatch):
    chosen, given = options.parse([*TIMM_TNT, "--data", str(folder)])
    model, _, _ = network.start(chosen, given, ["a", "b"])
    assert any(is_accelerated(module) for module in model.modules())
    chosen.reference = True
    plain, _, _ = network.start(chosen, given, ["a", "b"])
    assert not any(is_accelerated(module) for module in plain.modules())

    assert tiny(folder, "straight", *TIMM_TNT) == 0
    assert "outer_pos" in weights("straight")
    interrupt_after(4, monkeypatch)
    assert tiny(folder, "broken", *TIMM_TNT) == 130
    assert run("--resume", "broken/last.pt") == 0
    same_run("straight", "broken")


@pytest.mark.parametrize(
    "model",
    [
        ["vit_tiny_patch16_224", "--img-size", "32", "--model-args", "depth=1", "embed_dim=24"],
        ["deit_tiny_distilled_patch16_224", "--img-size", "32", "--model-args", "depth=1", "embed_dim=24"],
        ["test_resnet", "--img-size", "32", "--model-args", "in_chans=3"],
    ],
    ids=lambda model: model[0],
)
def test_other_models_of_timm_train_and_predict(folder, model, capsys):
    assert tiny(folder, "out", "--model", *model, "--opt", "sgd", "--lr", "0.01") == 0
    capsys.readouterr()
    image = str(folder / "val/dark/0.jpg")
    assert predict.main([image, "--checkpoint", "out/best.pt", "--format", "json"]) == 0
    (item,) = json.loads(capsys.readouterr().out)["predictions"]
    assert {top["class"] for top in item["top"]} == {"dark", "light"}


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("fast_tnt_s_patch16_224", "tnt_s_patch16_224"),
        ("tnt_b_patch16_224", "tnt_b_patch16_224"),
        ("timm:tnt_s_patch16_224", "timm:tnt_s_patch16_224"),
        ("tnt_s_legacy_patch16_224", "tnt_s_legacy_patch16_224"),
        ("vit_base_patch16_224", "vit_base_patch16_224"),
        ("vit_large_patch32", "vit_large_patch32_224"),
        ("vit_huge_patch14", "vit_huge_patch14_224"),
        ("deit_small", "deit_small_patch16_224"),
    ],
)
def test_names_of_models(name, full):
    assert models.full_name(name) == full


def test_models_by_name():
    for name in ("tnt_ti_patch16_224", "tnt_digits"):
        fast, _ = models.build(name, {"num_classes": 3})
        plain, _ = models.build(name, {"num_classes": 3}, reference=True)
        assert type(fast) is FastTNT
        assert type(plain) is TNT
        assert fast.head.out_features == 3


def test_the_digits_are_divided_evenly_and_always_alike(tmp_path):
    data = datasets.digits()
    assert (len(data.train), len(data.val)) == (1437, 360)
    for part in (data.train, data.val):
        counts = np.bincount(part.targets)
        assert counts.max() - counts.min() <= 10
    held_out = {image.tobytes() for image in data.val.images}
    assert {image.tobytes() for image in datasets.digits().val.images} == held_out
    assert not held_out & {image.tobytes() for image in data.train.images}

    assert digits_program.main([str(tmp_path / "digits"), "--per-class", "2"]) == 0
    found = datasets.image_folder(str(tmp_path / "digits"), datasets.damaged_images)
    assert found.classes == data.classes
    assert (len(found.train), len(found.val)) == (20, 20)
    assert all(datasets.open_image(path).tobytes() in held_out for path in found.val.paths)


@pytest.mark.slow
def test_digits_reach_97_percent():
    """With the preset as it is; `make train-demo` shows the same."""
    torch.set_num_threads(2)
    assert run("--dataset", "digits", "--output", "out") == 0
    best = max(rows(Path("out/history.csv")), key=lambda row: float(row["top1"]))
    assert float(best["top1"]) > 97.0
    assert float(best["top5"]) >= float(best["top1"])
