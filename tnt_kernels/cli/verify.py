"""Check every operator, both models and their gradients against float64 on this machine.

A result passes when its largest error is at most 1.5 times that of eager PyTorch in the same precision, plus
1e-6 of the largest value. Float32 logits must also lie within 1e-4 of eager's. Gradients pass by the same
rule on root mean squares: the worst of an operator's, and those of a model part by part of its blocks. Exit
status 1 on failure.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tnt_kernels import dispatch, gpu, native
from tnt_kernels.bench.accuracy import Gradients, Result, as_accurate_as_eager, max_error
from tnt_kernels.bench.cases import DEVICES, check_device, reason, torch_call
from tnt_kernels.bench.engine import using_threads
from tnt_kernels.bench.models import images, reference
from tnt_kernels.bench.ops import OPS, Backward, arguments, forced_tier
from tnt_kernels.bench.progress import Bar
from tnt_kernels.bench.results import table
from tnt_kernels.bench.sizes import size_of
from tnt_kernels.bench.training import labels, step_gradients
from tnt_kernels.cli.arguments import positive
from tnt_kernels.dispatch import use_backend
from tnt_kernels.models.fast_tnt import FastTNT

HELP = "every operator, model and gradient against float64 on this machine; exit status 1 on failure"
LOGITS_TOLERANCE = 1e-4
DROP_PATH = 0.1  # rate of stochastic depth in the training steps


@dataclass(frozen=True)
class Precision:
    """dtype of the tensors and parameters; autocast: bfloat16 autocast over them."""

    name: str
    dtype: torch.dtype
    autocast: bool = False

    def call(self, function: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
        return torch_call(function, args, "bfloat16" if self.autocast else "float32")()


PRECISIONS = (
    Precision("float32", torch.float32),
    Precision("bfloat16 autocast", torch.float32, autocast=True),
    Precision("bfloat16", torch.bfloat16),
    Precision("float16", torch.float16),
)


@dataclass(frozen=True)
class Row:
    what: str
    size: str
    precision: str
    tier: str
    error: float
    eager_error: float
    ratio: float
    limit: float
    problem: str = ""


@dataclass(frozen=True)
class Subject:
    """Something to verify: `exact` and `eager` are its results in float64 and in eager PyTorch."""

    what: str
    size: str
    precision: Precision
    ours: Callable[[], Result]
    eager: Callable[[], Result]
    exact: Callable[[], Result]
    eager_tolerance: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quick", action="store_true", help="one image, operators of TNT-S, two precisions of the models"
    )
    parser.add_argument(
        "--all-tiers", action="store_true", help="every usable SIMD tier, not the active one alone"
    )
    parser.add_argument(
        "--device", choices=DEVICES, default="cpu", help="default: cpu; cuda is the current GPU"
    )
    parser.add_argument("--threads", type=positive, help="threads (default: torch's)")


def run(args: argparse.Namespace) -> int:
    check_device(args.device)
    tiers = _tiers(args.all_tiers) if args.device == "cpu" else [None]
    subjects = list(_subjects(args.quick, args.device))
    bar = Bar()
    bar.start("verifying", len(subjects) * len(tiers))
    rows = []
    with using_threads(args.threads) as threads:
        for subject in subjects:
            for row in _check(subject, tiers):
                rows.append(row)
                bar.step(f"{row.what} {row.precision}")
    bar.finish()
    why = native.why_missing() if args.device == "cpu" else gpu.why_unusable(0)
    if why is not None:
        print(f"The reference path is verified alone: {why}\n")
    print(_table(rows))
    failed = [row for row in rows if row.problem]
    for row in failed:
        print(f"\nFAILED {row.what}, {row.size}, {row.precision}, tier {row.tier}: {row.problem}")
    on = f"{threads} thread{'s' * (threads > 1)}" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"\n{len(rows) - len(failed)} of {len(rows)} passed, {on}.")
    return 1 if failed else 0


def _tiers(every: bool) -> Sequence[str | None]:
    module = native.load()
    if module is None:
        return [None]
    return [name for name, why in module.tiers() if not why] if every else [module.tier()]


def _subjects(quick: bool, device: str) -> Iterator[Subject]:
    batch, sizes = (1, ("tnt_s",)) if quick else (2, ("tnt_s", "tnt_b", "tnt_default"))
    for size in sizes:
        for op in OPS:
            for precision in PRECISIONS:
                yield _op(op, size, batch, precision, device)
            if OPS[op].function.__name__ in dispatch.TRAINABLE:
                for precision in PRECISIONS:
                    yield _op_gradients(op, size, batch, precision, device)
    for model in ("tnt_s", "tnt_b"):
        for precision in PRECISIONS[:2] if quick else PRECISIONS:
            yield _model(model, batch, precision, device)
        for precision in PRECISIONS[:2]:
            yield _training_step(model, batch if model == "tnt_s" else 1, precision, device)


def _op(op: str, size: str, batch: int, precision: Precision, device: str) -> Subject:
    def result(dtype: torch.dtype, backend: str, precision: Precision) -> Tensor:
        tensors, options = arguments(op, size, batch, precision.dtype, device)
        tensors = tuple(None if t is None else t.to(dtype) for t in tensors)
        with use_backend(backend):
            return precision.call(functools.partial(OPS[op].function, **options), *tensors)

    # In float64 on the values as this precision holds them: rounding the inputs is nobody's error.
    plain = Precision("float64", precision.dtype)
    return Subject(
        op,
        size_of(size).title,
        precision,
        ours=lambda: result(precision.dtype, "auto", precision),
        eager=lambda: result(precision.dtype, "reference", precision),
        exact=lambda: result(torch.float64, "reference", plain),
    )


def _op_gradients(op: str, size: str, batch: int, precision: Precision, device: str) -> Subject:
    def result(dtype: torch.dtype, backend: str, autocast: bool) -> Gradients:
        tensors, options = arguments(op, size, batch, precision.dtype, device)
        tensors = tuple(None if t is None else t.to(dtype) for t in tensors)
        with use_backend(backend):
            return Backward(OPS[op].function, tensors, options, precision.dtype, autocast).result(op)

    return Subject(
        f"{op} gradients",
        size_of(size).title,
        precision,
        ours=lambda: result(precision.dtype, "auto", precision.autocast),
        eager=lambda: result(precision.dtype, "reference", precision.autocast),
        exact=lambda: result(torch.float64, "reference", False),
    )


def _rounded(model: str, dtype: torch.dtype, device: str, drop_path: float = 0.0) -> nn.Module:
    return copy.deepcopy(reference(model, drop_path)).to(device, dtype)


@functools.lru_cache(maxsize=1)
def _exact_logits(model: str, batch: int, dtype: torch.dtype, device: str) -> Tensor:
    with torch.inference_mode():
        return _rounded(model, dtype, device).double()(images(batch, device).to(dtype).double())


def _model(model: str, batch: int, precision: Precision, device: str) -> Subject:
    def result(network: nn.Module) -> Tensor:
        return precision.call(network, images(batch, device).to(precision.dtype))

    def rounded() -> nn.Module:
        return _rounded(model, precision.dtype, device)

    return Subject(
        "FastTNT",
        size_of(model).title,
        precision,
        ours=lambda: result(FastTNT.from_reference(rounded()).eval()),
        eager=lambda: result(rounded()),
        exact=lambda: _exact_logits(model, batch, precision.dtype, device),
        eager_tolerance=LOGITS_TOLERANCE if precision is PRECISIONS[0] else None,
    )


@functools.lru_cache(maxsize=1)
def _exact_step(model: str, batch: int, dtype: torch.dtype, device: str) -> Gradients:
    network = _rounded(model, dtype, device, DROP_PATH).double()
    image = images(batch, device).to(dtype).double()
    return step_gradients(network, network, image, labels(batch, device), "float32")


def _training_step(model: str, batch: int, precision: Precision, device: str) -> Subject:
    def result(network: nn.Module) -> Gradients:
        image = images(batch, device).to(precision.dtype)
        autocast = "bfloat16" if precision.autocast else "float32"
        return step_gradients(network, network, image, labels(batch, device), autocast)

    def rounded() -> nn.Module:
        return _rounded(model, precision.dtype, device, DROP_PATH)

    return Subject(
        "FastTNT training step",
        size_of(model).title,
        precision,
        ours=lambda: result(FastTNT.from_reference(rounded())),
        eager=lambda: result(rounded()),
        exact=lambda: _exact_step(model, batch, precision.dtype, device),
    )


def _check(subject: Subject, tiers: Sequence[str | None]) -> Iterator[Row]:
    exact, eager = subject.exact(), subject.eager()
    for tier in tiers:
        named = (subject.what, subject.size, subject.precision.name, tier or "none")
        try:
            with forced_tier(tier) if tier else contextlib.nullcontext():
                ours = subject.ours()
        except Exception as error:
            nan, eager_error = float("nan"), as_accurate_as_eager(eager, eager, exact).eager_error
            yield Row(*named, nan, eager_error, nan, nan, reason(error))
            continue
        found = as_accurate_as_eager(ours, eager, exact)
        of = f" of {found.group}" if found.group else ""
        problem = "" if found.passed else f"error{of} {found.error:.3g}, the limit is {found.limit:.3g}"
        if subject.eager_tolerance is not None and not problem:
            assert isinstance(ours, Tensor)
            assert isinstance(eager, Tensor)
            apart = max_error(ours, eager.double())
            if not apart <= subject.eager_tolerance:
                problem = f"{apart:.3g} from eager's logits, the limit is {subject.eager_tolerance:g}"
        yield Row(*named, found.error, found.eager_error, found.ratio, found.limit, problem)


def _table(rows: Sequence[Row]) -> str:
    headers = ["", "size", "precision", "tier", "error ours", "error eager", "ratio", "limit", "verdict"]
    cells = [
        [
            row.what,
            row.size,
            row.precision,
            row.tier,
            f"{row.error:.2e}",
            f"{row.eager_error:.2e}",
            f"{row.ratio:.2f}",
            f"{row.limit:.2e}",
            "FAILED" if row.problem else "ok",
        ]
        for row in rows
    ]
    return table(headers, cells, right=(4, 5, 6, 7))
