"""Two processes over gloo train as one does: DistributedDataParallel and FSDP2 (fully_shard)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from model_cases import AUTHORS, images, make, randomize
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tnt_kernels import TNT, FastTNT, accelerate, restore
from tnt_kernels.models import fused

pytestmark = [
    pytest.mark.usefixtures("needs_native"),
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo"),
]

PROCESSES, BATCH, STEPS, SECONDS = 2, 8, 4, 240
KINDS = ("fast", "timm")


def original(kind: str) -> nn.Module:
    return randomize(TNT(**AUTHORS)) if kind == "fast" else make("timm")


def accelerated(kind: str) -> nn.Module:
    return FastTNT.from_reference(original(kind)) if kind == "fast" else accelerate(original(kind))


def shard(model: nn.Module, modules: list[nn.Module], **options: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for module in (*modules, model):
        fully_shard(module, mesh=mesh, **options)
    return model


def ddp(kind: str) -> nn.Module:
    return DistributedDataParallel(accelerated(kind), find_unused_parameters=False)


def ddp_with_checkpoints(kind: str) -> nn.Module:
    model: Any = accelerated(kind)
    model.set_grad_checkpointing()
    return DistributedDataParallel(model)


def fsdp(kind: str) -> nn.Module:
    model: Any = accelerated(kind)
    return shard(model, list(model.blocks))


def fsdp_then_accelerate(kind: str) -> nn.Module:
    model: Any = original(kind)
    return accelerate(shard(model, list(model.blocks)))


def fsdp_of_every_module(kind: str) -> nn.Module:
    model = accelerated(kind)
    inside = [m for m in model.modules() if m is not model and any(True for _ in m.parameters())]
    return shard(model, [m for m in reversed(inside) if not isinstance(m, nn.ModuleList)])


def fsdp_bfloat16(kind: str) -> nn.Module:
    model: Any = accelerated(kind)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    return shard(model, list(model.blocks), mp_policy=policy)


CASES: dict[str, Callable[[str], nn.Module]] = {
    case.__name__: case
    for case in (ddp, ddp_with_checkpoints, fsdp, fsdp_then_accelerate, fsdp_of_every_module, fsdp_bfloat16)
}
ACCUMULATED = ("ddp", "fsdp")


def train(model: nn.Module, x: Tensor, target: Tensor, accumulate: bool = False) -> list[float]:
    """Losses of a few steps of AdamW; with `accumulate`, each step takes its batch in two halves."""
    optimizer = torch.optim.AdamW(model.train().parameters(), 1e-3)
    losses = []
    for _ in range(STEPS):
        parts = list(zip(x.chunk(2), target.chunk(2), strict=True)) if accumulate else [(x, target)]
        total = 0.0
        optimizer.zero_grad()
        for index, (part, wanted) in enumerate(parts):
            with _without_reduction(model) if index < len(parts) - 1 else nullcontext():
                loss = F.cross_entropy(model(part).float(), wanted) / len(parts)
                loss.backward()
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(True)
            total += loss.item()
        optimizer.step()
        losses.append(total)
    return losses


def _without_reduction(model: nn.Module) -> Any:
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
    return nullcontext()


def whole_batch() -> tuple[Tensor, Tensor]:
    return images(BATCH), torch.arange(BATCH) % 7


def work(rank: int, folder: str) -> None:
    """One of the processes: the mean losses of every case, and how often fused operations ran, to a file."""
    torch.set_num_threads(1)
    warnings.filterwarnings(
        "ignore", message=".*returned a view tensor"
    )  # FSDP2, of modules that PyTorch has
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=SECONDS),
    )
    calls: dict[str, int] = {}
    _count(calls)
    x, target = (whole.chunk(PROCESSES)[rank] for whole in whole_batch())
    found: dict[str, Any] = {}
    for kind in KINDS:
        for case, build in CASES.items():
            for accumulate in (False, True) if case in ACCUMULATED else (False,):
                model = build(kind)
                calls.clear()
                losses = torch.tensor(train(model, x, target, accumulate))
                dist.all_reduce(losses)
                name = f"{kind}-{case}" + ("-accumulated" if accumulate else "")
                found[name] = (losses / PROCESSES, dict(calls))
                torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _count(calls: dict[str, int]) -> None:
    def counting(own: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return own(*args, **kwargs)

        return counted

    for owner, name in (
        (fused.ops, "pixel_embed"),
        (fused.ops, "inner_block"),
        (fused.ops, "word_to_sentence"),
        (fused, "class_token_block"),
    ):
        setattr(owner, name, counting(getattr(owner, name), name))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What every process found, by rank and case."""
    folder: Path = tmp_path_factory.mktemp("processes")
    context = mp.spawn(work, (str(folder),), PROCESSES, join=False)
    try:
        deadline = time.monotonic() + SECONDS
        while not context.join(timeout=5):
            assert time.monotonic() < deadline, f"the processes hang after {_found(folder)}"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return _found(folder)


def _found(folder: Path) -> dict[int, dict[str, Any]]:
    return {int(file.stem): torch.load(file) for file in sorted(folder.glob("*.pt"))}


@pytest.fixture(scope="module")
def alone() -> Iterator[dict[str, Tensor]]:
    """The losses of one process and the model as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {kind: torch.tensor(train(original(kind), *whole_batch())) for kind in KINDS}
    torch.set_num_threads(threads)


NAMES = [f"{kind}-{case}" for kind in KINDS for case in CASES]
NAMES += [f"{kind}-{case}-accumulated" for kind in KINDS for case in ACCUMULATED]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_as_one(
    name: str, results: dict[int, dict[str, Any]], alone: dict[str, Tensor]
) -> None:
    kind, case, *_ = name.split("-")
    for rank in range(PROCESSES):
        losses, calls = results[rank][name]
        tolerance = 0.1 if case == "fsdp_bfloat16" else 1e-5
        torch.testing.assert_close(losses, alone[kind], rtol=tolerance, atol=tolerance)
        forwards = STEPS * (2 if name.endswith("accumulated") else 1)
        if case == "fsdp_of_every_module":  # each part has modules that are watched
            assert not calls
        else:
            runs = 2 if case == "ddp_with_checkpoints" else 1  # the backward pass runs every block again
            assert calls["inner_block"] == 3 * runs * forwards
            assert calls["pixel_embed"] == forwards
            assert calls["word_to_sentence"] >= 3 * runs * forwards
        # The hooks of fully_shard see the last block, and a checkpoint has the whole of it.
        assert calls.get("class_token_block", 0) == (forwards if case == "ddp" else 0)
    assert alone[kind][-1] < 0.5 * alone[kind][0]


def test_restore_of_a_sharded_model(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = accelerated("timm")
        before = {name: type(module) for name, module in model.named_modules()}
        fully_shard(model.blocks[1], mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(TypeError, match=r"blocks\.1 cannot be restored: it is a FSDPBlock"):
            restore(model)
        same = {name: type(module) for name, module in model.named_modules()}
        assert {name for name, own in same.items() if before[name] is not own} == {"blocks.1"}
        assert accelerate(model) is model
        assert {name: type(module) for name, module in model.named_modules()} == same
    finally:
        dist.destroy_process_group()
