"""The random numbers of dropout: Philox 4x32-10, a function of a seed and of an element's place.

Source: Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dropout_factors", "philox"]

_LOW = 0xFFFFFFFF


def _multiply_wide(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of x * factor, for x in [0, 2**32) held as int64, which has no room for both."""
    low, high = x * (factor & 0xFFFF), x * (factor >> 16)
    middle = high + (low >> 16)  # below 2**49
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Returns four random words for a counter of four words and a key of two: int64 in [0, 2**32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply_wide(c0, 0xD2511F53)
        high1, low1 = _multiply_wide(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def dropout_factors(
    seed: Tensor | None, place: int, sentences: int, m: int, channels: int, rate: float, like: Tensor
) -> Tensor:
    """Returns [sentences, m, channels]: 0 where an element is dropped, 1 / (1 - rate) elsewhere.

    Args:
        seed: int64 [1].
        place: which dropout of a block, 0 to 3.
        sentences, m, channels: a number is drawn for each; four neighbouring channels share a counter.
        rate: probability of being dropped, in [0, 1].
        like: a tensor of the result's dtype and device.
    """
    if rate >= 1.0:
        return like.new_zeros((sentences, m, channels))
    assert seed is not None
    device = like.device
    sentence = torch.arange(sentences, device=device).reshape(-1, 1, 1)
    word = torch.arange(m, device=device).reshape(1, -1, 1)
    group = torch.arange(-(-channels // 4), device=device).reshape(1, 1, -1)
    counter = torch.broadcast_tensors(group, word, sentence & _LOW, (sentence >> 32) * 4 + place)
    words = torch.stack(philox(counter, (seed & _LOW, (seed >> 32) & _LOW)), dim=-1)
    kept = words.reshape(sentences, m, -1)[..., :channels] >= int(rate * 4294967296.0)
    return kept.to(like.dtype) / (1.0 - rate)
