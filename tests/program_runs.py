"""Runs of python/train.py on data that takes seconds, and what they left behind."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from tnt_programs import checkpoints
from tnt_programs.processes import Processes
from tnt_programs.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / "python"
# A TNT that takes milliseconds, with everything that the big one has.
TINY = "depth=2 patch_size=8 inner_stride=4 outer_dim=16 inner_dim=8 outer_num_heads=2 inner_num_heads=2"
TINY_MODEL = ["--model", "tnt_digits", "--img-size", "32", "--model-args", *TINY.split()]
# All that draws random numbers, and all that has a state.
EVERYTHING = [
    *("--mixup", "0.4", "--cutmix", "0.4", "--drop-path", "0.2", "--drop", "0.1", "--reprob", "0.3"),
    *("--aa", "rand-m5", "--ema-decay", "0.9"),
]
ONE = Processes(0, 1, torch.device("cpu"))


def save_image(path: Path, level: int, seed: int, size: tuple[int, int] = (40, 48)) -> None:
    noise = np.random.default_rng(seed).integers(0, 60, (*size, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((noise + level).astype(np.uint8)).save(path)


def image_folder(root: Path) -> Path:
    """Two classes, dark and light: 12 images of each to train on, 5 to validate."""
    for part, count in (("train", 12), ("val", 5)):
        for level, name in ((20, "dark"), (180, "light")):
            for index in range(count):
                save_image(root / part / name / f"{index}.jpg", level, seed=index)
    return root


def run(*arguments: str | Path) -> int:
    return train.main([*map(str, arguments), "--no-progress"])


def tiny(data: Path, output: str | Path, *arguments: str | Path) -> int:
    """Three epochs of three steps, on an image folder."""
    return run(
        *("--data", data, "--output", output, *TINY_MODEL, "--preset", "none", "--workers", "0"),
        *("--epochs", "3", "--warmup-epochs", "1", "--batch-size", "8", "--mixup", "0", "--cutmix", "0"),
        *("--log-steps", *arguments),
    )


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def losses(output: str | Path) -> list[float]:
    return [float(row["loss"]) for row in rows(Path(output, "steps.csv"))]


def weights(output: str | Path) -> dict[str, torch.Tensor]:
    content = checkpoints.read(Path(output, "last.pt"))
    assert content is not None
    return {**content["state_dict"], **{f"ema.{k}": v for k, v in content.get("state_dict_ema", {}).items()}}


def same_run(one: str | Path, other: str | Path) -> None:
    """Losses, validation figures and weights to the last bit."""
    assert losses(one) == losses(other)
    timed = ("train_images_per_s", "seconds")
    first, second = (
        [{k: v for k, v in row.items() if k not in timed} for row in rows(Path(folder, "history.csv"))]
        for folder in (one, other)
    )
    assert first == second
    first_weights, second_weights = weights(one), weights(other)
    assert first_weights.keys() == second_weights.keys()
    assert all(torch.equal(value, second_weights[name]) for name, value in first_weights.items())


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make Ctrl-C come during a step, once."""
    plain = Trainer._step

    def interrupted(self, parts):
        if self.position.total + 1 == step:
            monkeypatch.setattr(Trainer, "_step", plain)
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, parts)

    monkeypatch.setattr(Trainer, "_step", interrupted)


SHORT = ["--epochs", "1", "--warmup-epochs", "0", "--batch-size", "8", "--workers", "0"]


def environment(**variables: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}
