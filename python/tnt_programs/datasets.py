"""What a model is trained on: an image folder in train/val layout, or scikit-learn's handwritten digits."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import ImageDataset, get_img_extensions
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch.utils.data import Dataset

VALIDATION_NAMES = ("val", "validation")
HELD_OUT = 0.2  # of the digits
SPLIT_SEED = 0  # the digits held out are the same in every run


Damaged = list[tuple[str, str]]  # path and reason


@dataclass
class ImageData:
    """Two data sets of (image, class index); `transform` of each is set by who loads them."""

    train: Any
    val: Any
    classes: list[str]
    damaged: Damaged = field(default_factory=list)  # images left out


class DamagedImage(Exception):
    """A file that is no image, or not a whole one; the message says why."""


def open_image(file: str | os.PathLike[str]) -> Image.Image:
    """The file as an RGB image, decoded to its end. Raises DamagedImage with the reason alone."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # what a damaged file raises depends on its format and on where it is damaged
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DamagedImage(reason.removesuffix(f" {os.fspath(file)!r}")) from error


def image_files(paths: Sequence[str]) -> list[str]:
    """The files among `paths`, and the images in the folders among them and below, in natural order.

    ValueError for a folder without images. Files that do not exist are kept: opening them says so.
    """
    files: list[str] = []
    for path in paths:
        if not Path(path).is_dir():
            files.append(path)
            continue
        found = [name for name, _ in find_images_and_targets(path)[0]]
        if not found:
            raise ValueError(f"{path}: there are no images ({_extensions()}) in this folder")
        files += found
    return files


def _extensions() -> str:
    return ", ".join(sorted(get_img_extensions()))


def damaged_images(paths: Sequence[str], step: Callable[[], object] = bool) -> Damaged:
    """The files among `paths` that are no whole images. Reads them all; calls `step` after each."""

    def problem(path: str) -> str:
        try:
            open_image(path)
        except DamagedImage as error:
            return str(error)
        return ""

    found = []
    # Pillow decodes without the interpreter's lock.
    with ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as pool:
        for path, why in zip(paths, pool.map(problem, paths), strict=True):
            step()
            if why:
                found.append((path, why))
    return found


class FolderImages(ImageDataset):
    """timm's image folder, except that an unreadable image raises and is not replaced by the next one."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, target = self.reader.samples[index]
        try:
            image = open_image(path)
        except DamagedImage as error:
            raise DamagedImage(f"{path}: {error}; without --no-scan such images are left out") from error
        return self.transform(image), target

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.reader.samples]

    def leave_out(self, paths: set[str]) -> None:
        self.reader.samples = [sample for sample in self.reader.samples if sample[0] not in paths]


def image_folder(root: str, find_damaged: Callable[[Sequence[str]], Damaged] | None = None) -> ImageData:
    """The folder `root`, with train/ and val/ (or validation/), each with a folder of images per class.

    Args:
        root: the folder.
        find_damaged: as `damaged_images`; what it finds is left out. None: every image is kept.

    Raises:
        ValueError: something is missing; the message says what is needed.
    """
    train = _split(root, ("train",))
    val = _split(root, VALIDATION_NAMES)
    class_to_index = train.reader.class_to_idx
    _check_classes(root, train, val)
    if val.reader.class_to_idx != class_to_index:  # fewer classes: their numbers are those of train/
        val = FolderImages(val.reader.root, class_map=class_to_index)
    damaged: Damaged = []
    if find_damaged is not None:
        damaged = find_damaged([*train.paths, *val.paths])
        for images in (train, val):
            images.leave_out({path for path, _ in damaged})
    classes = sorted(class_to_index, key=class_to_index.__getitem__)
    seen = {target for _, target in train.reader.samples}
    lost = [name for name in classes if class_to_index[name] not in seen]
    if lost or not len(val):
        where = f"class {', '.join(lost)}" if lost else val.reader.root
        raise ValueError(f"--data {root}: no image of {where} can be read")
    return ImageData(train, val, classes, damaged)


def _split(root: str, names: Sequence[str]) -> FolderImages:
    folder = next((Path(root, name) for name in names if Path(root, name).is_dir()), None)
    layout = "train/ and val/ (or validation/), each with a folder of images per class, are needed"
    if not Path(root).is_dir():
        raise ValueError(f"--data must be a folder, got {root}")
    if folder is None:
        raise ValueError(f"--data {root} has no {'/ or '.join(names)}/: {layout}")
    try:
        images = FolderImages(str(folder))
    except RuntimeError:  # timm's for a folder without images
        raise ValueError(
            f"--data {root}: there are no images ({_extensions()}) in {folder}: {layout}"
        ) from None
    if "" in images.reader.class_to_idx:
        raise ValueError(f"--data {root}: images lie in {folder} itself and not in a folder of their class")
    return images


def _check_classes(root: str, train: FolderImages, val: FolderImages) -> None:
    known, other = train.reader.class_to_idx, val.reader.class_to_idx
    if len(known) == 1:
        raise ValueError(f"--data {root}: two classes or more are needed, there is one, {next(iter(known))}")
    foreign = [name for name in other if name not in known]
    if foreign:
        raise ValueError(f"--data: {val.reader.root} has classes that train/ lacks: {', '.join(foreign)}")


class Digits(Dataset[tuple[Any, int]]):
    """Handwritten digits in memory, 8 x 8 pixels each."""

    def __init__(self, images: Sequence[Image.Image], targets: Sequence[int]) -> None:
        self.images = images
        self.targets = targets
        self.transform: Any = None

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), self.targets[index]

    def __len__(self) -> int:
        return len(self.images)


def digits() -> ImageData:
    """scikit-learn's 1797 handwritten digits, a fifth of every class held out for validation.

    They are those of the UCI "Optical Recognition of Handwritten Digits" test set. The split is the same in
    every run. ImportError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "--dataset digits needs scikit-learn: pip install 'tnt_kernels[programs]'"
        ) from error
    found = load_digits()
    pixels = np.round(found.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8], 0 to 16 before
    images = [Image.fromarray(values).convert("RGB") for values in pixels]
    parts = train_test_split(
        np.arange(len(images)), test_size=HELD_OUT, stratify=found.target, random_state=SPLIT_SEED
    )
    train, val = (
        Digits([images[i] for i in sorted(part)], [int(found.target[i]) for i in sorted(part)])
        for part in parts
    )
    return ImageData(train, val, [str(name) for name in found.target_names])
