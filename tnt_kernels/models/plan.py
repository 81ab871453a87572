"""What a TNT's modules are made of, by role, in the authors' names and in timm's.

A plan is made once, from the structure alone: where in a module the parts of the network lie, of which
types they are, and what is known to have no fused form. Whether a part may run fused is asked anew in every
call, because hooks, adapters and modes come and go.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.nn.modules.dropout import _DropoutNd

from tnt_kernels.models.tnt import DropPath

Path = tuple[str, ...]
Settings = tuple[
    tuple[str, Any], ...
]  # attributes of a module that its forward may depend on, and their values

ORIGINAL = "_tnt_original"  # where the class of an accelerated module keeps the module's own class

# Settings that the fused operations read in every call, and the width of a head that may be replaced.
_LIVE = ("num_heads", "scale", "num_classes")

# What every module has: its parameters, children, hooks and mode.
INTERNAL = frozenset(nn.Module().__dict__)


class HalfNames(NamedTuple):
    """Names of one transformer half: x + attn(norm1(x)), then x + mlp(norm2(x))."""

    norm1: str
    attn: str
    norm2: str
    mlp: str


class ProjectionNames(NamedTuple):
    """Names of norm2(proj(norm1(words))), the words' way into their sentence."""

    norm1: str
    proj: str
    norm2: str


class BlockNames(NamedTuple):
    inner: HalfNames
    projection: ProjectionNames
    outer: HalfNames
    drop_path: str = "drop_path"
    squeeze: str = "se_layer"


class ModelNames(NamedTuple):
    pixel_embed: str
    inner_pos: str
    projection: ProjectionNames
    outer_pos: str
    cls_token: str = "cls_token"
    pos_drop: str = "pos_drop"
    head_drop: str = "head_drop"
    blocks: str = "blocks"
    norm: str = "norm"
    head: str = "head"


AUTHORS_PROJECTION = ProjectionNames("proj_norm1", "proj", "proj_norm2")
AUTHORS_BLOCK = BlockNames(
    HalfNames("inner_norm1", "inner_attn", "inner_norm2", "inner_mlp"),
    AUTHORS_PROJECTION,
    HalfNames("outer_norm1", "outer_attn", "outer_norm2", "outer_mlp"),
)
AUTHORS_MODEL = ModelNames("patch_embed", "inner_pos", AUTHORS_PROJECTION, "outer_pos")

TIMM_PROJECTION = ProjectionNames("norm1_proj", "proj", "norm2_proj")
TIMM_BLOCK = BlockNames(
    HalfNames("norm_in", "attn_in", "norm_mlp_in", "mlp_in"),
    TIMM_PROJECTION,
    HalfNames("norm_out", "attn_out", "norm_mlp", "mlp"),
)
TIMM_MODEL = ModelNames("pixel_embed", "pixel_pos", TIMM_PROJECTION, "patch_pos")


class Member(NamedTuple):
    """A module that a fused operation stands for: it must be there, unwatched and of exactly this type."""

    path: Path
    kind: type[nn.Module] | None  # None: no module there (norm2_proj of timm's legacy network)
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()  # of the parameters that the operation takes
    settings: Settings = ()


class Noise(NamedTuple):
    """A module that is random in training mode while this attribute of it is above 0."""

    path: Path
    rate: str


@dataclass(frozen=True)
class Part:
    """Modules that one operation replaces."""

    op: str
    members: tuple[Member, ...] = ()
    refused: str | None = None  # why their structure has no fused form
    noise: tuple[Noise, ...] = ()  # what the operation cannot do while it is active
    drops: tuple[tuple[str, Noise], ...] = ()  # dropout that it does itself: option for the rate, module

    @property
    def random(self) -> tuple[Noise, ...]:
        return (*self.noise, *(noise for _, noise in self.drops))


@dataclass(frozen=True)
class BlockPlan:
    names: BlockNames
    inner: Part | None  # None: a block without its inner half
    projection: Part | None
    outer: Part
    shared: tuple[Member, ...]  # children without parameters that belong to no part, such as drop_path
    settings: Settings
    noise: tuple[Noise, ...]
    stops: tuple[Noise, ...]  # of the noise, what takes the whole block off the fast path while active
    switches: tuple[str, ...]  # of activation checkpointing
    fused_drop_path: bool  # whether the operations can apply what drop_path draws
    refused: str | None = None  # why nothing of the block can run fused
    training: bool = True  # whether the fused block may stand for it in training mode too
    per_word: bool = False  # the projection normalises every word on its own (timm's legacy network)


