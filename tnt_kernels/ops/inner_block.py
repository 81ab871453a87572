"""The inner transformer block: attention and MLP over the words of every sentence."""

from __future__ import annotations

from torch import Tensor

from tnt_kernels import _checks, _ops, dispatch
from tnt_kernels.backends import reference
from tnt_kernels.ops._autocast import compute_dtype_of


def inner_block(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    qk_weight: Tensor,
    qk_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    num_heads: int,
    scale: float | None = None,
    eps1: float = 1e-5,
    eps2: float = 1e-5,
    drop_path1: Tensor | None = None,
    drop_path2: Tensor | None = None,
    seed: Tensor | None = None,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
    hidden_drop: float = 0.0,
    out_drop: float = 0.0,
) -> Tensor:
    """Transforms the words of each sentence: y = x + Attention(LN(x)); returns y + MLP(LN(y)).

    Words are read once and written once. GELU is the exact one (erf).

    Args:
        x: [S, m, c], S sentences (batch times patches, zero allowed) of m words.
        norm1_weight, norm1_bias: [c].
        qk_weight, qk_bias: [2c, c] and [2c] or None; queries first, then keys, heads outermost in each.
        v_weight, v_bias: [c, c] and [c] or None.
        proj_weight, proj_bias: [c, c] and [c] or None.
        norm2_weight, norm2_bias: [c].
        fc1_weight, fc1_bias: [hidden, c] and [hidden] or None.
        fc2_weight, fc2_bias: [c, hidden] and [c] or None.
        num_heads: divides c.
        scale: factor of the scores; None means (c / num_heads) ** -0.5.
        eps1, eps2: added to the variance in the two LayerNorms.
        drop_path1, drop_path2: [S] float32 or None, the factor of each sentence's attention, and of its MLP:
            stochastic depth passes 0 where a branch is dropped and 1 / keep probability elsewhere.
        seed: int64 [1], on x's device, or None without dropout: what is dropped depends on it and on the
            place of an element alone. `torch.randint` draws one through torch's generator.
        attn_drop, proj_drop, hidden_drop, out_drop: rates of dropout of the attention's probabilities, of its
            projection's output, behind GELU, and behind the MLP's second layer.

    Returns:
        [S, m, c] in the dtype of x, contiguous. Parameters are of x's dtype (those of a LayerNorm may
        be float32); under torch.autocast they may be of another, and products run in autocast's dtype.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype or device.
        RuntimeError: a backend is forced and cannot run the call.

    Source: "Transformer in Transformer", arXiv 2103.00112, equations 5 and 6.
    """
    parameters = (
        norm1_weight, norm1_bias, qk_weight, qk_bias, v_weight, v_bias, proj_weight, proj_bias,
        norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
    )  # fmt: skip
    _checks.check_tensor("inner_block", "x", x, _checks.STREAM)
    backend = dispatch.choose("inner_block", x, *parameters, drop_path1, drop_path2)
    compute_dtype = compute_dtype_of(x)
    scale = _checks.scale_of("inner_block", x, num_heads, scale)
    noise = (drop_path1, drop_path2, seed, attn_drop, proj_drop, hidden_drop, out_drop)
    _checks.check_dropout("inner_block", x, noise[2:], _checks.DROPS)
    if backend != "reference":
        return _ops.inner_block(x, *parameters, num_heads, scale, eps1, eps2, compute_dtype, *noise)
    _checks.check_inner_block(x, *parameters, num_heads, compute_dtype)
    _checks.check_drop_path("inner_block", x, "x", drop_path1=drop_path1, drop_path2=drop_path2)
    return reference.inner_block(x, *parameters, num_heads, scale, eps1, eps2, *noise).to(x.dtype)
