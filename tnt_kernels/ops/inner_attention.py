"""The first half of the inner block: attention over the words of every sentence."""

from __future__ import annotations

from torch import Tensor

from tnt_kernels import _checks, _ops, dispatch
from tnt_kernels.backends import reference
from tnt_kernels.ops._autocast import compute_dtype_of


def inner_attention(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qk_weight: Tensor,
    qk_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    num_heads: int,
    scale: float | None = None,
    eps: float = 1e-5,
    drop_path: Tensor | None = None,
    seed: Tensor | None = None,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
) -> Tensor:
    """Returns x + Attention(LN(x)), every sentence attending to its own words.

    Args:
        x: [S, m, c], S sentences (zero allowed) of m words.
        norm_weight, norm_bias: [c].
        qk_weight, qk_bias: [2c, c] and [2c] or None; queries first, then keys, heads outermost in each.
        v_weight, v_bias: [c, c] and [c] or None.
        proj_weight, proj_bias: [c, c] and [c] or None.
        num_heads: divides c.
        scale: factor of the scores; None means (c / num_heads) ** -0.5.
        eps: added to the variance in the LayerNorm.
        drop_path: [S] float32 or None, the factor of each sentence's branch: stochastic depth passes 0 for a
            sentence whose branch is dropped and 1 / keep probability for the others.
        seed: int64 [1], on x's device, or None without dropout: what is dropped depends on it and on the
            place of an element alone. `torch.randint` draws one through torch's generator.
        attn_drop, proj_drop: rates of dropout of the probabilities and of the projection's output.

    Returns:
        [S, m, c] in the dtype of x, contiguous. Dtypes, autocast and errors as in
        :func:`~tnt_kernels.ops.inner_block`.

    Source: "Transformer in Transformer", arXiv 2103.00112, equation 5.
    """
    parameters = (
        norm_weight, norm_bias, qk_weight, qk_bias, v_weight, v_bias, proj_weight, proj_bias,
    )  # fmt: skip
    _checks.check_tensor("inner_attention", "x", x, _checks.STREAM)
    backend = dispatch.choose("inner_attention", x, *parameters, drop_path)
    compute_dtype = compute_dtype_of(x)
    scale = _checks.scale_of("inner_attention", x, num_heads, scale)
    noise = (drop_path, seed, attn_drop, proj_drop)
    _checks.check_dropout("inner_attention", x, noise[1:], _checks.ATTENTION_DROPS)
    if backend != "reference":
        return _ops.inner_attention(x, *parameters, num_heads, scale, eps, compute_dtype, *noise)
    _checks.check_inner_attention(x, *parameters, num_heads, compute_dtype)
    _checks.check_drop_path("inner_attention", x, drop_path=drop_path)
    return reference.inner_attention(x, *parameters, num_heads, scale, eps, *noise).to(x.dtype)