@dataclass(frozen=True)
class PixelPlan:
    part: Part
    kind: type[nn.Module]
    settings: Settings
    img_size: tuple[int, int]
    patch_size: tuple[int, int]
    legacy: bool  # one convolution over the whole image
    positioned: bool  # forward(image, position), as timm has it; not forward(image)


@dataclass(frozen=True)
class ModelPlan:
    names: ModelNames
    pixel: PixelPlan
    stem: Part
    shared: tuple[Member, ...]  # children around the blocks, such as the last norm and the position dropout
    settings: Settings
    noise: tuple[Noise, ...]  # apart from the blocks'
    stops: tuple[Noise, ...]  # of the noise, what makes the model's own forward run while active
    switches: tuple[str, ...]  # of activation checkpointing
    refused: str | None = None  # why the model's own forward has to run
    training: bool = True  # whether it may be passed over in training mode too


def plan_block(block: nn.Module) -> BlockPlan | None:
    """The plan of a TNT block, or None for a module that has not the children of one."""
    for names in (AUTHORS_BLOCK, TIMM_BLOCK):
        if all(isinstance(block._modules.get(name), nn.Module) for name in names.outer):
            return _plan_block(block, names)
    return None


def _plan_block(block: nn.Module, names: BlockNames) -> BlockPlan:
    children = {name: child for name, child in block._modules.items() if child is not None}
    inside = (*names.inner, names.projection.norm1, names.projection.proj)
    has_inner = all(name in children for name in inside)
    roles = (*names.outer, *names.inner, *names.projection, names.squeeze)
    extra = {name: child for name, child in children.items() if name not in roles}

    refused = None
    foreign = [*block._parameters, *block._buffers]
    foreign += [name for name, child in extra.items() if _has_state(child)]
    if foreign:
        refused = f"it has {', '.join(foreign)}, which a TNT block has not"
    elif not has_inner and any(name in children for name in inside):
        refused = f"it lacks {', '.join(name for name in inside if name not in children)}"

    noise = tuple(_noise_of(block))
    fused_drop_path = _is_drop_path(children.get(names.drop_path))
    drop_path = () if fused_drop_path else (names.drop_path,)

    inner = projection = None
    if has_inner:
        inner = _plan_half(block, names.inner, "inner_block", _inside((*names.inner, *drop_path), noise))
        if inner.refused is None:
            inner = _with_drops(inner, block, names.inner)
        projection = _plan_projection(block, names.projection)
    outer = _plan_half(block, names.outer, "outer_block", _inside((*names.outer, *drop_path), noise))
    if names.squeeze in children:
        outer = Part("outer_block", refused=f"squeeze-and-excitation ({names.squeeze}) has no fused form")
    known = _inside((*roles, names.drop_path), noise)
    return BlockPlan(
        names=names,
        inner=inner,
        projection=projection,
        outer=outer,
        shared=tuple(Member((name,), type(child)) for name, child in extra.items()),
        settings=settings_of(block),
        noise=noise,
        stops=tuple(item for item in noise if item not in known),
        switches=checkpoint_switches(block),
        fused_drop_path=fused_drop_path,
        refused=refused,
        per_word=has_inner and children.get(names.projection.norm2) is None,
    )


def _is_drop_path(module: object) -> bool:
    """Whether a module draws what the operations can apply, by its exact type: our DropPath, or timm's."""
    timm = sys.modules.get("timm.layers.drop")
    return type(module) in (DropPath, getattr(timm, "DropPath", DropPath))


def _inside(names: tuple[str, ...], noise: tuple[Noise, ...]) -> tuple[Noise, ...]:
    return tuple(item for item in noise if item.path and item.path[0] in names)


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _noise_of(module: nn.Module) -> Iterator[Noise]:
    for name, child in module.named_modules():
        rate = "p" if isinstance(child, _DropoutNd) else "drop_prob"
        if hasattr(child, rate):
            yield Noise(_path(name), rate)


def _path(name: str) -> Path:
    return tuple(name.split(".")) if name else ()


def _members(module: nn.Module, names: tuple[str, ...]) -> tuple[Member, ...]:
    members = []
    for name in names:
        root = module._modules.get(name)
        if root is None:
            members.append(Member((name,), None))
            continue
        for path, child in root.named_modules():
            needed = ("weight", "bias") if isinstance(child, nn.LayerNorm) else ("weight",)
            shapes = tuple(
                (parameter, tuple(child._parameters[parameter].shape))
                for parameter in needed
                if child._parameters.get(parameter) is not None
            )
            # Of PyTorch's own modules here, only GELU has a switch that no operation reads.
            own = type(child).__module__.startswith("torch.nn.") and not isinstance(child, nn.GELU)
            settings = () if own else settings_of(child)
            members.append(Member((name, *_path(path)), type(child), shapes, settings))
    return tuple(members)


