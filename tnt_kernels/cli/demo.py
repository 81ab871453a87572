"""Run a photograph through the plain TNT and through FastTNT: same answer, how much faster."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tnt_kernels._timm import import_timm
from tnt_kernels.bench import environment
from tnt_kernels.bench.cases import torch_call
from tnt_kernels.bench.engine import using_threads
from tnt_kernels.bench.progress import Bar
from tnt_kernels.bench.results import table
from tnt_kernels.bench.sizes import SIZES, size_of
from tnt_kernels.bench.timing import Timing, interleave
from tnt_kernels.cli.arguments import positive
from tnt_kernels.cli.photo import crop, open_photo, to_tensor
from tnt_kernels.models.checkpoint import from_checkpoint
from tnt_kernels.models.fast_tnt import FastTNT
from tnt_kernels.models.tnt import TNT

HELP = "a photograph through the plain TNT and FastTNT: same answer, images per second, a plot"
SEED = 0
BATCHES = (1, 8)
TOLERANCE = 1e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", type=Path, help="photograph (default: a cat that comes with the package)")
    parser.add_argument("--checkpoint", type=Path, help="weights: the authors' or timm's file")
    parser.add_argument("--model", choices=list(SIZES), default="tnt_s", help="size, without a checkpoint")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="the plot (default: demo.png)")
    parser.add_argument("--rounds", type=positive, default=5, help="timing rounds (default: 5)")
    parser.add_argument("--threads", type=positive, help="threads (default: torch's)")


def run(arguments: argparse.Namespace) -> int:
    if not arguments.output.parent.is_dir():
        raise ValueError(f"--output must lie in a folder that exists, got {arguments.output}")
    if arguments.image is None:
        with resources.as_file(resources.files("tnt_kernels") / "assets" / "chelsea.jpg") as path:
            photo, name = open_photo(path), path.name
    else:
        photo, name = open_photo(arguments.image), arguments.image.name
    reference, weights = _model(arguments)
    height, width = reference.patch_embed.img_size
    seen = crop(photo, height, width)
    image = to_tensor(seen)
    models = {"plain TNT": reference, "FastTNT": FastTNT.from_reference(reference).eval()}

    with using_threads(arguments.threads) as threads:
        logits = {label: torch_call(model, (image,), "float32")() for label, model in models.items()}
        tops = {label: _top5(values) for label, values in logits.items()}
        difference = (logits["plain TNT"] - logits["FastTNT"]).abs().max().item()
        same = [i for i, _ in tops["plain TNT"]] == [i for i, _ in tops["FastTNT"]]
        speeds = _speeds(models, image, arguments.rounds)
    device = environment.processor()
    machine = f"{device['name']}, {threads} thread{'s' * (threads > 1)}, float32"
    names = _class_names(reference.num_classes)

    print(f"photograph  {name}, {photo.width} x {photo.height} pixels, seen at {height} x {width}")
    print(f"weights     {weights}")
    print(f"device      {machine}\n")
    print(f"{_top_table(tops, names)}\n")
    print(f"same top-5: {'yes' if same else 'NO'}; largest difference of the logits: {difference:.2e}\n")
    print(f"{_speed_table(speeds)}\n")
    _plot(arguments.output, seen, weights, tops, names, same, difference, speeds, machine)
    return 0 if same and difference <= TOLERANCE else 1


def _model(arguments: argparse.Namespace) -> tuple[TNT, str]:
    if arguments.checkpoint is not None:
        model: TNT = from_checkpoint(arguments.checkpoint).eval()
        return model, f"checkpoint {arguments.checkpoint.name}"
    size = size_of(arguments.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = TNT(**size.arguments()).eval()
    return model, f"{size.title}, random weights (seed {SEED}): the classes mean nothing"


def _top5(logits: Tensor) -> list[tuple[int, float]]:
    values, indices = logits.softmax(-1)[0].topk(min(5, logits.shape[-1]))
    return list(zip(indices.tolist(), values.tolist(), strict=True))


def _class_names(classes: int) -> dict[int, str]:
    """ImageNet's names where timm offers them and the head has its 1000 classes; others are numbered."""
    names = {i: f"class {i}" for i in range(classes)}
    if classes == 1000:
        try:
            info = import_timm().data.ImageNetInfo()
        except (ImportError, AttributeError):
            return names
        names = {i: info.index_to_description(i) for i in range(classes)}
    return names


