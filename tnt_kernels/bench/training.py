"""Training steps against their baselines: forward, loss, backward, AdamW, gradients dropped."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnt_kernels.bench import gradients
from tnt_kernels.bench.accuracy import Gradients
from tnt_kernels.bench.cases import Baseline, Runner, check_device, check_dtype, compiled
from tnt_kernels.bench.models import checked_images, eager_network, images, reference, timm_tnt
from tnt_kernels.bench.sizes import size_of
from tnt_kernels.models.accelerate import accelerate
from tnt_kernels.models.fast_tnt import FastTNT

CLASSES = 1000
LEARNING_RATE = 1e-5  # small: the network that is timed stays about the one that was checked
SEED = 3  # of stochastic depth in the step that is checked


@dataclass(frozen=True)
class TrainingCase:
    """One model at 224 px. dtype float32, or bfloat16: autocast over float32 parameters.

    drop_path: rate of stochastic depth in the last block; device: "cpu" or "cuda", the current GPU.
    """

    model: str
    batch: int
    dtype: str = "float32"
    drop_path: float = 0.0
    device: str = "cpu"

    kind = "training"
    unit = "images/s"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must lie in [0, 1), got {self.drop_path}")
        size_of(self.model)
        check_dtype(self.dtype)
        check_device(self.device)

    @property
    def title(self) -> str:
        depth = f", drop path {self.drop_path:g}" if self.drop_path else ""
        return f"{size_of(self.model).title}, training step, batch {self.batch}, {self.dtype}{depth}"

    @property
    def items(self) -> int:
        return self.batch

    def fields(self) -> dict[str, Any]:
        return asdict(self)

    def baselines(self) -> Mapping[str, Baseline]:
        return BASELINES

    def exact(self, family: str) -> Gradients:
        return exact_gradients(self.model, family, self.batch, self.drop_path, self.device)

    def eager(self, family: str) -> Gradients:
        return eager_gradients(self.model, family, self.batch, self.dtype, self.drop_path, self.device)

    def checked(self, result: Gradients) -> Gradients:
        return result


def labels(batch: int, device: str = "cpu") -> Tensor:
    """Seeded class indices [batch]."""
    return torch.randint(CLASSES, (batch,), generator=torch.Generator().manual_seed(2)).to(device)


def step_gradients(
    model: nn.Module, network: Callable[[Tensor], Tensor], image: Tensor, label: Tensor, dtype: str
) -> Gradients:
    """Logits and gradients of one training step, in groups; parameters are left without gradients.

    network: what runs `model`, which holds the parameters.
    """
    model.train()
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[image.device] if image.is_cuda else ()):
        torch.manual_seed(SEED)
        logits, loss = _forward(network, image, label, dtype)
    loss.backward()
    found = {"logits": [logits.detach()], **gradients.of_model(model)}
    model.zero_grad(set_to_none=True)
    return found


def _forward(
    network: Callable[[Tensor], Tensor], image: Tensor, label: Tensor, dtype: str
) -> tuple[Tensor, Tensor]:
    with torch.autocast(image.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = network(image)
        return logits, F.cross_entropy(logits, label)


@functools.lru_cache(maxsize=2)
def exact_gradients(model: str, family: str, batch: int, drop_path: float, device: str = "cpu") -> Gradients:
    """Logits and gradients of the checked images in float64."""
    exact, checked = eager_network(model, family, drop_path).to(device).double(), checked_images(batch)
    image, label = images(batch, device)[checked].double(), labels(batch, device)[checked]
    return step_gradients(exact, exact, image, label, "float32")


@functools.lru_cache(maxsize=2)
def eager_gradients(
    model: str, family: str, batch: int, dtype: str, drop_path: float, device: str = "cpu"
) -> Gradients:
    """Logits and gradients of the checked images in eager PyTorch."""
    eager, checked = eager_network(model, family, drop_path).to(device), checked_images(batch)
    image, label = images(batch, device)[checked], labels(batch, device)[checked]
    return step_gradients(eager, eager, image, label, dtype)


def _runner(case: TrainingCase, model: nn.Module, compile: bool = False) -> Runner:
    model = model.to(case.device).train()
    # With stochastic depth, eager's random numbers: the check needs the same branches dropped.
    options: dict[str, Any] = {"fallback_random": True} if case.drop_path else {}
    network = compiled(model, **options) if compile else model
    image, label = images(case.batch, case.device), labels(case.batch, case.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05, fused=True)

    def loss() -> Tensor:
        return _forward(network, image, label, case.dtype)[1]

    def step() -> Tensor:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    def result() -> Gradients:
        checked = checked_images(case.batch)
        return step_gradients(model, network, image[checked], label[checked], case.dtype)

    return Runner(
        step,
        check_dtype(case.dtype),
        result=result,
        saved_bytes=lambda: gradients.saved_bytes(loss, model.parameters()),
    )


def _timm(case: TrainingCase, artifacts: Path) -> Runner:
    return _runner(case, timm_tnt(case.model, case.drop_path))


def _compiled(case: TrainingCase, artifacts: Path) -> Runner:
    return _runner(case, timm_tnt(case.model, case.drop_path), compile=True)


def _reference(case: TrainingCase, artifacts: Path) -> Runner:
    return _runner(case, copy.deepcopy(reference(case.model, case.drop_path)))


def _reference_compiled(case: TrainingCase, artifacts: Path) -> Runner:
    return _runner(case, copy.deepcopy(reference(case.model, case.drop_path)), compile=True)


def _fast(case: TrainingCase, artifacts: Path) -> Runner:
    return _runner(case, FastTNT.from_reference(reference(case.model, case.drop_path)))


def _fast_compiled(case: TrainingCase, artifacts: Path) -> Runner:
    return _runner(case, FastTNT.from_reference(reference(case.model, case.drop_path)), compile=True)


def _accelerated(case: TrainingCase, artifacts: Path) -> Runner:
    return _runner(case, accelerate(timm_tnt(case.model, case.drop_path).to(case.device)))


def _deit(case: TrainingCase, artifacts: Path) -> Runner:
    return _runner(case, eager_network(case.model, "deit", case.drop_path))


def _deit_compiled(case: TrainingCase, artifacts: Path) -> Runner:
    return _runner(case, eager_network(case.model, "deit", case.drop_path), compile=True)


BASELINES: dict[str, Baseline] = {
    b.name: b
    for b in (
        Baseline("timm", "timm TNT, eager", _timm),
        Baseline("compile", "timm TNT, torch.compile", _compiled),
        Baseline("reference", "plain TNT of this package, eager", _reference),
        Baseline("reference_compile", "plain TNT of this package, torch.compile", _reference_compiled),
        Baseline("fast", "FastTNT", _fast, ours=True),
        Baseline("fast_compile", "FastTNT, torch.compile", _fast_compiled, ours=True),
        Baseline("accelerate", "accelerate(timm TNT)", _accelerated, ours=True),
        Baseline("deit", "timm DeiT, eager", _deit, family="deit"),
        Baseline("deit_compile", "timm DeiT, torch.compile", _deit_compiled, family="deit"),
    )
}
DEFAULT_NAMES = ("timm", "compile", "fast", "accelerate", "deit")