def settings_of(module: nn.Module) -> Settings:
    rates = [noise.rate for noise in _noise_of(module) if not noise.path]
    return tuple(
        (name, value)
        for name, value in module.__dict__.items()
        if is_plain(value)
        and name not in INTERNAL
        and name not in (*_LIVE, *rates, *checkpoint_switches(module))
    )


def checkpoint_switches(module: nn.Module) -> tuple[str, ...]:
    """Attributes that switch activation checkpointing, by name: timm's grad_checkpointing, and the like."""
    return tuple(
        name for name, value in module.__dict__.items() if "checkpoint" in name and type(value) is bool
    )


def is_plain(value: object) -> bool:
    """Whether a value can be compared and hashed without asking anyone: numbers, strings, tuples of them."""
    if type(value) is tuple:
        return all(map(is_plain, value))
    return value is None or type(value) in (int, float, bool, str)


def _plan_half(block: nn.Module, names: HalfNames, op: str, noise: tuple[Noise, ...]) -> Part:
    norm1, attn, norm2, mlp = (block._modules[name] for name in names)
    why = (
        _no_layer_norm(names.norm1, norm1)
        or _no_attention(names.attn, attn)
        or _no_layer_norm(names.norm2, norm2)
        or _no_mlp(names.mlp, mlp)
    )
    return Part(op, refused=why) if why else Part(op, _members(block, names), noise=noise)


# Where the inner half's operation has a dropout: its option, the part of the half, the module's names there.
# TNT and the authors' code use one module twice.
_DROPS = (
    ("attn_drop", "attn", ("attn_drop",)),
    ("proj_drop", "attn", ("proj_drop",)),
    ("hidden_drop", "mlp", ("drop1", "drop")),
    ("out_drop", "mlp", ("drop2", "drop")),
)


def _with_drops(part: Part, block: nn.Module, names: HalfNames) -> Part:
    children: dict[str, Any] = block._modules
    drops = []
    for option, owner, known in _DROPS:
        path = getattr(names, owner)
        found = (name for name in known if type(children[path]._modules.get(name)) is nn.Dropout)
        drops += [(option, Noise((path, name), "p")) for name in itertools.islice(found, 1)]
    fused = {noise for _, noise in drops}
    return replace(part, noise=tuple(noise for noise in part.noise if noise not in fused), drops=tuple(drops))


def without_drops(part: Part) -> Part:
    """The part with its dropout left to its modules."""
    return replace(part, noise=tuple(dict.fromkeys(part.random)), drops=())


def _plan_projection(module: nn.Module, names: ProjectionNames) -> Part:
    norm1, proj, norm2 = (module._modules.get(name) for name in names)
    why = _no_layer_norm(names.norm1, norm1) or _no_linear(names.proj, proj)
    if why is None and norm2 is not None:
        why = _no_layer_norm(names.norm2, norm2)
    return Part("word_to_sentence", refused=why) if why else Part("word_to_sentence", _members(module, names))


def _no_layer_norm(name: str, norm: object) -> str | None:
    if type(norm) is not nn.LayerNorm:
        return f"{name} is {_a(norm)}, not a LayerNorm"
    if norm.weight is None or norm.bias is None or len(norm.normalized_shape) != 1:
        return f"{name} has no weight or no bias, or normalises several dimensions"
    return None


def _no_linear(name: str, linear: object) -> str | None:
    return None if type(linear) is nn.Linear else f"{name} is {_a(linear)}, not a Linear"


