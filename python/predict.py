"""Classify images with a checkpoint of train.py, a published TNT checkpoint or a timm model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import torch
    from torch.utils.data import DataLoader, Dataset
    from tqdm import tqdm

    from tnt_kernels.cli.arguments import positive
    from tnt_programs import checkpoints, datasets, loaders, network, precision, processes
    from tnt_programs.arguments import Parser, whole
    from tnt_programs.datasets import DamagedImage
    from tnt_programs.predictions import FORMATS, Prediction
except ImportError as error:
    sys.exit(f"predict.py: {error} (in a checkout, pip install '.[programs]' brings what is needed)")

# Exit codes, besides 0.
DAMAGED, BAD_INPUT, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    chosen = _parser().parse_args(argv)
    try:
        return run(chosen)
    except (ValueError, OSError, ImportError) as error:
        print(f"predict.py: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="predict.py", description=__doc__)
    parser.add_argument("images", nargs="+", help="image files, or folders that are searched for them")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", help="of train.py, the authors, or timm's TNT", metavar="FILE")
    source.add_argument("--model", help="a model with weights that timm publishes", metavar="NAME")
    parser.add_argument("--top-k", type=positive, default=5, help="classes per image (default: 5)")
    parser.add_argument("--format", choices=list(FORMATS), default="table", help="(default: table)")
    parser.add_argument("--output", type=Path, help="file to write (default: standard output)")
    parser.add_argument("--batch-size", type=positive, default=32, help="(default: 32)")
    parser.add_argument("--workers", type=whole, default=0, help="processes that load images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--threads", type=positive, help="(default: torch's)")
    parser.add_argument("--amp", choices=precision.NAMES, default="none", help="autocast (default: none)")
    parser.add_argument("--reference", action="store_true", help="plain PyTorch, without the kernels")
    parser.add_argument("--no-progress", action="store_true", help="no bar")
    return parser


def run(chosen: argparse.Namespace) -> int:
    """Predict and write what was found. Returns the exit code."""
    if chosen.output is not None and not chosen.output.absolute().parent.is_dir():
        raise ValueError(f"--output must lie in a folder that exists, got {chosen.output}")
    files = datasets.image_files(chosen.images)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    predictions, damaged = predict(files, chosen)
    text = FORMATS[chosen.format](predictions, damaged)
    if chosen.output is None:
        print(text, end="")
    else:
        checkpoints.write(chosen.output, lambda file: file.write(text.encode()))
    for file, reason in damaged:
        print(f"predict.py: {file}: {reason}", file=sys.stderr)
    if damaged:
        print(f"predict.py: {len(damaged)} of {len(files)} images cannot be read", file=sys.stderr)
    return DAMAGED if damaged else 0


def predict(
    files: Sequence[str], chosen: argparse.Namespace
) -> tuple[list[Prediction], list[tuple[str, str]]]:
    """The likeliest classes of every image, and name and reason of those that cannot be read."""
    device = processes.device_named(chosen.device)
    if chosen.checkpoint is not None:
        model, described = network.load(chosen.checkpoint, reference=chosen.reference)
    else:
        model, described = network.published(chosen.model, reference=chosen.reference)
    model.to(device).eval()
    images = Files(files, loaders.eval_transform(described.preprocessing))
    batches: Any = DataLoader(images, chosen.batch_size, num_workers=chosen.workers, collate_fn=list)
    count = min(chosen.top_k, len(described.classes))

    predictions: list[Prediction] = []
    damaged: list[tuple[str, str]] = []
    for batch in tqdm(batches, disable=chosen.no_progress or None, leave=False):
        damaged += [(file, reason) for file, reason in batch if isinstance(reason, str)]
        whole = [(file, image) for file, image in batch if not isinstance(image, str)]
        if not whole:
            continue
        with torch.inference_mode(), precision.autocast(device, chosen.amp):
            logits = model(torch.stack([image for _, image in whole]).to(device))
        found, indices = logits.float().softmax(-1).topk(count)
        for (file, _), row, places in zip(whole, found.tolist(), indices.tolist(), strict=True):
            top = [(described.classes[place], place, p) for place, p in zip(places, row, strict=True)]
            predictions.append(Prediction(file, top))
    return predictions, damaged


class Files(Dataset[tuple[str, Any]]):
    """Name and image, float32 [3, H, W], of every file; a text says why one cannot be read."""

    def __init__(self, files: Sequence[str], transform: Any) -> None:
        self.files, self.transform = files, transform

    def __getitem__(self, index: int) -> tuple[str, Any]:
        try:
            return self.files[index], self.transform(datasets.open_image(self.files[index]))
        except DamagedImage as error:
            return self.files[index], str(error)

    def __len__(self) -> int:
        return len(self.files)


if __name__ == "__main__":
    sys.exit(main())