def _speeds(models: dict[str, TNT], image: Tensor, rounds: int) -> dict[int, dict[str, Timing]]:
    bar = Bar()
    found = {}
    for batch in BATCHES:
        images = image.expand(batch, -1, -1, -1).contiguous()
        calls = {label: torch_call(model, (images,), "float32") for label, model in models.items()}
        bar.start(f"timing batch {batch}", rounds * len(calls))
        found[batch] = interleave(calls, rounds, on_step=bar.step)
        bar.finish()
    return found


def _top_table(tops: dict[str, list[tuple[int, float]]], names: dict[int, str]) -> str:
    pairs = zip(*tops.values(), strict=True)
    rows = [
        [str(rank + 1), *(cell for i, p in pair for cell in (names[i], f"{p:.2%}"))]
        for rank, pair in enumerate(pairs)
    ]
    headers = ["", *(cell for label in tops for cell in (label, "probability"))]
    return table(headers, rows, right=(0, 2, 4))


def _speed_table(speeds: dict[int, dict[str, Timing]]) -> str:
    rows = []
    for batch, timings in speeds.items():
        plain, fast = timings["plain TNT"].median, timings["FastTNT"].median
        rows.append([str(batch), f"{batch / plain:.1f}", f"{batch / fast:.1f}", f"{plain / fast:.2f} x"])
    return table(["batch", "plain TNT, images/s", "FastTNT, images/s", "faster by"], rows, right=(0, 1, 2, 3))


def _plot(
    path: Path,
    seen: Any,
    weights: str,
    tops: dict[str, list[tuple[int, float]]],
    names: dict[int, str],
    same: bool,
    difference: float,
    speeds: dict[int, dict[str, Timing]],
    machine: str,
) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'tnt_kernels[programs]')")
        return
    colours = {"plain TNT": "#7f8c9b", "FastTNT": "#1f77b4"}
    figure = Figure(
        figsize=(11, 7.5), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, hspace=0.04, wspace=0.04)
    )
    FigureCanvasAgg(figure)
    (photo_axes, speed_axes), top_axes = figure.subplots(2, 2)
    figure.suptitle(f"{weights}\n{machine}", fontsize=11)

    photo_axes.imshow(seen)
    photo_axes.set_title("what both models see")
    photo_axes.axis("off")

    _speed_bars(speed_axes, speeds, colours)
    widest = max(p for top in tops.values() for _, p in top)
    for axes, (label, top) in zip(top_axes, tops.items(), strict=True):
        _top_bars(axes, [names[i] for i, _ in top], [100 * p for _, p in top], 100 * widest, colours[label])
        axes.set_title(f"top-5 of {label}")
    verdict = "same top-5" if same else "the top-5 differ"
    figure.supxlabel(f"{verdict}; largest difference of the logits: {difference:.1e}", fontsize=11)
    figure.savefig(path, dpi=120)
    print(f"plot        {path}")


def _speed_bars(axes: Any, speeds: dict[int, dict[str, Timing]], colours: dict[str, str]) -> None:
    width = 0.38
    for k, (label, colour) in enumerate(colours.items()):
        places = [i + (k - 0.5) * width for i in range(len(speeds))]
        heights = [batch / timings[label].median for batch, timings in speeds.items()]
        bars = axes.bar(places, heights, width * 0.94, label=label, color=colour)
        axes.bar_label(bars, fmt="%.1f", padding=2)
    axes.set_xticks(range(len(speeds)), [f"batch {batch}" for batch in speeds])
    axes.set_ylabel("images/s")
    axes.set_title("speed (higher is better)")
    axes.margins(y=0.15)
    axes.legend(loc="upper left", frameon=False)
    # Room for the legend above the bars.
    axes.set_ylim(top=axes.get_ylim()[1] * 1.15)
    axes.spines[["top", "right"]].set_visible(False)


def _top_bars(axes: Any, labels: Sequence[str], percent: Sequence[float], widest: float, colour: str) -> None:
    short = [label if len(label) <= 26 else f"{label[:25]}…" for label in labels]
    bars = axes.barh(range(len(short)), percent, color=colour)
    axes.bar_label(bars, fmt="%.2f %%", padding=3)
    axes.set_yticks(range(len(short)), short)
    axes.invert_yaxis()
    axes.set_xlim(0, widest * 1.25)
    axes.set_xlabel("probability, %")
    axes.spines[["top", "right"]].set_visible(False)
