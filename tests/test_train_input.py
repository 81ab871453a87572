"""python/train.py: input that it refuses, and files that survive a full disk or a kill."""

from __future__ import annotations

import errno
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from program_runs import PROGRAMS, SHORT, environment, image_folder, rows, run, same_run, save_image, tiny

from tnt_programs import checkpoints, datasets


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return image_folder(tmp_path / "images")


def empty(root: Path) -> None:
    for path in root.rglob("*.jpg"):
        path.unlink()


def one_class(root: Path) -> None:
    for part in ("train", "val"):
        for path in (root / part / "light").iterdir():
            path.unlink()


def no_val(root: Path) -> None:
    (root / "val").rename(root / "test")


def no_train(root: Path) -> None:
    (root / "train").rename(root / "test")


def loose(root: Path) -> None:
    save_image(root / "train" / "0.jpg", 3, seed=0)


def foreign(root: Path) -> None:
    save_image(root / "val" / "grey" / "0.jpg", 100, seed=0)


def all_damaged(root: Path) -> None:
    for path in (root / "train" / "light").iterdir():
        path.write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (empty, "there are no images (.jpeg, .jpg, .png) in"),
        (one_class, "two classes or more are needed, there is one, dark"),
        (no_val, "has no val/ or validation/: train/ and val/ (or validation/)"),
        (no_train, "has no train/: train/ and val/"),
        (loose, "itself and not in a folder of their class"),
        (foreign, "has classes that train/ lacks: grey"),
        (all_damaged, "no image of class light can be read"),
    ],
)
def test_a_folder_that_cannot_be_trained_on(folder, spoil, message, capsys):
    spoil(folder)
    assert tiny(folder, "out") == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not Path("out").exists()


def test_a_validation_folder_with_fewer_classes_keeps_their_numbers(folder):
    (folder / "val").rename(folder / "validation")
    for path in (folder / "validation" / "dark").iterdir():
        path.unlink()
    data = datasets.image_folder(str(folder))
    assert data.classes == ["dark", "light"]
    assert {target for _, target in data.val.reader.samples} == {1}


def test_damaged_images_are_left_out_counted_and_named(folder, capsys):
    truncated = folder / "train/dark/3.jpg"
    junk, nothing = folder / "train/light/x.png", folder / "val/dark/1.jpg"
    truncated.write_bytes(truncated.read_bytes()[:-300])
    junk.write_text("no image")
    nothing.write_bytes(b"")
    assert tiny(folder, "out") == 0
    said = capsys.readouterr()
    for path in (truncated, junk, nothing):
        assert f"left out  {path}: " in said.err
    assert "3 unreadable images are left out" in said.err
    assert {row["file"] for row in rows(Path("out/damaged.csv"))} == set(map(str, (truncated, junk, nothing)))
    assert "data     23 images, 9 for validation" in said.out


