"""A photograph as the input of a TNT."""

from __future__ import annotations

import math
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

CROP = 0.9
MEAN = STD = 0.5


def open_photo(path: str | PathLike[str]) -> Any:
    """The file as an upright RGB PIL image. ImportError without Pillow, OSError if it is no image."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("reading an image needs Pillow: pip install 'tnt_kernels[programs]'") from error
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def crop(photo: Any, height: int, width: int) -> Any:
    """The centre of a PIL image, as evaluation sees it: resized (bicubic) so that the crop is 0.9 of it."""
    from PIL import Image

    scale = max(math.floor(height / CROP) / photo.height, math.floor(width / CROP) / photo.width)
    # int() and not round(): as torchvision's Resize makes the longer side. The nudge keeps the shorter exact.
    size = int(photo.width * scale + 1e-6), int(photo.height * scale + 1e-6)
    resized = photo.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    return resized.crop((left, top, left + width, top + height))


def to_tensor(cropped: Any) -> Tensor:
    """A cropped RGB image as float32 [1, 3, H, W], normalised with mean = std = 0.5."""
    values = torch.from_numpy(np.array(cropped, dtype=np.float32)).permute(2, 0, 1).unsqueeze(0)
    return ((values / 255 - MEAN) / STD).contiguous()
