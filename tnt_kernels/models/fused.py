"""Run the modules of a TNT through the fused operations, part by part, as their plan says.

A part that cannot run fused now runs through the module's own children. Functions that return None leave
the call to the module's own forward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tnt_kernels import dispatch, ops, outer
from tnt_kernels.models.class_token import class_token_block
from tnt_kernels.models.plan import (
    BlockNames,
    BlockPlan,
    HalfNames,
    ModelPlan,
    Part,
    PixelPlan,
    ProjectionNames,
    block_as_written,
    checkpointed,
    model_as_written,
    part_as_written,
    pixel_as_written,
    submodule,
    watched,
)

PLAN = "_tnt_plan"  # where a block keeps its plan


class Arguments(NamedTuple):
    """Parameters and options of one operation, as the modules have them now."""

    parameters: tuple[Any, ...]
    options: dict[str, Any]


def _weight_and_bias(module: nn.Module | None) -> tuple[Any, Any]:
    if module is None:
        return None, None
    return module._parameters["weight"], module._parameters["bias"]


def _parameters(*modules: nn.Module | None) -> tuple[Any, ...]:
    return tuple(tensor for module in modules for tensor in _weight_and_bias(module))


def half_arguments(block: nn.Module, names: HalfNames) -> Arguments:
    children: dict[str, Any] = block._modules
    norm1, attn, norm2, mlp = (children[name] for name in names)
    a, f = attn._modules, mlp._modules
    return Arguments(
        _parameters(norm1, a["qk"], a["v"], a["proj"], norm2, f["fc1"], f["fc2"]),
        {
            "num_heads": attn.num_heads,
            "scale": attn.__dict__.get("scale"),
            "eps1": norm1.eps,
            "eps2": norm2.eps,
        },
    )


def projection_arguments(module: nn.Module, names: ProjectionNames) -> Arguments:
    children: dict[str, Any] = module._modules
    norm1, proj, norm2 = children[names.norm1], children[names.proj], children.get(names.norm2)
    options = {"eps1": norm1.eps}
    if norm2 is not None:
        options["eps2"] = norm2.eps
    return Arguments(_parameters(norm1, proj, norm2), options)


def pixel_arguments(module: nn.Module, position: Tensor | None = None) -> Arguments:
    return Arguments((*_parameters(module._modules["proj"]), position), {})


def part_arguments(block: nn.Module, plan: BlockPlan, part: Part) -> Arguments:
    if part is plan.projection:
        return projection_arguments(block, plan.names.projection)
    return half_arguments(block, plan.names.inner if part is plan.inner else plan.names.outer)


def _choose(
    part: Part, arguments: Arguments, streams: tuple[Tensor, ...], needs_grad: bool
) -> tuple[bool, bool]:
    """Whether a backend runs the part on these tensors, and whether its output needs a gradient."""
    if not _one_dtype(arguments, streams):
        return False, needs_grad
    needs_grad = needs_grad or dispatch.gradient_needed(*streams, *arguments.parameters)
    backend = dispatch.choose(part.op, *streams, *arguments.parameters, needs_grad=needs_grad)
    return backend != "reference", needs_grad


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)  # not so the proxies of torch.fx


def autocast(x: Tensor) -> bool:
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def _one_dtype(arguments: Arguments, streams: tuple[Tensor, ...]) -> bool:
    """Whether the operation takes these dtypes. A user's forward may cast where the operation would raise."""
    x, tokens = streams[0], streams[-1]
    if autocast(x):
        return True
    if tokens.dtype is not x.dtype and tokens.dtype is not torch.float32:
        return False
    for tensor in arguments.parameters:
        if tensor is not None and tensor.dtype is not x.dtype and tensor.dim() > 1:
            return False
    return True


class Chosen(NamedTuple):
    """Arguments of the parts that run fused; None: the part is absent or runs as it is written."""

    inner: Arguments | None
    projection: Arguments | None
    outer: Arguments | None


def choose_parts(
    block: nn.Module, plan: BlockPlan, words: Tensor, tokens: Tensor, *, outer_half: bool = True
) -> Chosen:
    """Which parts run fused on these tensors, the outer half only if asked for.

    Raises RuntimeError where a backend is forced that cannot run a part whose modules have a fused form.
    """
    needs_grad = False
    chosen: list[Arguments | None] = []
    for part, streams in (
        (plan.inner, (words,)),
        (plan.projection, (words, tokens)),
        (plan.outer if outer_half else None, (tokens,)),
    ):
        arguments = None
        if part is not None and part_as_written(block, part) is None:
            arguments = part_arguments(block, plan, part)
            fused, needs_grad = _choose(part, arguments, streams, needs_grad)
            if not fused:
                arguments = None
        chosen.append(arguments)
    return Chosen(*chosen)


