"""A model with what it takes to make it again and to feed it: what a checkpoint says of its weights."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

import tnt_kernels
from tnt_kernels.models.checkpoint import read_checkpoint
from tnt_programs import checkpoints, models


@dataclass(frozen=True)
class Network:
    """A model's name and constructor arguments, the preprocessing of its images, its classes in order."""

    name: str
    arguments: dict[str, Any]
    preprocessing: dict[str, Any]
    classes: list[str]

    def build(self, *, reference: bool) -> nn.Module:
        return models.build(self.name, self.arguments, reference=reference)[0]

    def content(self) -> dict[str, Any]:
        return asdict(self)


def start(
    options: Namespace, given: Mapping[str, Any], classes: Sequence[str]
) -> tuple[nn.Module, Network, str]:
    """The model of a new run, and a line that says where its weights are from.

    Args:
        options, given: from `options.parse`.
        classes: those of the data.

    Raises:
        ValueError: the model or its weights do not fit.
    """
    stored = _read(options.checkpoint) if options.checkpoint else None
    before = Network(**stored["network"]) if stored else None
    if before and "model" not in given:
        name, arguments = before.name, dict(before.arguments)
    else:
        name, arguments = models.full_name(options.model), {}
    arguments.update(_arguments(options), num_classes=len(classes))
    model, arguments = models.build(
        name, arguments, reference=options.reference, pretrained=options.pretrained
    )
    preprocessing = models.preprocessing_of(name, model)
    if before and before.name == name:
        preprocessing.update(before.preprocessing)
    preprocessing.update(_given_preprocessing(options, arguments))
    origin = "those that timm publishes" if options.pretrained else f"new (seed {options.seed})"
    if options.checkpoint:
        origin = _load(model, options, stored, classes)
    return model, Network(name, arguments, preprocessing, list(classes)), origin


def _arguments(options: Namespace) -> dict[str, Any]:
    rates = {
        "drop_rate": options.drop,
        "attn_drop_rate": options.attn_drop,
        "drop_path_rate": options.drop_path,
    }
    arguments = {name: rate for name, rate in rates.items() if rate > 0}
    if options.img_size is not None:
        arguments["img_size"] = options.img_size
    return {**arguments, **options.model_args}


def _given_preprocessing(options: Namespace, arguments: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {name: getattr(options, name) for name in ("mean", "std", "interpolation", "crop_pct")}
    size = arguments.get("img_size", options.img_size)  # a model without that argument takes any size
    if size is not None:
        chosen["input_size"] = [3, *(size if isinstance(size, (tuple, list)) else (size, size))]
    return {name: value for name, value in chosen.items() if value is not None}


def _read(path: str) -> dict[str, Any] | None:
    if not Path(path).is_file():
        raise ValueError(f"--checkpoint: there is no file {path}")
    return checkpoints.read(path)


def _load(
    model: nn.Module, options: Namespace, stored: Mapping[str, Any] | None, classes: Sequence[str]
) -> str:
    """Put the weights of --checkpoint into a model. Returns a line that says what was taken."""
    state = read_checkpoint(stored or options.checkpoint)
    head = not options.new_head
    if head and stored is not None:
        source, theirs = f"--checkpoint {options.checkpoint}", stored["network"]["classes"]
        check_classes(source, theirs, classes, "; --new-head leaves its head out")
    elif head:
        # Without names, the number of classes is all there is to compare.
        head = models.classes_in(model, state) == len(classes)
    models.load_weights(model, state, head=head)
    return f"those of {options.checkpoint}" + ("" if head else ", the head new")


def check_classes(source: str, theirs: Sequence[str], ours: Sequence[str], hint: str = "") -> None:
    """Raise ValueError, with the differences, where a checkpoint's classes are not those of the data."""
    if list(theirs) == list(ours):
        return
    lists = {
        "only there": [name for name in theirs if name not in ours],
        "only in the data": [name for name in ours if name not in theirs],
    }
    found = "; ".join(f"{where}: {_listed(names)}" for where, names in lists.items() if names)
    raise ValueError(f"{source} has other classes than the data ({found or 'in another order'}){hint}")


def _listed(names: Sequence[str], limit: int = 10) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def load(path: str, *, reference: bool) -> tuple[nn.Module, Network]:
    """The model of a checkpoint: train.py's, or a TNT's in any dialect of the published ones.

    Raises:
        ValueError: it is neither; OSError: it cannot be opened.
    """
    stored = _read(path)
    if stored is not None:
        network = Network(**stored["network"])
        model = network.build(reference=reference)
        models.load_weights(model, read_checkpoint(stored))
        return model, network
    tnt = tnt_kernels.from_checkpoint(path, tnt_kernels.TNT if reference else tnt_kernels.FastTNT)
    preprocessing = {**models.PREPROCESSING, "input_size": [3, *tnt.patch_embed.img_size]}
    return tnt, Network(Path(path).name, {}, preprocessing, class_names(tnt))


def published(name: str, *, reference: bool) -> tuple[nn.Module, Network]:
    """A model with the weights that timm publishes. ValueError where there are none, or no such model."""
    name = models.full_name(name)
    model, arguments = models.build(name, {}, reference=reference, pretrained=True)
    return model, Network(name, arguments, models.preprocessing_of(name, model), class_names(model))


def class_names(model: Any) -> list[str]:
    """ImageNet's names where the head has as many classes as one of its sets that timm knows, or numbers."""
    subset = infer_imagenet_subset(model)
    if subset is None:
        return [str(index) for index in range(model.num_classes)]
    info = ImageNetInfo(subset)
    return [info.index_to_description(index) for index in range(model.num_classes)]