@pytest.mark.parametrize("workers", ["0", "2"])
def test_without_the_scan_a_damaged_image_stops_the_run(folder, workers, capsys):
    path = folder / "train/dark/3.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    assert tiny(folder, "out", "--no-scan", "--workers", workers, "--epochs", "9") == 2
    said = capsys.readouterr().err
    assert f"train.py: {path}: " in said
    assert "without --no-scan such images are left out" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "-1"], "argument --lr: a number above 0 is needed, got '-1'"),
        (["--epochs", "0"], "argument --epochs: a whole number of at least 1 is needed, got '0'"),
        (["--smoothing", "nan"], "argument --smoothing: a number in [0, 0.99] is needed, got 'nan'"),
        (["--model-args", "depth"], "argument --model-args: NAME=VALUE is needed"),
        (["--aa", "wild"], "argument --aa: a policy of timm's is needed"),
        (["--preset", "mine"], "argument --preset: invalid choice: 'mine'"),
        (["--dataset", "folder"], "argument --data: --dataset folder needs the folder"),
        (["--dataset", "digits", "--data", "x"], "argument --data: --dataset digits brings its own images"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nothing"], "--data must be a folder, got nothing"),
        (["--model", "tnt_x"], "--model must be tnt_digits"),
        (["--model", "vit_base_patch61_224"], "near it: vit_base_patch"),
        (["--model-args", "width=3"], "--model-args: "),
        (["--opt", "adamx"], "--opt adamx: "),
        (["--aa", "rand-zz3"], "--aa must be a policy of timm's, got 'rand-zz3'"),
        (["--batch-size", "9000"], "--batch-size must be at most the 1437 images of an epoch, got 9000"),
        (["--batch-size", "6", "--accumulate", "4"], "--batch-size must be divisible by"),
        (["--batch-size", "6", "--accumulate", "2", "--mixup", "1"], "an even number of images"),
        (["--warmup-epochs", "99"], "--warmup-epochs must be below --epochs 25, got 99"),
        (["--scale", "0.9", "0.1"], "--scale must be the smaller bound and the larger, got 0.9 0.1"),
        (["--device", "gpu"], "--device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["--checkpoint", "nothing.pt"], "--checkpoint: there is no file nothing.pt"),
        (["--new-head"], "--new-head replaces the head of a --checkpoint"),
        (["--pretrained", "--checkpoint", "x"], "--pretrained and --checkpoint are both"),
        (["--pretrained"], "--pretrained: no weights of tnt_digits"),
    ],
)
def test_options_that_do_not_fit(arguments, message, capsys):
    assert run("--output", "out", *arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not Path("out").exists()


def test_a_damaged_checkpoint(folder, capsys):
    assert tiny(folder, "out") == 0
    Path("half.pt").write_bytes(Path("out/last.pt").read_bytes()[:5000])
    assert run("--data", folder, "--checkpoint", "half.pt", "--output", "x", *SHORT) == 2
    assert "'half.pt' is damaged or not a checkpoint" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_with_the_step(folder, monkeypatch, capsys):
    assert tiny(folder, "out", "--lr", "1e30", "--warmup-epochs", "0") == 3
    said = capsys.readouterr().err
    assert "train.py: the loss is nan in step " in said
    assert "nothing was saved yet" in said
    assert not Path("out/last.pt").exists()


def test_the_last_good_checkpoint_survives_a_loss_that_is_not_finite(folder, monkeypatch, capsys):
    plain = torch.nn.functional.log_softmax
    calls = []

    def spoilt(*arguments, **settings):
        calls.append(1)
        return plain(*arguments, **settings) * (float("inf") if len(calls) == 5 else 1.0)

    monkeypatch.setattr(torch.nn.functional, "log_softmax", spoilt)
    assert tiny(folder, "out") == 3
    said = capsys.readouterr().err
    assert "the loss is inf in step 5 (epoch 2, step 2 of 3); the last good checkpoint is out/last.pt" in said
    assert checkpoints.read("out/last.pt")["position"]["total"] == 3
    monkeypatch.setattr(torch.nn.functional, "log_softmax", plain)
    assert run("--resume", "out/last.pt") == 0
    assert tiny(folder, "straight") == 0
    same_run("straight", "out")


@pytest.fixture
def full_disk() -> Iterator:
    """A function: from then on no file of this process may grow above so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, full_disk):
    path = tmp_path / "run" / "last.pt"
    path.parent.mkdir()
    checkpoints.save(path, {"a": torch.zeros(3)})
    before = path.read_bytes()
    full_disk(50_000)
    with pytest.raises(OSError, match=r"last\.pt could not be written: File too large") as caught:
        checkpoints.save(path, {"a": torch.zeros(100_000)})
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_training_goes_on_when_a_checkpoint_cannot_be_written(folder, full_disk, capsys, monkeypatch):
    assert tiny(folder, "out", "--epochs", "2") == 0
    before = Path("out/last.pt").read_bytes()
    full_disk(len(before) // 2)
    assert run("--resume", "out/last.pt", "--epochs", "4") == 1
    said = capsys.readouterr()
    assert said.err.count("last.pt could not be written: File too large; the one before is intact") == 2
    assert "epoch 4/4" in said.out
    assert Path("out/last.pt").read_bytes() == before


def test_a_kill_in_the_middle_of_saving_leaves_the_checkpoint_before(tmp_path):
    path = tmp_path / "run" / "last.pt"
    path.parent.mkdir()
    script = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(PROGRAMS)!r})
from tnt_programs import checkpoints
path = Path({str(path)!r})
checkpoints.write(path, lambda file: file.write(b"first"))
def half(file):
    file.write(b"second" * 10000)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
checkpoints.write(path, half)
"""
    done = subprocess.run([sys.executable, "-c", script], env=environment())
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"first"
    checkpoints.write(path, lambda file: file.write(b"third"))
    assert [(file, file.read_bytes()) for file in path.parent.iterdir()] == [(path, b"third")]
