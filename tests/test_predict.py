"""python/predict.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from program_runs import image_folder, rows, tiny

import predict
from tnt_kernels import tnt_ti_patch16_224
from tnt_programs import models


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return image_folder(tmp_path / "images")


@pytest.fixture
def trained(folder) -> Path:
    assert tiny(folder, "trained", "--epochs", "8", "--lr", "0.02", "--hflip", "0.5") == 0
    return Path("trained/best.pt")


def test_predictions_as_json(folder, trained, capsys):
    capsys.readouterr()
    arguments = [str(folder / "val"), "--checkpoint", str(trained), "--format", "json", "--batch-size", "3"]
    assert predict.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["damaged"] == []
    assert [Path(item["file"]).relative_to(folder / "val").parts[0] for item in found["predictions"]] == [
        *["dark"] * 5,
        *["light"] * 5,
    ]
    for item in found["predictions"]:
        assert [top["class"] for top in item["top"]] in (["dark", "light"], ["light", "dark"])
        assert sum(top["probability"] for top in item["top"]) == pytest.approx(1.0)
        assert item["top"][0]["class"] == Path(item["file"]).parent.name
    assert predict.main([*arguments, "--reference"]) == 0
    reference = json.loads(capsys.readouterr().out)
    for item, other in zip(found["predictions"], reference["predictions"], strict=True):
        assert item["top"][0]["probability"] == pytest.approx(other["top"][0]["probability"], abs=1e-4)


def test_predictions_agree_with_the_validation(folder, trained):
    """The same preprocessing: as many right as train.py counted."""
    arguments = ["--checkpoint", str(trained), "--format", "csv", "--output", "out.csv", "--workers", "2"]
    assert predict.main([str(folder / "val"), *arguments]) == 0
    found = [row for row in rows(Path("out.csv")) if row["rank"] == "1"]
    right = sum(Path(row["file"]).parent.name == row["class"] for row in found)
    best = max(float(row["top1"]) for row in rows(Path("trained/history.csv")))
    assert 100 * right / len(found) == pytest.approx(best)


def test_a_table_names_classes_and_damaged_files(folder, trained, capsys):
    good, bad = folder / "val/light/0.jpg", folder / "val/light/bad.jpg"
    bad.write_bytes(good.read_bytes()[:200])
    capsys.readouterr()
    files = [str(good), str(bad), "nothing.png"]
    assert predict.main([*files, "--checkpoint", str(trained), "--top-k", "1"]) == 1
    said = capsys.readouterr()
    assert str(good) in said.out
    assert "light" in said.out
    assert "%" in said.out
    assert f"predict.py: {bad}: " in said.err
    assert "predict.py: nothing.png: No such file or directory" in said.err
    assert "2 of 3 images cannot be read" in said.err


def test_predict_from_published_weights(folder, capsys):
    torch.manual_seed(0)
    model = tnt_ti_patch16_224(num_classes=3, depth=1)
    torch.save({"state_dict": model.state_dict()}, "published.pth.tar")
    arguments = ["--checkpoint", "published.pth.tar", "--format", "json", "--amp", "bfloat16"]
    assert predict.main([str(folder / "val/dark/0.jpg"), *arguments]) == 0
    (item,) = json.loads(capsys.readouterr().out)["predictions"]
    assert {top["class"] for top in item["top"]} == {"0", "1", "2"}


def test_predict_with_a_model_of_timms(folder, monkeypatch, capsys):
    asked = []
    create = models.timm.create_model

    def offline(name, pretrained=False, **arguments):
        asked.append((name, pretrained))
        return create(name, **arguments)

    monkeypatch.setattr(models.timm, "create_model", offline)
    arguments = ["--model", "test_vit", "--format", "json", "--top-k", "3"]
    assert predict.main([str(folder / "val/dark"), *arguments]) == 0
    found = json.loads(capsys.readouterr().out)["predictions"]
    assert asked == [("test_vit", True)]
    assert len(found) == 5
    assert not found[0]["top"][0]["class"].isdigit()  # ImageNet's names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.png"], "one of the arguments --checkpoint --model is required"),
        (["x.png", "--checkpoint", "nothing.pt"], "--checkpoint: there is no file nothing.pt"),
        (["x.png", "--model", "tnt_q"], "--model must be"),
        (["x.png", "--model", "test_vit", "--output", "no/where.csv"], "--output must lie in a folder"),
        (["x.png", "--model", "test_vit", "--top-k", "0"], "argument --top-k: a whole number of at least 1"),
    ],
)
def test_predict_says_what_is_wrong(arguments, message, capsys):
    try:
        code = predict.main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


def test_predict_in_a_folder_without_images(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert predict.main([str(tmp_path / "empty"), "--model", "test_vit"]) == 2
    assert "there are no images (.jpeg, .jpg, .png) in this folder" in capsys.readouterr().err
