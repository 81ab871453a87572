"""The training loop: steps, epochs, validation, and a state to go on from after any step."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from tnt_programs import models, recipe, sharding
from tnt_programs.datasets import ImageData
from tnt_programs.interrupts import Interrupts
from tnt_programs.loaders import TrainLoader, val_loader
from tnt_programs.precision import autocast
from tnt_programs.processes import Processes


class NonFiniteLoss(Exception):
    """The loss became infinite or NaN."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM came; the trainer stands between two steps."""


@dataclass
class Position:
    """Where a run is: in epoch `epoch` (from 0), of which `step` optimiser steps are done; `total` in all."""

    epoch: int = 0
    step: int = 0
    total: int = 0
    loss_sum: float = 0.0  # of the losses of this epoch's steps
    seconds: float = 0.0  # that this epoch has trained


class Trainer:
    """A model and all that changes while it is trained.

    Args:
        model: on the CPU; it is moved, and trained in place.
        data: images with their transforms set.
        options: from `options.parse`.
        processes: those that share the batches.
        interrupts: asked between two steps.
        content: a checkpoint's, from `state()`, to go on from.

    Raises:
        ValueError: options do not fit the data, the model or the number of processes.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        options: Namespace,
        processes: Processes,
        interrupts: Interrupts,
        content: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.options, self.processes, self.interrupts = model, options, processes, interrupts
        self.position = Position(**content["position"]) if content else Position()
        self.step_rows: list[dict[str, Any]] = []  # one per step since somebody emptied it
        self.classes = len(data.classes)

        if options.fsdp and processes.world == 1:
            raise ValueError("--fsdp needs several processes: torchrun --nproc-per-node N train.py ...")
        self.mixup = recipe.mixup(options, self.classes)
        batch = _part_of_batch(options, processes, mixed=self.mixup is not None)
        self.train_loader = TrainLoader(data.train, batch, processes, options)
        self.val_loader, self.val_count = val_loader(data.val, batch, processes, options.workers)
        self.steps = len(self.train_loader) // options.accumulate
        if self.steps == 0:
            drawn = len(self.train_loader.draws) * processes.world
            raise ValueError(
                f"--batch-size must be at most the {drawn} images of an epoch, got {options.batch_size}"
            )
        self.loss = recipe.loss(options, mixed=self.mixup is not None)

        if content:
            models.load_weights(model, content["state_dict"])
        model.to(processes.device)
        if options.freeze:
            models.freeze(model)
        self.ema = None
        if options.ema_decay > 0:
            self.ema = ModelEmaV3(model, options.ema_decay, use_warmup=options.ema_warmup)
            if content:
                models.load_weights(self.ema.module, content["state_dict_ema"])
        if options.checkpoint_activations:
            models.checkpoint_activations(model)
        if options.compile:
            model.compile()
        self.wrapped = self._wrapped()
        self.optimizer = recipe.optimizer(model, options)
        self.scheduler, self.epochs = recipe.schedule(self.optimizer, options, self.steps)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=options.amp == "float16")
        if content:
            sharding.load_optimizer(model, self.optimizer, content["optimizer"], sharded=options.fsdp)
            self.scaler.load_state_dict(content["scaler"])
            if content["args"]["epochs"] == options.epochs:
                self.scheduler.load_state_dict(content["scheduler"])

    def state(self) -> dict[str, Any]:
        """The `content` that the constructor goes on from, in tensors and plain types. For every process."""
        sharded = self.options.fsdp
        weights = sharding.weights(self.model, sharded=sharded)
        content = {
            "state_dict": models.authors_names(weights),
            "optimizer": sharding.optimizer_state(self.model, self.optimizer, sharded=sharded),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "position": asdict(self.position),
        }
        if self.ema is not None:
            averaged = sharding.weights(self.ema.module, sharded=sharded)
            content["state_dict_ema"] = models.authors_names(averaged)
        return content

    def epoch(self) -> dict[str, Any]:
        """Train what is left of this epoch, validate, and go on to the next: the epoch's figures.

        Raises:
            Interrupted: `state()` has all that is needed to go on.
            NonFiniteLoss: the message has the step. The weights are spoilt.
        """
        position = self.position
        self._train()
        start = time.perf_counter()
        found = self._validate(self.model if self.ema is None else self.ema.module)
        row = {
            "epoch": position.epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": position.loss_sum / self.steps,
            "train_images_per_s": self.steps * self.options.batch_size / position.seconds,
            **found,
            "seconds": position.seconds + time.perf_counter() - start,
        }
        if not math.isfinite(row["val_loss"]):
            raise NonFiniteLoss(f"the validation loss is {row['val_loss']} after epoch {row['epoch']}")
        self.position = Position(position.epoch + 1, total=position.total)
        self.scheduler.step(self.position.epoch)
        return row

    def _train(self) -> None:
        position, options = self.position, self.options
        if position.step == self.steps:
            return
        models.train_mode(self.model, options.freeze)
        batches = self.train_loader.begin(position.epoch, position.step * options.accumulate)
        title = f"epoch {position.epoch + 1}/{self.epochs}"
        with self._bar(total=self.steps, initial=position.step, desc=title) as bar:
            while position.step < self.steps:
                start = time.perf_counter()
                lr = self.optimizer.param_groups[0]["lr"]
                loss, stop = self._step(itertools.islice(batches, options.accumulate))
                position.step += 1
                position.total += 1
                position.loss_sum += loss
                position.seconds += time.perf_counter() - start
                if not math.isfinite(loss):
                    raise NonFiniteLoss(
                        f"the loss is {loss} in step {position.total} (epoch {position.epoch + 1}, step "
                        f"{position.step} of {self.steps})"
                    )
                self.step_rows.append(
                    {"step": position.total, "epoch": position.epoch + 1, "lr": lr, "loss": loss}
                )
                bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
                bar.update()
                if stop:
                    raise Interrupted

    def _step(self, parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, bool]:
        """One optimiser step: its loss over all processes and parts, whether one of them was interrupted."""
        count = self.options.accumulate
        report = torch.zeros(2, device=self.processes.device)
        for part, (images, targets) in enumerate(parts):
            images, targets = self._on_device(images), self._on_device(targets)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            with self._gradients_apart(unless=part == count - 1):
                with self._autocast():
                    logits = self.wrapped(images)
                loss = self.loss(logits.float(), targets) / count
                self.scaler.scale(loss).backward()
            report[0] += loss.detach()
        if self.options.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.model.parameters(), self.options.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        done = self.position.total + 1
        if self.ema is not None:
            self.ema.update(self.model, step=done)
        self.scheduler.step_update(done)
        report[0] /= self.processes.world
        report[1] = self.interrupts.asked
        loss_of_all, asked = self.processes.sum(report).tolist()
        return loss_of_all, asked > 0

    def _validate(self, model: nn.Module) -> dict[str, float | None]:
        """Loss, and top-1 and top-5 accuracy in percent; top-5 is None below five classes."""
        model.eval()
        rank = min(5, self.classes)
        sums = torch.zeros(4, dtype=torch.float64, device=self.processes.device)  # loss, top-1, top-5, images
        left = self.val_count
        # With FSDP, inference mode would leave behind gathered parameters that cannot be trained.
        with torch.no_grad() if self.options.fsdp else torch.inference_mode():
            for images, targets in self._bar(self.val_loader, desc="validation"):
                with self._autocast():
                    logits = model(self._on_device(images))
                real = min(left, len(targets))  # the rest is there twice
                left -= real
                logits, targets = logits[:real].float(), self._on_device(targets)[:real]
                hits = logits.topk(rank).indices == targets[:, None]  # [real, rank]
                loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
                sums += torch.stack([loss, hits[:, 0].sum(), hits.sum(), loss.new_tensor(real)]).double()
                if self.processes.any(self.interrupts.asked):
                    raise Interrupted
        loss_sum, top1, top5, count = self.processes.sum(sums).tolist()
        return {
            "val_loss": loss_sum / count,
            "top1": 100 * top1 / count,
            "top5": 100 * top5 / count if rank == 5 else None,
        }

    def _wrapped(self) -> nn.Module:
        """What a training step calls: the model, with the gradients of all processes brought together."""
        if self.options.fsdp:
            if self.ema is not None:
                sharding.shard(self.ema.module)
            return sharding.shard(self.model)
        if self.processes.world == 1:
            return self.model
        devices = [self.processes.device] if self.processes.device.type == "cuda" else None
        return DistributedDataParallel(self.model, device_ids=devices)

    @contextlib.contextmanager
    def _gradients_apart(self, *, unless: bool) -> Any:
        """Leave the gradients of a part in this process: they travel with the last one's."""
        if isinstance(self.wrapped, DistributedDataParallel) and not unless:
            with self.wrapped.no_sync():
                yield
        else:
            yield

    def _autocast(self) -> torch.autocast:
        return autocast(self.processes.device, self.options.amp)

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.processes.device, non_blocking=True)

    def _bar(self, *args: Any, **settings: Any) -> Any:
        # None: where standard error is a terminal.
        off = True if self.options.no_progress or not self.processes.first else None
        return tqdm(*args, **settings, disable=off, leave=False, dynamic_ncols=True)


def _part_of_batch(options: Namespace, processes: Processes, *, mixed: bool) -> int:
    """Images that a process works on at once."""
    size, parts = options.batch_size, processes.world * options.accumulate
    if size % parts:
        raise ValueError(f"--batch-size must be divisible by processes x --accumulate = {parts}, got {size}")
    if mixed and size // parts % 2:
        raise ValueError(
            "--batch-size must give every process and part an even number of images: --mixup and --cutmix "
            f"mix pairs; got {size} / {parts} = {size // parts}"
        )
    return int(size // parts)
