"""A TNT as a user has it in a file of their own: the authors' names, nothing imported from tnt_kernels."""

import math

import torch
import torch.nn as nn


def pair(x):
    return x if isinstance(x, tuple) else (x, x)


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training or not self.drop_prob:
            return x
        keep = 1 - self.drop_prob
        mask = torch.rand(x.shape[0], *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device) < keep
        return x / keep * mask


class Mlp(nn.Module):
    def __init__(self, dim, hidden, act_layer=nn.GELU, drop=0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class SE(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, dim // 4),
            nn.ReLU(inplace=True),
            nn.Linear(dim // 4, dim),
            nn.Tanh(),
        )

    def forward(self, x):
        return x * self.fc(x.mean(1, keepdim=True))


class Attention(nn.Module):
    def __init__(self, dim, num_heads, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = qk_scale or self.head_dim**-0.5
        self.qk = nn.Linear(dim, dim * 2, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop, inplace=True)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop, inplace=True)

    def forward(self, x):
        rows, length, _ = x.shape
        qk = self.qk(x).view(rows, length, 2, self.num_heads, self.head_dim)
        q, k = qk.permute(2, 0, 3, 1, 4)
        v = self.v(x).view(rows, length, self.num_heads, self.head_dim).permute(0, 2, 1, 3)
        weights = self.attn_drop(torch.softmax(q @ k.mT * self.scale, -1))
        return self.proj_drop(self.proj((weights @ v).permute(0, 2, 1, 3).flatten(2)))


class Block(nn.Module):
    def __init__(
        self,
        outer_dim,
        inner_dim,
        outer_num_heads,
        inner_num_heads,
        num_words,
        mlp_ratio=4.0,
        qkv_bias=False,
        qk_scale=None,
        drop=0.0,
        attn_drop=0.0,
        drop_path=0.0,
        norm_layer=nn.LayerNorm,
        act_layer=nn.GELU,
        se=0,
    ):
        super().__init__()
        shared = {"qkv_bias": qkv_bias, "qk_scale": qk_scale, "attn_drop": attn_drop, "proj_drop": drop}
        self.has_inner = inner_dim > 0
        if self.has_inner:
            self.inner_norm1 = norm_layer(inner_dim)
            self.inner_attn = Attention(inner_dim, inner_num_heads, **shared)
            self.inner_norm2 = norm_layer(inner_dim)
            self.inner_mlp = Mlp(inner_dim, int(inner_dim * mlp_ratio), act_layer, drop)
            self.proj_norm1 = norm_layer(num_words * inner_dim)
            self.proj = nn.Linear(num_words * inner_dim, outer_dim, bias=False)
            self.proj_norm2 = norm_layer(outer_dim)
        self.outer_norm1 = norm_layer(outer_dim)
        self.outer_attn = Attention(outer_dim, outer_num_heads, **shared)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.outer_norm2 = norm_layer(outer_dim)
        self.outer_mlp = Mlp(outer_dim, int(outer_dim * mlp_ratio), act_layer, drop)
        self.se = se
        self.se_layer = SE(outer_dim) if se > 0 else 0

    def forward(self, inner_tokens, outer_tokens):
        if self.has_inner:
            inner_tokens = inner_tokens + self.drop_path(self.inner_attn(self.inner_norm1(inner_tokens)))
            inner_tokens = inner_tokens + self.drop_path(self.inner_mlp(self.inner_norm2(inner_tokens)))
            images, length, _ = outer_tokens.shape
            sentences = self.proj_norm1(inner_tokens.reshape(images, length - 1, -1))
            # written into its input, as the authors' code does
            outer_tokens[:, 1:] = outer_tokens[:, 1:] + self.proj_norm2(self.proj(sentences))
        outer_tokens = outer_tokens + self.drop_path(self.outer_attn(self.outer_norm1(outer_tokens)))
        branch = self.outer_mlp(self.outer_norm2(outer_tokens))
        if self.se > 0:
            branch = branch + self.se_layer(branch)
        return inner_tokens, outer_tokens + self.drop_path(branch)


class PatchEmbed(nn.Module):
    def __init__(self, img_size, patch_size, in_chans, inner_dim, inner_stride):
        super().__init__()
        self.img_size = pair(img_size)
        self.patch_size = pair(patch_size)
        self.num_patches = (self.img_size[0] // self.patch_size[0]) * (self.img_size[1] // self.patch_size[1])
        self.inner_dim = inner_dim
        self.num_words = math.prod(math.ceil(p / inner_stride) for p in self.patch_size)
        self.unfold = nn.Unfold(self.patch_size, stride=self.patch_size)
        self.proj = nn.Conv2d(in_chans, inner_dim, 7, padding=3, stride=inner_stride)

    def forward(self, x):
        batch, channels, height, width = x.shape
        assert (height, width) == self.img_size, f"expected {self.img_size}, got {(height, width)}"
        x = self.unfold(x).transpose(1, 2).reshape(batch * self.num_patches, channels, *self.patch_size)
        return self.proj(x).flatten(2).transpose(1, 2)


class TNT(nn.Module):
    def __init__(
        self,
        img_size=224,
        patch_size=16,
        in_chans=3,
        num_classes=1000,
        outer_dim=768,
        inner_dim=48,
        depth=12,
        outer_num_heads=12,
        inner_num_heads=4,
        mlp_ratio=4.0,
        qkv_bias=False,
        qk_scale=None,
        drop_rate=0.0,
        attn_drop_rate=0.0,
        drop_path_rate=0.0,
        norm_layer=nn.LayerNorm,
        inner_stride=4,
        se=0,
        block_class=Block,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, inner_dim, inner_stride)
        self.num_patches = self.patch_embed.num_patches
        num_words = self.patch_embed.num_words
        self.proj_norm1 = norm_layer(num_words * inner_dim)
        self.proj = nn.Linear(num_words * inner_dim, outer_dim)
        self.proj_norm2 = norm_layer(outer_dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, outer_dim) * 0.02)
        self.outer_tokens = nn.Parameter(torch.zeros(1, self.num_patches, outer_dim), requires_grad=False)
        self.outer_pos = nn.Parameter(torch.randn(1, self.num_patches + 1, outer_dim) * 0.02)
        self.inner_pos = nn.Parameter(torch.randn(1, num_words, inner_dim) * 0.02)
        self.pos_drop = nn.Dropout(drop_rate)
        rates = torch.linspace(0, drop_path_rate, depth).tolist()
        self.blocks = nn.ModuleList(
            block_class(
                outer_dim,
                inner_dim,
                outer_num_heads,
                inner_num_heads,
                num_words,
                mlp_ratio,
                qkv_bias,
                qk_scale,
                drop_rate,
                attn_drop_rate,
                rate,
                norm_layer,
                se=se,
            )
            for rate in rates
        )
        self.norm = norm_layer(outer_dim)
        self.head = nn.Linear(outer_dim, num_classes) if num_classes > 0 else nn.Identity()

    def forward_features(self, x):
        batch = x.shape[0]
        inner_tokens = self.patch_embed(x) + self.inner_pos
        outer_tokens = self.proj_norm1(inner_tokens.reshape(batch, self.num_patches, -1))
        outer_tokens = self.proj_norm2(self.proj(outer_tokens))
        outer_tokens = torch.cat((self.cls_token.expand(batch, -1, -1), outer_tokens), dim=1)
        outer_tokens = self.pos_drop(outer_tokens + self.outer_pos)
        for blk in self.blocks:
            inner_tokens, outer_tokens = blk(inner_tokens, outer_tokens)
        return self.norm(outer_tokens)[:, 0]

    def forward(self, x):
        return self.head(self.forward_features(x))
