"""The pixel embedding: an image becomes the words of its sentences."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tnt_kernels import _checks, _ops, dispatch
from tnt_kernels.backends import reference
from tnt_kernels.ops._autocast import compute_dtype_of


def pixel_embed(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    position: Tensor | None = None,
    *,
    patch_size: int | tuple[int, int] = 16,
    stride: int = 4,
    legacy: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Cuts images into patches and convolves each into words: n sentences of m words an image.

    Each patch is convolved on its own, with zeros beyond its border. The image is read where it lies,
    whatever its strides; no patch is copied.

    Args:
        image: [B, channels, height, width]; the patch size divides height and width; B may be zero. Of a
            floating dtype, or of uint8 with mean and std.
        weight: [c, channels, k, k], k odd (7 in TNT); zeros pad k // 2 pixels on every side.
        bias: [c] or None.
        position: [1, m, c] or None, added to the words of every patch.
        patch_size: one number or (height, width) of a patch.
        stride: of the convolution; m = ceil(patch height / stride) * ceil(patch width / stride).
        legacy: convolve the whole image, with zeros beyond the image's border alone, and cut the result
            into words (timm's first TNT); stride must divide the patch size.
        mean, std: of the channels of an image of dtype uint8, in units of 255; what is convolved is then
            (image / 255 - mean) / std. The CUDA kernels do this as they read the image.

    Returns:
        [B * n, m, c], contiguous; patches and words row by row. The dtype is that of the image (of uint8:
        the weight's; of autocast where it is active), widened by the position's.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype or device.
        RuntimeError: a backend is forced and cannot run the call.

    Source: "Transformer in Transformer", arXiv 2103.00112, section 2.2.
    """
    options = (*_checks.pair("pixel_embed", "patch_size", patch_size), stride, legacy)
    _checks.check_image(image, mean, std)
    backend = dispatch.choose("pixel_embed", image, weight, bias, position)
    compute_dtype = compute_dtype_of(image)
    if backend != "reference":
        return _ops.pixel_embed(image, weight, bias, position, *options, compute_dtype, mean, std)
    _checks.check_pixel_embed(image, weight, bias, position, *options, compute_dtype, mean, std)
    image = reference.normalized(image, weight.dtype, mean, std)
    return reference.pixel_embed(image, weight, bias, position, *options)
