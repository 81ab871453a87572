"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among all of its run. The collectives do nothing in a run of one."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes, in place, on every one of them."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, asked: bool) -> bool:
        """Whether `asked` is true on one of the processes."""
        if self.world == 1:
            return asked
        return self.sum(torch.tensor(float(asked), device=self.device)).item() > 0

    def gather(self, item: Any) -> list[Any]:
        """Every process's item, by rank, on every one of them. Items are pickled."""
        if self.world == 1:
            return [item]
        items = [None] * self.world
        dist.all_gather_object(items, item)
        return items

    def wait(self) -> None:
        """Until every process has come here."""
        if self.world > 1:
            dist.barrier()


def rank() -> int:
    """This process's rank as torchrun says, before the processes are joined."""
    return int(os.environ.get("RANK", "0"))


def join(device: str) -> Processes:
    """Join the processes that torchrun started, if it did, and choose this one's device.

    Args:
        device: "auto" (CUDA where there is some), "cpu", "cuda" (the local process's device), "cuda:1", ...

    Raises:
        ValueError: there is no such device.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = device_named(device, int(os.environ.get("LOCAL_RANK", "0")), world)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world > 1:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return Processes(rank(), world, chosen)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def end(code: int) -> NoReturn:
    """Ends the program; one of several processes without Python's own clean-up.

    Process groups of FSDP2 live on in PyTorch's caches after they were destroyed, and a thread of theirs that
    lets go of a tensor while Python ends aborts the process (github.com/pytorch/pytorch/issues/190489).
    """
    if "WORLD_SIZE" not in os.environ:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def device_named(name: str, local_rank: int = 0, world: int = 1) -> torch.device:
    """The device of the option --device. ValueError where there is none such."""
    needed = "--device must be auto, cpu, cuda or cuda:N"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"{needed}, got {name!r}") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ValueError(f"{needed}, got {name!r}")
    count = torch.cuda.device_count()
    if device.index is not None and world > 1:
        raise ValueError(f"--device must have no number where torchrun starts processes, got {name!r}")
    index = local_rank if device.index is None else device.index
    if index >= count:
        raise ValueError(f"--device {name}: device {index} is needed, this machine has {count} CUDA devices")
    return torch.device("cuda", index)
