"""TNT (Transformer in Transformer, arXiv 2103.00112) in plain PyTorch.

This model is the oracle of the tests, the fallback on every device and the baseline of the benchmarks.
Its constructor, parameter names and initialisation are those of the authors' public code, so that their
checkpoints load strictly. Symbols in comments: B images, n sentences (patches) per image, m words per
sentence, c inner width, d outer width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Size = int | tuple[int, int]


def _pair(name: str, value: Any) -> tuple[int, int]:
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(sizes) != 2 or not all(isinstance(s, int) and s > 0 for s in sizes):
        raise ValueError(f"{name} must be a positive int or a pair of them, got {value!r}")
    return sizes


class DropPath(nn.Module):
    """Drop whole rows of dim 0 with probability `drop_prob` while training, and scale the rows kept.

    In the inner half a row is a sentence ([B * n, m, c]), in the outer half an image ([B, n + 1, d]).
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= drop_prob <= 1.0:
            raise ValueError(f"drop_prob must lie in [0, 1], got {drop_prob!r}")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        if keep > 0.0:
            mask = mask / keep
        return x * mask

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3g}"


class Mlp(nn.Module):
    """Linear, activation, dropout, Linear, dropout: [..., in_features] -> [..., out_features]."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.act(self.fc1(x)))
        return self.drop(self.fc2(x))


class SE(nn.Module):
    """Squeeze and excitation: x * tanh(W2 relu(W1 LN(mean of x over its tokens))), x [B, N, dim]."""

    def __init__(self, dim: int, hidden_ratio: float = 0.25) -> None:
        super().__init__()
        hidden = int(dim * hidden_ratio)
        self.fc = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim), nn.Tanh()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean(dim=1, keepdim=True))


class Attention(nn.Module):
    """Multi-head self-attention, [S, N, dim] -> [S, N, dim].

    `qk` makes the queries (first half of its outputs) and the keys (second half), head-major inside each;
    `v` makes the values. `scale` is `qk_scale`, or head_dim ** -0.5 where that is None or 0.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or hidden_dim % num_heads or dim % num_heads:
            raise ValueError(
                "num_heads must be positive and divide the widths: "
                f"got num_heads={num_heads}, dim={dim}, hidden_dim={hidden_dim}"
            )
        self.hidden_dim = hidden_dim
        self.num_heads = num_heads
        self.head_dim = hidden_dim // num_heads
        self.scale = qk_scale or self.head_dim**-0.5

        self.qk = nn.Linear(dim, 2 * hidden_dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        s, n, dim = x.shape
        q, k = self.qk(x).reshape(s, n, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        v = self.v(x).reshape(s, n, self.num_heads, dim // self.num_heads).transpose(1, 2)
        attn = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        out = (self.attn_drop(attn) @ v).transpose(1, 2).reshape(s, n, dim)
        return self.proj_drop(self.proj(out))


class PatchEmbed(nn.Module):
    """Image to words: [B, in_chans, H, W] -> [B * n, m, inner_dim].

    Each patch is convolved on its own (7x7, zero padding at the patch's border). Sentences and words are
    row-major. Rows and columns of the image beyond the last whole patch are not used.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        outer_dim: int = 768,
        inner_dim: int = 24,
        inner_stride: int = 4,
    ) -> None:
        super().__init__()
        self.img_size = _pair("img_size", img_size)
        self.patch_size = _pair("patch_size", patch_size)
        self.grid_size = (self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        if self.num_patches == 0:
            raise ValueError(f"img_size must hold a patch: got {img_size!r} with patch_size={patch_size!r}")
        height, width = self.patch_size
        self.words_grid = (math.ceil(height / inner_stride), math.ceil(width / inner_stride))
        self.num_words = self.words_grid[0] * self.words_grid[1]
        self.in_chans = in_chans
        self.inner_dim = inner_dim
        self.inner_stride = inner_stride
        self.proj = nn.Conv2d(in_chans, inner_dim, kernel_size=7, padding=3, stride=inner_stride)

    def check_image(self, x: Tensor) -> None:
        """Raise ValueError where `x` is not [B, in_chans, H, W] of this model's size."""
        expected = (self.in_chans, *self.img_size)
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"image must have the shape [B, {', '.join(map(str, expected))}] (img_size={self.img_size}, "
                f"in_chans={self.in_chans}), got {list(x.shape)}"
            )

    def forward(self, x: Tensor) -> Tensor:
        self.check_image(x)
        batch, channels = x.shape[:2]
        (rows, columns), (height, width) = self.grid_size, self.patch_size
        x = x[:, :, : rows * height, : columns * width]
        x = x.reshape(batch, channels, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(batch * self.num_patches, channels, height, width)
        return self.proj(x).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """One TNT layer: inner transformer over words, words added to their sentence, outer transformer.

    With inner_dim <= 0 there is no inner half: the words pass through and nothing is added to the sentences.
    """

    attention_class: ClassVar[type[nn.Module]] = Attention
    mlp_class: ClassVar[type[nn.Module]] = Mlp

    def __init__(
        self,
        outer_dim: int,
        inner_dim: int,
        outer_num_heads: int,
        inner_num_heads: int,
        num_words: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        se: int = 0,
    ) -> None:
        super().__init__()

        def attention(dim: int, num_heads: int) -> nn.Module:
            return self.attention_class(
                dim,
                dim,
                num_heads=num_heads,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                attn_drop=attn_drop,
                proj_drop=drop,
            )

        def mlp(dim: int) -> nn.Module:
            return self.mlp_class(dim, int(dim * mlp_ratio), dim, act_layer=act_layer, drop=drop)

        self.has_inner = inner_dim > 0
        if self.has_inner:
            self.inner_norm1 = norm_layer(inner_dim)
            self.inner_attn = attention(inner_dim, inner_num_heads)
            self.inner_norm2 = norm_layer(inner_dim)
            self.inner_mlp = mlp(inner_dim)
            self.proj_norm1 = norm_layer(num_words * inner_dim)
            self.proj = nn.Linear(num_words * inner_dim, outer_dim, bias=False)
            self.proj_norm2 = norm_layer(outer_dim)

        self.outer_norm1 = norm_layer(outer_dim)
        self.outer_attn = attention(outer_dim, outer_num_heads)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.outer_norm2 = norm_layer(outer_dim)
        self.outer_mlp = mlp(outer_dim)
        self.se = se
        self.se_layer = SE(outer_dim) if se > 0 else None

    def forward(self, inner_tokens: Tensor, outer_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """inner_tokens [B * n, m, c], outer_tokens [B, n + 1, d], class token first; returns both."""
        if self.has_inner:
            inner_tokens = inner_tokens + self.drop_path(self.inner_attn(self.inner_norm1(inner_tokens)))
            inner_tokens = inner_tokens + self.drop_path(self.inner_mlp(self.inner_norm2(inner_tokens)))
            batch, tokens, _ = outer_tokens.shape
            sentences = inner_tokens.reshape(batch, tokens - 1, self.proj.in_features)
            sentences = self.proj_norm2(self.proj(self.proj_norm1(sentences)))
            outer_tokens = torch.cat([outer_tokens[:, :1], outer_tokens[:, 1:] + sentences], dim=1)
        outer_tokens = outer_tokens + self.drop_path(self.outer_attn(self.outer_norm1(outer_tokens)))
        mixed = self.outer_mlp(self.outer_norm2(outer_tokens))
        if self.se_layer is not None:
            mixed = mixed + self.se_layer(mixed)
        return inner_tokens, outer_tokens + self.drop_path(mixed)


class TNT(nn.Module):
    """Transformer in Transformer, [B, in_chans, H, W] -> logits [B, num_classes].

    Args:
        img_size: height and width of the images, an int or a pair.
        patch_size: height and width of a sentence in pixels, an int or a pair.
        in_chans: channels of the images.
        num_classes: width of the head; 0 makes the head an identity (forward returns the features).
        outer_dim, inner_dim: widths of the sentence and of the word embeddings.
        depth: number of blocks.
        outer_num_heads, inner_num_heads: heads; each must divide its width.
        mlp_ratio: hidden width of both MLPs over their width.
        qkv_bias: whether the qk and v projections have biases.
        qk_scale: scale of the attention scores; None or 0: head_dim ** -0.5.
        drop_rate: dropout after the position embedding and every projection of a block.
        attn_drop_rate: dropout of the attention probabilities.
        drop_path_rate: stochastic depth, rising linearly from 0 in the first block to this in the last.
        norm_layer: called with a width, makes every norm of the transformer.
        inner_stride: stride of the words inside a patch, in pixels.
        se: above 0, a squeeze-and-excitation branch on the outer MLPs.

    A subclass changes what the model is built of through `patch_embed_class` and `block_class`.
    """

    patch_embed_class: ClassVar[type[PatchEmbed]] = PatchEmbed
    block_class: ClassVar[type[Block]] = Block

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        outer_dim: int = 768,
        inner_dim: int = 48,
        depth: int = 12,
        outer_num_heads: int = 12,
        inner_num_heads: int = 4,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        inner_stride: int = 4,
        se: int = 0,
    ) -> None:
        super().__init__()
        widths = {"in_chans": in_chans, "outer_dim": outer_dim, "inner_dim": inner_dim}
        for name, value in {**widths, "inner_stride": inner_stride}.items():
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value!r}")
        for name, value in {"num_classes": num_classes, "depth": depth}.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value!r}")
        heads = {"outer": (outer_num_heads, outer_dim), "inner": (inner_num_heads, inner_dim)}
        for half, (count, width) in heads.items():
            if count < 1 or width % count:
                raise ValueError(f"{half}_num_heads must divide {half}_dim={width}, got {count!r}")
        if not 0.0 <= drop_path_rate <= 1.0:
            raise ValueError(f"drop_path_rate must lie in [0, 1], got {drop_path_rate!r}")
        self.num_classes = num_classes
        self.num_features = self.outer_dim = outer_dim

        self.patch_embed = self.patch_embed_class(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            outer_dim=outer_dim,
            inner_dim=inner_dim,
            inner_stride=inner_stride,
        )
        self.num_patches = num_patches = self.patch_embed.num_patches
        num_words = self.patch_embed.num_words

        self.proj_norm1 = norm_layer(num_words * inner_dim)
        self.proj = nn.Linear(num_words * inner_dim, outer_dim)
        self.proj_norm2 = norm_layer(outer_dim)

        self.cls_token = nn.Parameter(torch.zeros(1, 1, outer_dim))
        # Never read; kept because the authors' state dict has it.
        self.outer_tokens = nn.Parameter(torch.zeros(1, num_patches, outer_dim), requires_grad=False)
        self.outer_pos = nn.Parameter(torch.zeros(1, num_patches + 1, outer_dim))
        self.inner_pos = nn.Parameter(torch.zeros(1, num_words, inner_dim))
        self.pos_drop = nn.Dropout(drop_rate)

        self.blocks = nn.ModuleList(
            self.block_class(
                outer_dim=outer_dim,
                inner_dim=inner_dim,
                outer_num_heads=outer_num_heads,
                inner_num_heads=inner_num_heads,
                num_words=num_words,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                drop=drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=drop_path_rate * i / max(depth - 1, 1),
                norm_layer=norm_layer,
                se=se,
            )
            for i in range(depth)
        )
        self.grad_checkpointing = False
        self.norm = norm_layer(outer_dim)
        self.head: nn.Module = nn.Linear(outer_dim, num_classes) if num_classes > 0 else nn.Identity()

        for parameter in (self.cls_token, self.outer_pos, self.inner_pos):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that an optimiser should not decay (besides biases and norms)."""
        return {"outer_pos", "inner_pos", "cls_token"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether to keep only the input of every block for the backward pass, which runs the block again.

        Dropout and drop path fall in the second run as in the first.
        """
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = "") -> None:
        """Replace the head by a newly initialised one, or by an identity if `num_classes` is 0."""
        if global_pool not in (None, "", "token"):
            raise ValueError(
                f"global_pool must be '' or 'token': TNT reads its class token; got {global_pool!r}"
            )
        self.num_classes = num_classes
        if num_classes > 0:
            like = self.cls_token
            self.head = nn.Linear(self.outer_dim, num_classes, device=like.device, dtype=like.dtype)
            self._init_weights(self.head)
        else:
            self.head = nn.Identity()
        self.head.train(self.training)

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, in_chans, H, W] to the first block's words [B * n, m, c] and sentences [B, n + 1, d]."""
        batch = x.shape[0]
        words = self.patch_embed(x) + self.inner_pos
        sentences = words.reshape(batch, self.num_patches, self.proj.in_features)
        sentences = self.proj_norm2(self.proj(self.proj_norm1(sentences)))
        sentences = torch.cat([self.cls_token.expand(batch, -1, -1), sentences], dim=1)
        return words, self.pos_drop(sentences + self.outer_pos)

    def forward_features(self, x: Tensor) -> Tensor:
        """Class token after the last norm, [B, outer_dim]."""
        words, sentences = self.embed(x)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                words, sentences = checkpoint(block, words, sentences, use_reentrant=False)
            else:
                words, sentences = block(words, sentences)
        return self.norm(sentences)[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


# Where the published sizes differ from the constructor's defaults. The head counts of TNT-Ti are unverified.
VARIANTS: dict[str, dict[str, int]] = {
    "tnt_ti_patch16_224": {"outer_dim": 192, "inner_dim": 12, "outer_num_heads": 3, "inner_num_heads": 2},
    "tnt_s_patch16_224": {"outer_dim": 384, "inner_dim": 24, "outer_num_heads": 6, "inner_num_heads": 4},
    "tnt_b_patch16_224": {"outer_dim": 640, "inner_dim": 40, "outer_num_heads": 10, "inner_num_heads": 4},
}


def tnt_ti_patch16_224(**kwargs: Any) -> TNT:
    """TNT-Ti of the paper, 6.1 M parameters. `kwargs` are those of `TNT` and override the size's own."""
    return TNT(**{**VARIANTS["tnt_ti_patch16_224"], **kwargs})


def tnt_s_patch16_224(**kwargs: Any) -> TNT:
    """TNT-S, 23.8 M parameters. `kwargs` are those of `TNT` and override the size's own."""
    return TNT(**{**VARIANTS["tnt_s_patch16_224"], **kwargs})


def tnt_b_patch16_224(**kwargs: Any) -> TNT:
    """TNT-B, 65.4 M parameters. `kwargs` are those of `TNT` and override the size's own."""
    return TNT(**{**VARIANTS["tnt_b_patch16_224"], **kwargs})