def run_block(
    block: nn.Module, plan: BlockPlan, words: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor] | None:
    """A block's words [B * n, m, c] and tokens [B, n + 1, d], or None if nothing of it runs fused."""
    if not all(map(_is_tensor, (words, tokens))) or block_as_written(block, plan) is not None:
        return None
    chosen = choose_parts(block, plan, words, tokens)
    if chosen.inner is None and chosen.projection is None and chosen.outer is None:
        return None
    return compose(block, plan, chosen, words, tokens)


def compose(
    block: nn.Module, plan: BlockPlan, chosen: Chosen, words: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """The chosen parts fused, the others through the block's own children."""
    words, tokens = _inner_and_projection(block, plan, chosen, words, tokens)
    if chosen.outer is None:
        tokens = _half(block, plan.names, plan.names.outer, tokens)
    else:
        options = chosen.outer.options | _noise_options(block, plan, plan.outer, tokens)
        tokens = outer.outer_block(tokens, *chosen.outer.parameters, **options)
    return words, tokens


def _inner_and_projection(
    block: nn.Module, plan: BlockPlan, chosen: Chosen, words: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    if plan.inner is None:
        return words, tokens
    if chosen.inner is None:
        words = _half(block, plan.names, plan.names.inner, words)
    else:
        options = chosen.inner.options | _noise_options(block, plan, plan.inner, words)
        words = ops.inner_block(words, *chosen.inner.parameters, **options)
    if chosen.projection is None:
        tokens = _projection(block, plan, words, tokens)
    else:
        tokens = ops.word_to_sentence(
            words, tokens, *chosen.projection.parameters, **chosen.projection.options
        )
    return words, tokens


def _noise_options(block: nn.Module, plan: BlockPlan, part: Part, x: Tensor) -> dict[str, Any]:
    """What a half's operation on x needs to know of the drop path and the dropout that are active now."""
    options: dict[str, Any] = {}
    if plan.fused_drop_path:
        drop_path: Any = block._modules[plan.names.drop_path]
        if drop_path.training and drop_path.drop_prob:
            options["drop_path1"] = _drop_path_factors(drop_path, x)
            options["drop_path2"] = _drop_path_factors(drop_path, x)
    for option, (path, rate) in part.drops:
        dropout: Any = submodule(block, path)
        if dropout.training and getattr(dropout, rate):
            options[option] = getattr(dropout, rate)
            if "seed" not in options:
                options["seed"] = torch.randint(1 << 62, (1,), device=x.device)
    return options


def _drop_path_factors(drop_path: Any, x: Tensor) -> Tensor:
    """What a DropPath, ours or timm's, multiplies the rows of x by: [rows] float32.

    The generator takes the steps that the module would have it take, whatever the dtype of its input, so
    that the same seed drops the same branches as without fused operations.
    """
    keep = 1.0 - drop_path.drop_prob
    factors = x.new_empty(x.shape[0], dtype=torch.float32).bernoulli_(keep)
    if keep > 0.0 and getattr(drop_path, "scale_by_keep", True):  # a switch of timm's
        factors = factors / keep
    return factors


def _half(block: nn.Module, names: BlockNames, half: HalfNames, x: Tensor) -> Tensor:
    children: dict[str, Any] = block._modules
    norm1, attn, norm2, mlp = (children[name] for name in half)
    drop_path = children.get(names.drop_path) or nn.Identity()
    squeeze = children.get(names.squeeze) if half is names.outer else None
    x = x + drop_path(attn(norm1(x)))
    branch = mlp(norm2(x))
    if squeeze is not None:
        branch = branch + squeeze(branch)
    return x + drop_path(branch)


def _projection(block: nn.Module, plan: BlockPlan, words: Tensor, tokens: Tensor) -> Tensor:
    children: dict[str, Any] = block._modules
    norm1, proj, norm2 = (children.get(name) or nn.Identity() for name in plan.names.projection)
    shape = (tokens.shape[0], tokens.shape[1] - 1, words.shape[1] * words.shape[2])
    sentences = norm1(words).reshape(shape) if plan.per_word else norm1(words.reshape(shape))
    sentences = norm2(proj(sentences))
    return torch.cat([tokens[:, :1], tokens[:, 1:] + sentences], dim=1)


def run_pixel_embed(
    module: nn.Module, plan: PixelPlan, image: Tensor, position: Tensor | None = None
) -> Tensor | None:
    """Words [B * n, m, c] of an image, or None if the module has to run as it is written.

    `position` is [1, m, c], or [1, c, rows, columns] as timm has it.
    """
    # Of another size or channel count: the module's own error, or what else it does with it.
    if not _is_tensor(image) or image.dim() != 4 or tuple(image.shape[2:]) != plan.img_size:
        return None
    if pixel_as_written(module, plan) is not None:
        return None
    proj: Any = module._modules["proj"]
    if image.shape[1] != proj.in_channels:
        return None
    if not _choose(plan.part, pixel_arguments(module, position), (image,), False)[0]:
        return None
    return pixel_embed(module, plan, image, position)


def pixel_embed(module: nn.Module, plan: PixelPlan, image: Tensor, position: Tensor | None) -> Tensor:
    proj: Any = module._modules["proj"]
    height, width = plan.patch_size
    if not plan.legacy:  # pixels beyond the last whole patch are not used
        image = image[:, :, : image.shape[2] // height * height, : image.shape[3] // width * width]
    if position is not None and position.dim() == 4:
        position = position.flatten(2).transpose(1, 2)
    return ops.pixel_embed(
        image,
        *_weight_and_bias(proj),
        position,
        patch_size=plan.patch_size,
        stride=proj.stride[0],
        legacy=plan.legacy,
    )


def embed(model: nn.Module, plan: ModelPlan, image: Tensor) -> tuple[Tensor, Tensor]:
    """The first block's words [B * n, m, c] and tokens [B, n + 1, d], for a model not run as written."""
    names = plan.names
    children: dict[str, Any] = model._modules
    pixel, position = children[names.pixel_embed], getattr(model, names.inner_pos)
    words = None
    if watched(pixel) is None:
        words = run_pixel_embed(pixel, plan.pixel, image, position)
    if words is None:
        words = pixel(image, position) if plan.pixel.positioned else pixel(image) + position

    cls_token, outer_pos = getattr(model, names.cls_token), getattr(model, names.outer_pos)
    batch, n = image.shape[0], outer_pos.shape[1] - 1
    tokens = None
    if part_as_written(model, plan.stem) is None:
        arguments = projection_arguments(model, names.projection)
        if _choose(plan.stem, arguments, (words, cls_token, outer_pos), False)[0]:
            # A stem is a projection into sentences that hold their positions alone.
            empty = torch.cat([cls_token + outer_pos[:, :1], outer_pos[:, 1:]], dim=1).expand(batch, -1, -1)
            tokens = ops.word_to_sentence(words, empty, *arguments.parameters, **arguments.options)
    if tokens is None:
        norm1, proj, norm2 = (children[name] for name in names.projection)
        sentences = norm2(proj(norm1(words.reshape(batch, n, words.shape[1] * words.shape[2]))))
        tokens = torch.cat([cls_token.expand(batch, -1, -1), sentences], dim=1) + outer_pos
    pos_drop = children.get(names.pos_drop)
    return words, tokens if pos_drop is None else pos_drop(tokens)


def run_features(model: nn.Module, plan: ModelPlan, image: Tensor) -> Tensor:
    """The class token after the last norm, [B, 1, d], unless the model has to run as it is written."""
    children: dict[str, Any] = model._modules
    words, tokens = embed(model, plan, image)
    blocks = list(children[plan.names.blocks]._modules.values())
    norm = children[plan.names.norm]
    for block in blocks[:-1]:
        words, tokens = block(words, tokens)
    if blocks:
        token = None
        block_plan = getattr(blocks[-1], PLAN, None)
        if block_plan is not None:
            token = run_class_token(blocks[-1], block_plan, words, tokens)
        tokens = blocks[-1](words, tokens)[1] if token is None else token
    return norm(tokens)[:, :1]


def run_model(model: nn.Module, plan: ModelPlan, image: Tensor) -> Tensor | None:
    """The model's output, or None if its own forward has to run."""
    if (
        not _is_tensor(image)
        or model_as_written(model, plan) is not None
        or checkpointed(model, plan) is not None
    ):
        return None
    if image.dim() != 4 or tuple(image.shape[2:]) != plan.pixel.img_size:
        return None
    return head(model, plan, run_features(model, plan, image))


def head(model: nn.Module, plan: ModelPlan, features: Tensor) -> Tensor:
    """What the model makes of the class token after the last norm, [B, 1, d]."""
    made: Any = model
    if hasattr(type(model), "forward_head"):
        return made.forward_head(features)
    return made._modules[plan.names.head](features[:, 0])


def run_class_token(block: nn.Module, plan: BlockPlan, words: Tensor, tokens: Tensor) -> Tensor | None:
    """The class token [B, 1, d] that a block puts out, or None if its outer half does not run fused.

    In the last block nothing else is used, which leaves nearly nothing of its outer half to compute.
    """
    if (
        not all(map(_is_tensor, (words, tokens)))
        or watched(block) is not None
        or block_as_written(block, plan) is not None
        or part_as_written(block, plan.outer) is not None
    ):
        return None
    arguments = part_arguments(block, plan, plan.outer)
    # Plain PyTorch, which autograd records by itself: a gradient does not stand in the way.
    backend = dispatch.choose(plan.outer.op, tokens, *arguments.parameters, needs_grad=False)
    if backend == "reference" or not _one_dtype(arguments, (tokens,)):
        return None
    chosen = choose_parts(block, plan, words, tokens, outer_half=False)
    _, tokens = _inner_and_projection(block, plan, chosen, words, tokens)
    options = arguments.options | _noise_options(block, plan, plan.outer, tokens)
    return class_token_block(tokens, *arguments.parameters, **options)
