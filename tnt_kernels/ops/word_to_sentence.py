"""Word to sentence: what the words say is added to their sentence's token."""

from __future__ import annotations

from torch import Tensor

from tnt_kernels import _checks, _ops, dispatch
from tnt_kernels.backends import reference
from tnt_kernels.ops._autocast import compute_dtype_of


def word_to_sentence(
    words: Tensor,
    tokens: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm2_weight: Tensor | None = None,
    norm2_bias: Tensor | None = None,
    *,
    eps1: float = 1e-5,
    eps2: float = 1e-5,
) -> Tensor:
    """Returns tokens with LN2(Linear(LN1(words))) added to each sentence; the class token stays.

    The stem of the network is the same operation: its tokens are the class token and the positions,
    expanded over the batch.

    Args:
        words: [B * n, m, c], n sentences an image.
        tokens: [B, n + 1, d], the class token first; may be expanded over the batch; B may be zero.
        norm1_weight, norm1_bias: [m * c], or [c] to normalise each word on its own (timm's first TNT).
        weight: [d, m * c].
        bias: [d] or None.
        norm2_weight, norm2_bias: [d], or both None for no second LayerNorm.
        eps1, eps2: added to the variance in the two LayerNorms.

    Returns:
        [B, n + 1, d] in the dtype of tokens, contiguous. words and tokens are of one dtype, or tokens
        are float32; parameters are of the dtype of words (those of a LayerNorm may be float32). Under
        torch.autocast any of them may differ, and products run in autocast's dtype.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype or device.
        RuntimeError: a backend is forced and cannot run the call.

    Source: "Transformer in Transformer", arXiv 2103.00112, equations 3 and 7.
    """
    parameters = (norm1_weight, norm1_bias, weight, bias, norm2_weight, norm2_bias)
    _checks.check_tensor("word_to_sentence", "words", words, _checks.WORDS)
    backend = dispatch.choose("word_to_sentence", words, tokens, *parameters)
    compute_dtype = compute_dtype_of(words)
    if backend != "reference":
        return _ops.word_to_sentence(words, tokens, *parameters, eps1, eps2, compute_dtype)
    _checks.check_word_to_sentence(words, tokens, *parameters, compute_dtype)
    return reference.word_to_sentence(words, tokens, *parameters, eps1, eps2)
