"""The second half of the inner block: the MLP of every word."""

from __future__ import annotations

from torch import Tensor

from tnt_kernels import _checks, _ops, dispatch
from tnt_kernels.backends import reference
from tnt_kernels.ops._autocast import compute_dtype_of


def inner_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    eps: float = 1e-5,
    drop_path: Tensor | None = None,
    seed: Tensor | None = None,
    hidden_drop: float = 0.0,
    out_drop: float = 0.0,
) -> Tensor:
    """Returns x + fc2(GELU(fc1(LN(x)))) with the exact GELU (erf).

    Args:
        x: [S, m, c], S sentences (zero allowed) of m words.
        norm_weight, norm_bias: [c].
        fc1_weight, fc1_bias: [hidden, c] and [hidden] or None.
        fc2_weight, fc2_bias: [c, hidden] and [c] or None.
        eps: added to the variance in the LayerNorm.
        drop_path: [S] float32 or None, the factor of each sentence's branch: stochastic depth passes 0 for a
            sentence whose branch is dropped and 1 / keep probability for the others.
        seed: int64 [1], on x's device, or None without dropout: what is dropped depends on it and on the
            place of an element alone. `torch.randint` draws one through torch's generator.
        hidden_drop, out_drop: rates of dropout behind GELU and behind the second layer.

    Returns:
        [S, m, c] in the dtype of x, contiguous. Dtypes, autocast and errors as in
        :func:`~tnt_kernels.ops.inner_block`.

    Source: "Transformer in Transformer", arXiv 2103.00112, equation 6.
    """
    parameters = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    _checks.check_tensor("inner_mlp", "x", x, _checks.STREAM)
    backend = dispatch.choose("inner_mlp", x, *parameters, drop_path)
    compute_dtype = compute_dtype_of(x)
    noise = (drop_path, seed, hidden_drop, out_drop)
    _checks.check_dropout("inner_mlp", x, noise[1:], _checks.MLP_DROPS)
    if backend != "reference":
        return _ops.inner_mlp(x, *parameters, eps, compute_dtype, *noise)
    _checks.check_inner_mlp(x, *parameters, compute_dtype)
    _checks.check_drop_path("inner_mlp", x, drop_path=drop_path)
    return reference.inner_mlp(x, *parameters, eps, *noise).to(x.dtype)