def _a(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _replaced(module: nn.Module | None, kind: type[nn.Module] | None) -> str:
    now = None if module is None else own_class(module)
    names = [None if cls is None else cls.__name__ for cls in (now, kind)]
    if names[0] == names[1]:
        names = [None if cls is None else f"{cls.__module__}.{cls.__name__}" for cls in (now, kind)]
    is_now, was = ("nothing" if name is None else f"a {name}" for name in names)
    return f"is {is_now} and was {was}"


def _no_attention(name: str, attn: Any) -> str | None:
    known = ("qk", "v", "proj")
    for child in known:
        why = _no_linear(f"{name}.{child}", attn._modules.get(child))
        if why is not None:
            return why
    if not isinstance(getattr(attn, "num_heads", None), int):
        return f"{name} has no num_heads"
    if not isinstance(getattr(attn, "scale", 1.0), (int, float)):
        return f"{name}.scale is {_a(attn.scale)}, not a number"
    width = attn.qk.in_features
    shapes = [tuple(attn._modules[child].weight.shape) for child in known]
    if shapes != [(2 * width, width), (width, width), (width, width)]:
        return f"{name} has weights of the shapes {shapes}, not those of {width} channels throughout"
    return _foreign_state(name, attn, known)


def _no_mlp(name: str, mlp: Any) -> str | None:
    known = ("fc1", "fc2")
    for child in known:
        why = _no_linear(f"{name}.{child}", mlp._modules.get(child))
        if why is not None:
            return why
    act = mlp._modules.get("act")
    if act is not None and (type(act).__name__ != "GELU" or getattr(act, "approximate", "none") != "none"):
        return f"{name}.act is {act}, not the exact GELU"
    return _foreign_state(name, mlp, known)


def _foreign_state(name: str, module: nn.Module, known: tuple[str, ...]) -> str | None:
    own = [*module._parameters, *module._buffers]
    own += [
        child
        for child, value in module._modules.items()
        if value is not None and child not in known and _has_state(value)
    ]
    return f"{name} has {', '.join(own)}, which a TNT's has not" if own else None


def plan_pixel_embed(module: nn.Module) -> PixelPlan | None:
    """The plan of a pixel embedding, or None for a module that has not the children of one."""
    proj = module._modules.get("proj")
    img_size, patch_size = (
        _pair(getattr(module, "img_size", None)),
        _pair(getattr(module, "patch_size", None)),
    )
    if not isinstance(proj, nn.Conv2d) or img_size is None or patch_size is None:
        return None
    why = _no_word_convolution(proj) or _foreign_state("it", module, ("proj",))
    return PixelPlan(
        part=Part("pixel_embed", (), why)
        if why
        else Part("pixel_embed", _members(module, tuple(module._modules))),
        kind=own_class(module),
        settings=settings_of(module),
        img_size=img_size,
        patch_size=patch_size,
        legacy=bool(getattr(module, "legacy", False)),
        positioned=len(inspect.signature(module.forward).parameters) == 2,
    )


def _pair(value: Any) -> tuple[int, int] | None:
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    return sizes if len(sizes) == 2 and all(isinstance(size, int) for size in sizes) else None


def _no_word_convolution(proj: nn.Conv2d) -> str | None:
    if type(proj) is not nn.Conv2d:
        return f"proj is {_a(proj)}, not a Conv2d"
    kernel, stride = proj.kernel_size[0], proj.stride[0]
    plain = (
        kernel % 2 == 1
        and proj.kernel_size == (kernel, kernel)
        and proj.stride == (stride, stride)
        and proj.padding == (kernel // 2, kernel // 2)
        and proj.padding_mode == "zeros"
        and proj.dilation == (1, 1)
        and proj.groups == 1
    )
    return None if plain else f"proj is {proj}, not a square convolution of odd size with zeros around"


def plan_model(model: nn.Module) -> ModelPlan | None:
    """The plan of a whole TNT, or None for a module that has not the children and parameters of one."""
    if isinstance(model, torch.jit.ScriptModule):
        return None
    for names in (AUTHORS_MODEL, TIMM_MODEL):
        children = (names.pixel_embed, *names.projection, names.blocks, names.norm, names.head)
        parameters = (names.inner_pos, names.outer_pos, names.cls_token)
        if all(isinstance(model._modules.get(name), nn.Module) for name in children) and all(
            model._parameters.get(name) is not None for name in parameters
        ):
            break
    else:
        return None
    pixel = plan_pixel_embed(model._modules[names.pixel_embed])  # type: ignore[arg-type]
    if pixel is None:
        return None
    apart = (names.pixel_embed, *names.projection, names.blocks, names.head)
    around = [
        (name, child) for name, child in model._modules.items() if child is not None and name not in apart
    ]
    noise = tuple(noise for noise in _noise_of(model) if noise.path[:1] != (names.blocks,))
    called = _inside((names.pos_drop, names.head_drop), noise)
    return ModelPlan(
        names=names,
        pixel=pixel,
        stem=_plan_projection(model, names.projection),
        shared=tuple(Member((name,), type(child)) for name, child in around),
        settings=settings_of(model),
        noise=noise,
        stops=tuple(item for item in noise if item not in called),
        switches=checkpoint_switches(model),
    )


def watched(module: nn.Module) -> str | None:
    """Why a module has to be called itself: something watches its forward, or stands in its place."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "has a forward hook"
    if module._backward_hooks or module._backward_pre_hooks:
        return "has a backward hook"
    if "forward" in module.__dict__:
        return "has a forward set on the instance"
    return None


def everything_as_written() -> str | None:
    """Why no module may run fused now, or None."""
    if torch.jit.is_tracing():
        return "torch.jit is tracing"
    if (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    ):
        return "a hook on all modules is registered"
    return None


def reset(module: nn.Module, settings: Settings) -> str | None:
    """Which setting of a module is no longer what it was, or None."""
    state = module.__dict__
    for name, value in settings:
        if name not in state or state[name] != value:
            return f"{name} is {state.get(name)!r} and was {value!r}"
    return None


def submodule(root: nn.Module, path: Path) -> Any:
    """The module at a path, or None."""
    module: Any = root
    for name in path:
        module = None if module is None else module._modules.get(name)
    return module


def changed(root: nn.Module, members: tuple[Member, ...]) -> str | None:
    """What of these modules is no longer as it was planned, or None."""
    for path, kind, shapes, settings in members:
        module = submodule(root, path)
        if type(module) is not (type(None) if kind is None else kind):
            return f"{'.'.join(path)} {_replaced(module, kind)}"
        if module is None:
            continue
        why = watched(module)
        if why is not None:
            return f"{'.'.join(path)} {why}"
        for name, shape in shapes:
            parameter = module._parameters.get(name)
            if parameter is None or parameter.shape != shape:
                given = "no parameter" if parameter is None else f"of shape {list(parameter.shape)}"
                return f"{'.'.join((*path, name))} is {given} and was of shape {list(shape)}"
        if settings:
            why = reset(module, settings)
            if why is not None:
                return f"{'.'.join(path)}.{why}"
    return None


def active_noise(root: nn.Module, noise: tuple[Noise, ...]) -> str | None:
    """Which dropout or drop path would act now, or None."""
    for path, rate in noise:
        module = submodule(root, path)
        if module is not None and module.training and getattr(module, rate, None):
            return f"{'.'.join(path)} is active ({rate}={getattr(module, rate):g})"
    return None


def checkpointed(module: nn.Module, plan: BlockPlan | ModelPlan) -> str | None:
    """Why a module has to run as it is written so as to keep fewer activations for backward, or None."""
    if torch.is_grad_enabled():
        for name in plan.switches:
            if module.__dict__.get(name):
                return f"activation checkpointing is on ({name})"
    return None


def block_as_written(block: nn.Module, plan: BlockPlan) -> str | None:
    """Why the whole block has to run as it is written, or None."""
    if plan.refused is not None:
        return plan.refused
    if block.training and not plan.training:
        return "in training mode it computes something else than a TNT block"
    return (
        everything_as_written()
        or checkpointed(block, plan)
        or active_noise(block, plan.stops)
        or changed(block, plan.shared)
        or reset(block, plan.settings)
    )


def model_as_written(model: nn.Module, plan: ModelPlan) -> str | None:
    """Why the model's own forward has to run, or None. Its blocks may run fused all the same."""
    if plan.refused is not None:
        return plan.refused
    for name in ("forward_features", "forward_head"):
        if name in model.__dict__:
            return f"{name} is set on the instance"
    if model.training and not plan.training:
        return "in training mode it computes something else than a TNT"
    return (
        everything_as_written()
        or active_noise(model, plan.stops)
        or changed(model, plan.shared)
        or reset(model, plan.settings)
    )


def pixel_as_written(module: nn.Module, plan: PixelPlan) -> str | None:
    """Why a pixel embedding has to run as it is written, as far as its modules tell, or None."""
    if own_class(module) is not plan.kind:
        return f"it {_replaced(module, plan.kind)}"
    return everything_as_written() or part_as_written(module, plan.part) or reset(module, plan.settings)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, accelerated or not."""
    return getattr(type(module), ORIGINAL, type(module))


def part_as_written(module: nn.Module, part: Part) -> str | None:
    """Why a part has to run as it is written, as far as its modules tell, or None."""
    if part.refused is not None:
        return part.refused
    return active_noise(module, part.noise) or changed(module, part.members) or _active_drops(module, part)


def _active_drops(module: nn.Module, part: Part) -> str | None:
    """The kernels for GPUs have no dropout of their own."""
    why = active_noise(module, tuple(noise for _, noise in part.drops))
    on_gpu = why is not None and any(parameter.is_cuda for parameter in module.parameters())
    return f"{why}, which the triton backend cannot do" if on_gpu else None
