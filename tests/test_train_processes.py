"""python/train.py in several processes, and the order and augmentation of the images."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from program_runs import (
    EVERYTHING,
    ONE,
    PROGRAMS,
    TINY_MODEL,
    environment,
    image_folder,
    losses,
    rows,
    run,
    same_run,
    weights,
)

from tnt_programs import checkpoints, loaders
from tnt_programs.processes import Processes


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return image_folder(tmp_path / "images")


def torchrun_command(*arguments: str | Path) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*start, str(PROGRAMS / "train.py"), *map(str, arguments), "--device", "cpu", "--no-progress"]


def torchrun(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        torchrun_command(*arguments),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("extra", [[], ["--fsdp"]], ids=["DDP", "FSDP2"])
def test_two_processes_give_the_losses_of_one(extra):
    arguments = [*TINY_MODEL, "--epochs", "2", "--warmup-epochs", "1", "--drop-path", "0", "--log-steps"]
    arguments += ["--ema-decay", "0.9", "--clip-grad", "1"]
    assert run(*arguments, "--output", "one") == 0
    done = torchrun(*arguments, "--output", "two", *extra)
    assert done.returncode == 0, done.stderr
    assert losses("two") == pytest.approx(losses("one"), abs=2e-5)
    for one, two in zip(rows(Path("one/history.csv")), rows(Path("two/history.csv")), strict=True):
        assert float(one["val_loss"]) == pytest.approx(float(two["val_loss"]), abs=1e-4)
    one, two = weights("one"), weights("two")
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-3


@pytest.mark.parametrize("extra", [[], ["--fsdp"]], ids=["DDP", "FSDP2"])
def test_two_processes_resume(folder, extra):
    # A rate that does not depend on --epochs: both runs have the same first epoch.
    arguments = ["--data", folder, *TINY_MODEL, *EVERYTHING, "--preset", "none", "--sched", "constant"]
    arguments += ["--warmup-epochs", "0", "--workers", "0", "--batch-size", "8", "--log-steps", *extra]
    for output, epochs in (("straight", "2"), ("broken", "1")):
        done = torchrun(*arguments, "--epochs", epochs, "--output", output)
        assert done.returncode == 0, done.stderr
    done = torchrun("--resume", "broken/last.pt", "--epochs", "2")
    assert done.returncode == 0, done.stderr
    same_run("straight", "broken")


def test_ctrl_c_in_two_processes_saves(folder):
    """A terminal sends it to all of them, and torchrun passes it on again."""
    arguments = ["--data", folder, *TINY_MODEL, *EVERYTHING, "--preset", "none", "--workers", "1"]
    process = subprocess.Popen(
        torchrun_command(*arguments, "--batch-size", "8", "--epochs", "1000", "--output", "out"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            break
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert "torchrun --nproc-per-node 2" in out, err
    assert "train.py: " not in err
    content = checkpoints.read("out/last.pt")
    assert content is not None
    assert len(content["rng"]) == 2


def test_draws_depend_on_seed_and_epoch_alone():
    images = list(range(103))

    def draws(world, batch, epoch=0, seed=0, start=0, repeats=1):
        samplers = [
            loaders.DrawSampler(images, Processes(rank, world, ONE.device), seed=seed, repeats=repeats)
            for rank in range(world)
        ]
        parts = []
        for sampler in samplers:
            sampler.begin(epoch, start)
            parts.append(list(sampler))
        count = min(map(len, parts)) // batch
        return [sorted(d for part in parts for d in part[i * batch : (i + 1) * batch]) for i in range(count)]

    assert draws(1, 12) == draws(2, 6) == draws(4, 3)
    assert draws(1, 12)[2:] == draws(1, 12, start=24)
    assert draws(1, 12) != draws(1, 12, epoch=1)
    assert draws(1, 12) != draws(1, 12, seed=1)
    drawn = [index for batch in draws(1, 1, repeats=3) for index, _ in batch]
    assert len(drawn) == len(images)
    assert max(drawn.count(index) for index in drawn) == 3
    seeds = [seed for batch in draws(1, 1, repeats=3) for _, seed in batch]
    assert len(set(seeds)) == len(seeds)  # a repeated image is augmented anew


def test_augmentation_leaves_the_generators_alone():
    states = checkpoints.random_states(ONE)
    with loaders.seeded(3):
        first = np.random.rand(), torch.rand(1).item()
    with loaders.seeded(3):
        assert (np.random.rand(), torch.rand(1).item()) == first
    after = checkpoints.random_states(ONE)
    assert states[0]["python"] == after[0]["python"]
    assert states[0]["numpy"] == after[0]["numpy"]
    assert torch.equal(states[0]["torch"], after[0]["torch"])
