"""From images to batches: timm's transforms, and an order and augmentations that a run can go on with."""

from __future__ import annotations

import contextlib
import random
from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from timm.data.distributed_sampler import OrderedDistributedSampler, RepeatAugSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from tnt_programs.interrupts import leave_to_parent
from tnt_programs.processes import Processes

Draw = tuple[int, int]  # index of an image, seed of its augmentation


def train_transform(options: Namespace, preprocessing: Mapping[str, Any]) -> Any:
    """PIL image -> augmented float32 [3, H, W]. ValueError where timm does not know --aa."""
    try:
        return create_transform(
            tuple(preprocessing["input_size"]),
            is_training=True,
            no_aug=options.no_aug,
            scale=tuple(options.scale),
            ratio=tuple(options.ratio),
            hflip=options.hflip,
            vflip=options.vflip,
            color_jitter=options.color_jitter,
            auto_augment=options.aa,
            interpolation=options.train_interpolation,
            re_prob=options.reprob,
            re_mode=options.remode,
            mean=tuple(preprocessing["mean"]),
            std=tuple(preprocessing["std"]),
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"--aa must be a policy of timm's, got {options.aa!r}: {error}") from error


def eval_transform(preprocessing: Mapping[str, Any]) -> Any:
    """PIL image -> float32 [3, H, W], as validation and predict.py see it."""
    return create_transform(
        tuple(preprocessing["input_size"]),
        interpolation=preprocessing["interpolation"],
        mean=tuple(preprocessing["mean"]),
        std=tuple(preprocessing["std"]),
        crop_pct=preprocessing["crop_pct"],
        crop_mode=preprocessing.get("crop_mode"),
    )


class DrawSampler(Sampler[Draw]):
    """The images that a process draws in an epoch, in order, from the `start`-th on.

    Which ones and how they are augmented depends on the seed, the epoch and the place in the order of all
    processes together: not on workers, on what other random numbers were drawn, or on how many processes
    share a batch.
    """

    def __init__(self, images: Any, processes: Processes, *, seed: int, repeats: int = 1) -> None:
        self.seed, self.rank, self.world = seed, processes.rank, processes.world
        self.epoch = self.start = 0
        self.order: Any
        if repeats > 1:
            self.order = RepeatAugSampler(images, self.world, self.rank, num_repeats=repeats)
        else:
            self.order = DistributedSampler(images, self.world, self.rank, drop_last=True)

    def begin(self, epoch: int, start: int = 0) -> None:
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Images of a whole epoch."""
        return len(self.order)

    def __iter__(self) -> Iterator[Draw]:
        self.order.set_epoch(_mixed(self.seed, self.epoch))
        for place, index in enumerate(self.order):
            if place >= self.start:
                yield index, _mixed(self.seed, self.epoch, self.rank + place * self.world)


def _mixed(*numbers: int) -> int:
    """A seed in [0, 2^32) that depends on all of the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Augmented(Dataset[tuple[Any, int]]):
    """Training images by `Draw`: each augmentation from a seed of its own."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __getitem__(self, draw: Draw) -> tuple[Any, int]:
        index, seed = draw
        with seeded(seed):
            return self.images[index]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside it, Python's, NumPy's and torch's generators start at a seed; after it they are as before."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would set the GPU's, too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class TrainLoader:
    """Batches of one process's part of a step; `begin` says from where in which epoch."""

    def __init__(self, images: Any, batch: int, processes: Processes, options: Namespace) -> None:
        self.batch = batch
        self.draws = DrawSampler(images, processes, seed=options.seed, repeats=options.repeated_aug)
        self._loader = DataLoader(
            Augmented(images),
            batch_size=batch,
            sampler=self.draws,
            drop_last=True,
            **_settings(options.workers, processes),
        )

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self.draws) // self.batch

    def begin(self, epoch: int, done: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Images [batch, 3, H, W] and classes [batch] of an epoch, after the first `done` batches."""
        self.draws.begin(epoch, done * self.batch)
        return iter(self._loader)


def val_loader(images: Any, batch: int, processes: Processes, workers: int) -> tuple[Any, int]:
    """Batches of this process's part of the validation images, and how many of those images count.

    Every process has as many: what comes after that number is there twice.
    """
    order = OrderedDistributedSampler(images, processes.world, processes.rank)
    loader = DataLoader(images, batch_size=batch, sampler=order, **_settings(workers, processes))
    return loader, len(range(processes.rank, len(images), processes.world))


def _settings(workers: int, processes: Processes) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": processes.device.type == "cuda",
        "worker_init_fn": _start_worker,
        # Of its own: the loader must not draw from the generator that the model's dropout draws from.
        "generator": torch.Generator(),
    }


def _start_worker(worker: int) -> None:
    leave_to_parent()
