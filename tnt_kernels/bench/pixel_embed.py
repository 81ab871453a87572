"""The pixel embedding against other ways to compute it: our backends, eager PyTorch, cuDNN, Inductor.

Images and parameters are of one dtype, as the goals have it; benchmarks/ops.py has autocast. In float32 cuDNN
convolves in TF32, as PyTorch lets it by default; our kernels then do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tnt_kernels import ops
from tnt_kernels.backends import reference
from tnt_kernels.bench.accuracy import as_accurate_as_eager, close_enough
from tnt_kernels.bench.cases import compiled, reason
from tnt_kernels.bench.floors import Peak, floor_of
from tnt_kernels.bench.gradients import by_size
from tnt_kernels.bench.kernel_cases import KernelCase
from tnt_kernels.bench.ops import arguments
from tnt_kernels.bench.results import table
from tnt_kernels.bench.sizes import size_of
from tnt_kernels.dispatch import use_backend

PATCH, STRIDE, PADDING = 16, 4, 3
NAMES = ("image", "weight", "bias", "position")
# What is timed, and the tensors whose gradients it gives. In training the image needs none.
PASSES: dict[str, tuple[str, ...]] = {
    "forward": (),
    "backward": ("weight", "bias", "position"),
    "backward with the image": NAMES,
}

Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Clock = Callable[[Callable[[], object], int], float]


def unfolded(image: Tensor, weight: Tensor, bias: Tensor, position: Tensor) -> Tensor:
    """As the authors' network has it: unfold, convolve, transpose, add the position."""
    batch, channels = image.shape[:2]
    patches = F.unfold(image, PATCH, stride=PATCH).transpose(1, 2)
    patches = patches.reshape(batch * patches.shape[1], channels, PATCH, PATCH)
    words = F.conv2d(patches, weight, bias, stride=STRIDE, padding=PADDING)
    return words.flatten(2).transpose(1, 2) + position


def channels_last(image: Tensor, weight: Tensor, bias: Tensor, position: Tensor) -> Tensor:
    """The layout that cuDNN is fastest in, and whose result is words already."""
    batch, channels, height, width = image.shape
    patches = image.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(-1, PATCH, PATCH, channels).permute(0, 3, 1, 2)
    weight = weight.contiguous(memory_format=torch.channels_last)
    words = F.conv2d(patches, weight, bias, stride=STRIDE, padding=PADDING)
    return words.permute(0, 2, 3, 1).reshape(len(patches), -1, weight.shape[0]) + position


def plain(image: Tensor, weight: Tensor, bias: Tensor, position: Tensor) -> Tensor:
    return reference.pixel_embed(image, weight, bias, position, PATCH, PATCH, STRIDE, False)


def on_backend(backend: str, *tensors: Tensor) -> Tensor:
    with use_backend(backend):
        return ops.pixel_embed(*tensors, patch_size=PATCH, stride=STRIDE)


@dataclass(frozen=True)
class Entry:
    """`build()` gives the function that is timed."""

    label: str
    build: Callable[[], Function]
    ours: bool = False


ENTRIES: dict[str, Entry] = {
    "cuda": Entry("tnt_kernels, CUDA C++", lambda: partial(on_backend, "cuda"), ours=True),
    "triton": Entry("tnt_kernels, Triton", lambda: partial(on_backend, "triton"), ours=True),
    "eager": Entry("eager PyTorch, unfold", lambda: unfolded),
    "channels_last": Entry("eager PyTorch, channels_last", lambda: channels_last),
    "compile": Entry("torch.compile", lambda: compiled(plain)),
}


def run(function: Function, tensors: tuple[Tensor, ...], wanted: tuple[str, ...]) -> Callable[[], Any]:
    """One call of a pass: the result, or the gradients of the tensors that are wanted, in their order."""
    if not wanted:

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*tensors)

        return forward
    given = [t.detach().requires_grad_(name in wanted) for name, t in zip(NAMES, tensors, strict=True)]
    out = function(*given)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    leaves = [t for t in given if t.requires_grad]
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def results(function: Function, tensors: tuple[Tensor, ...], wanted: tuple[str, ...]) -> Any:
    found = run(function, tensors, wanted)()
    return by_size(dict(zip(wanted, found, strict=True))) if wanted else found


def measure(
    model: str, dtype: torch.dtype, batch: int, clock: Clock, peak: Peak | None = None, repeats: int = 30,
    names: tuple[str, ...] = tuple(ENTRIES), device: str = "cuda",
) -> list[dict[str, Any]]:  # fmt: skip
    """Microseconds of every pass and entry; no time for one that is wrong, with the reason in its place."""
    c = size_of(model).inner
    given, _ = arguments("pixel_embed", model, batch, dtype, device)
    tensors = tuple(t for t in given if t is not None)
    rows = []
    for what, wanted in PASSES.items():
        row: dict[str, Any] = {
            "model": model, "c": c, "dtype": str(dtype).removeprefix("torch."), "batch": batch, "pass": what,
            "microseconds": {}, "problems": {},
        }  # fmt: skip
        if peak is not None and batch == 256:
            case = KernelCase("pixel_embed", {"c": c}, backward=bool(wanted))
            if wanted and "image" not in wanted:
                case = KernelCase("pixel_embed", {"c": c}, backward=True, only="weight")
            row["floor"] = floor_of(case, dtype, peak, ()).microseconds()
        exact = results(plain, tuple(t.double() for t in tensors), wanted)
        eager = results(unfolded, tensors, wanted)
        for name in names:
            try:
                function = ENTRIES[name].build()
                mine = results(function, tensors, wanted)
                if ENTRIES[name].ours:
                    found = as_accurate_as_eager(mine, eager, exact)
                else:
                    found = close_enough(mine, eager, exact, dtype)
                if not found.passed:
                    row["problems"][name] = f"wrong: error {found.error:.2e}, at most {found.limit:.2e}"
                    continue
                call = run(function, tensors, wanted)
                for _ in range(3):
                    call()
                row["microseconds"][name] = clock(call, repeats) * 1e6
            except Exception as error:
                row["problems"][name] = reason(error)
        rows.append(row)
    return rows


def report(document: dict[str, Any]) -> str:
    """The results as markdown."""
    headers = ["pass", "c", "dtype", *(entry.label for entry in ENTRIES.values()), "floor"]
    rows, problems = [], []
    for result in document["results"]:
        head = [result["pass"], str(result["c"]), result["dtype"]]
        times = [f"{us:.0f}" if (us := result["microseconds"].get(name)) else "-" for name in ENTRIES]
        floor = max((us for us in result.get("floor", {}).values() if us is not None), default=None)
        rows.append([*head, *times, "-" if floor is None else f"{floor:.0f}"])
        problems += [f"{' '.join(head)}, {name}: {why}" for name, why in result["problems"].items()]
    return "\n\n".join([f"us, {document['date']}", table(headers, rows, right=range(3, 9)), *problems])
