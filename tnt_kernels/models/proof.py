"""Prove by a run that a module computes what its plan says.

Names and types alone could be wrong: a block with a TNT's children may have a forward of its own. Before
anything stands in for a user's module, a copy of it with other, random parameters runs in float64 on a few
sentences, beside the same parameters through the reference operations: in eval mode, in training mode, and
with drop path and dropout at work, which have to be drawn in the same order. The user's module is not called,
nor are its hooks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tnt_kernels import dispatch
from tnt_kernels.models import fused
from tnt_kernels.models.plan import (
    BlockPlan,
    ModelPlan,
    Noise,
    Part,
    PixelPlan,
    active_noise,
    without_drops,
)
from tnt_kernels.models.tnt import SE, Attention, Mlp

# Far above the rounding of a user's forward that computes its softmax or norms in float32, and far below what
# another activation, scale or order of operations makes of random parameters.
TOLERANCE = 1e-6

IMAGES, SENTENCES = 2, 3

RATE = 0.4  # of every drop path and dropout in a noisy test run
SEED = 8  # of what they drop there: something in each branch of a block, and never all of it

GIVES_NAN = "its forward gives NaN in a test run"

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def clone(
    module: nn.Module, generator: torch.Generator, stand_ins: Mapping[nn.Module, nn.Module] | None = None
) -> nn.Module:
    """A copy of the structure: same classes and attributes, no hooks, random float64 parameters on the CPU.

    `stand_ins` are put, as they are, where the copy would have copies of their keys.
    """
    modules: dict[int, nn.Module] = {id(old): new for old, new in (stand_ins or {}).items()}
    tensors: dict[int, Any] = {}

    def of_tensor(name: str, old: Any) -> Any:
        if old is None:
            return None
        if id(old) not in tensors:
            tensors[id(old)] = (
                _random_like(name, old, generator) if isinstance(old, nn.Parameter) else _copied(old)
            )
        return tensors[id(old)]

    def of_module(old: nn.Module | None) -> nn.Module | None:
        if old is None:
            return None
        if id(old) in modules:
            return modules[id(old)]
        # Not by __new__ of the class: that of a sharded module (FSDPModule) calls the constructor.
        new = modules[id(old)] = object.__new__(old.__class__)
        state = dict(old.__dict__)
        for name, value in state.items():
            if type(value) in (list, dict, set):  # a forward may write into them
                state[name] = copy.copy(value)
        for name in _HOOKS:
            if name in state:
                state[name] = type(state[name])()
        state["_parameters"] = {name: of_tensor(name, value) for name, value in old._parameters.items()}
        state["_buffers"] = {name: of_tensor(name, value) for name, value in old._buffers.items()}
        state["_modules"] = {name: of_module(child) for name, child in old._modules.items()}
        new.__dict__.update(state)
        return new

    made = of_module(module)
    assert made is not None
    return made


def _random_like(name: str, old: nn.Parameter, generator: torch.Generator) -> nn.Parameter:
    mean, spread = 0.0, 1.0
    if old.dim() < 2:
        mean = 1.0 if name == "weight" else 0.0
    else:
        spread = 2.5 * math.prod(old.shape[1:]) ** -0.5
    return nn.Parameter(_random(generator, *old.shape, mean=mean, spread=spread), requires_grad=False)


def _copied(buffer: Tensor) -> Tensor:
    new = buffer.detach().clone().cpu()
    return new.double() if new.is_floating_point() else new


def _stored(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    """What the attributes of a module and its children hold, to see what a run leaves there."""
    return {
        f"{path}.{name}".lstrip("."): (
            id(value),
            len(value) if isinstance(value, (list, dict, set)) else None,
        )
        for path, child in module.named_modules()
        for name, value in child.__dict__.items()
        if name not in ("_parameters", "_buffers", "_modules", "training", *_HOOKS)
    }


def _compare(
    module: nn.Module, run: Callable[[], Any], exact: Callable[[], tuple[Tensor, ...]]
) -> str | None:
    """Why `run`, which calls `module`, does not give the tensors of `exact`, or None."""
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        torch.autocast("cpu", enabled=False),
        dispatch.use_backend("reference"),
    ):
        try:
            torch.default_generator.manual_seed(SEED)
            expected = exact()
            torch.default_generator.manual_seed(SEED)
            before = _stored(module)
            given = run()
            left = [name for name, held in _stored(module).items() if before.get(name) != held]
            if left:
                return f"its forward stores {', '.join(left)}, which a fused one would not"
            return _difference(given, expected)
        except Exception as error:  # whatever a user's forward may raise on a small input
            return f"its forward fails in a test run: {type(error).__name__}: {error}"


def _difference(given: Any, expected: tuple[Tensor, ...]) -> str | None:
    outputs = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    if len(outputs) != len(expected) or not all(isinstance(output, Tensor) for output in outputs):
        return "its forward returns something else than a TNT's"
    for output, wanted in zip(outputs, expected, strict=True):
        if output.shape != wanted.shape:
            return f"its forward returns the shape {list(output.shape)}, a TNT's {list(wanted.shape)}"
        off = ((output.double() - wanted).abs().max() / wanted.abs().max()).item()
        if math.isnan(off):
            return GIVES_NAN
        if not off <= TOLERANCE:
            return f"its forward computes something else than a TNT's (off by {off:.1e} in a test run)"
    return None


def _random(generator: torch.Generator, *shape: int, mean: float = 0.3, spread: float = 2.0) -> Tensor:
    # Uniform: several times faster than normal, and there may be millions of them.
    values = torch.empty(shape, dtype=torch.float64, device="cpu")
    return values.uniform_(mean - spread, mean + spread, generator=generator)


def prove_block(block: nn.Module, plan: BlockPlan) -> BlockPlan:
    """The plan with what test runs found against it: `refused`, not `training`, noise that `stops` it."""
    if plan.refused is not None:
        return plan
    generator = torch.Generator().manual_seed(0)
    try:
        twin = clone(block, generator).eval()
        words, tokens = _block_input(twin, plan, generator)
    except Exception as error:  # attributes that refuse to be copied, a norm of unknown width
        return replace(plan, refused=f"a copy for a test run cannot be made: {type(error).__name__}: {error}")

    def found() -> str | None:
        chosen = fused.Chosen(
            *(
                None
                if part is None or part.refused is not None or active_noise(twin, part.random)
                else fused.part_arguments(twin, plan, part)
                for part in (plan.inner, plan.projection, plan.outer)
            )
        )
        return _compare(
            twin,
            lambda: twin(words.clone(), tokens.clone()),
            lambda: fused.compose(twin, plan, chosen, words, tokens),
        )

    refused = found()
    if refused is not None:
        return replace(plan, refused=refused)
    drop_path = tuple(noise for noise in plan.noise if noise.path == (plan.names.drop_path,))
    # Drop path as the operations apply it, then all noise as the modules draw it.
    changes = _in_training(twin, plan, [drop_path, plan.noise], found)
    plan = replace(plan, **changes)
    inner = plan.inner
    if (
        not changes
        and inner is not None
        and inner.drops
        and _drops_otherwise(twin, plan, inner, words, tokens)
    ):
        plan = replace(plan, inner=without_drops(inner))
    return plan


def _drops_otherwise(
    twin: nn.Module, plan: BlockPlan, part: Part, words: Tensor, tokens: Tensor
) -> str | None:
    """Why the dropout of an inner half is not where `TNT` has it, or None.

    The operation draws otherwise than the modules: with the same draws, this package's Attention and Mlp
    stand for it.
    """
    names, rates = plan.names.inner, {option: RATE for option, _ in part.drops}
    theirs: dict[str, Any] = twin._modules
    attn, mlp = theirs[names.attn], theirs[names.mlp]
    width, hidden = attn.qk.in_features, mlp.fc1.out_features
    attn_drop, proj_drop, drop = (rates.get(key, 0.0) for key in ("attn_drop", "proj_drop", "hidden_drop"))
    with torch.device("meta"):  # draws nothing; the layers are theirs
        ours_attn = Attention(
            width, width, attn.num_heads, False, attn.__dict__.get("scale"), attn_drop, proj_drop
        )
        ours_mlp = Mlp(width, hidden, width, drop=drop)
    for ours, other, children in ((ours_attn, attn, ("qk", "v", "proj")), (ours_mlp, mlp, ("fc1", "fc2"))):
        ours._modules.update({name: other._modules[name] for name in children})
    standard = nn.Module()
    standard._modules.update({**theirs, names.attn: ours_attn, names.mlp: ours_mlp})
    _set_rates(twin, plan.noise, 0.0)
    _set_rates(twin, tuple(noise for _, noise in part.drops), RATE)
    as_written = fused.Chosen(None, None, None)
    return _compare(
        twin,
        lambda: twin(words.clone(), tokens.clone()),
        lambda: fused.compose(standard, plan, as_written, words, tokens),
    )


def _in_training(
    twin: nn.Module,
    plan: BlockPlan | ModelPlan,
    kinds: Sequence[tuple[Noise, ...]],
    found: Callable[[], str | None],
) -> dict[str, Any]:
    """What test runs in training mode, quiet and then with each kind of noise, change in a plan."""
    try:
        twin.train()
        _set_rates(twin, plan.noise, 0.0)
        if found() is not None:
            return {"training": False}
        for noise in kinds:
            _set_rates(twin, noise, RATE)
            if noise and found() is not None:
                return {"stops": plan.noise}
    except Exception:  # a train() of the user's, or a rate that cannot be set
        return {"training": False}
    return {}


def _set_rates(module: nn.Module, noise: tuple[Noise, ...], rate: float) -> None:
    for path, name in noise:
        setattr(module.get_submodule(".".join(path)), name, rate)


def _block_input(block: nn.Module, plan: BlockPlan, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    children: dict[str, Any] = block._modules
    d = children[plan.names.outer.norm1].normalized_shape[0]
    m, c = 4, 6
    if plan.inner is not None:
        c = children[plan.names.inner.norm1].normalized_shape[0]
        m = children[plan.names.projection.proj].in_features // c
    return _random(generator, IMAGES * SENTENCES, m, c), _random(generator, IMAGES, SENTENCES + 1, d)


def prove_pixel_embed(module: nn.Module, plan: PixelPlan) -> PixelPlan:
    """The plan with what a test run found: nothing against it, the other convolution, or a refusal."""
    if plan.part.refused is not None:
        return plan
    generator = torch.Generator().manual_seed(0)
    try:
        twin = clone(module, generator).eval()
    except Exception as error:
        refused = f"a copy for a test run cannot be made: {type(error).__name__}: {error}"
        return replace(plan, part=replace(plan.part, refused=refused))
    proj: Any = twin._modules["proj"]
    image = _random(generator, IMAGES, proj.in_channels, *plan.img_size)
    rows, columns = (-(-size // proj.stride[0]) for size in plan.patch_size)
    position = _random(generator, 1, proj.out_channels, rows, columns) if plan.positioned else None

    def found(candidate: PixelPlan) -> str | None:
        return _compare(
            twin,
            lambda: twin(image.clone()) if position is None else twin(image.clone(), position),
            lambda: (fused.pixel_embed(twin, candidate, image, position),),
        )

    why = found(plan)
    if why is not None:
        other = replace(plan, legacy=not plan.legacy)
        plan = other if found(other) is None else replace(plan, part=replace(plan.part, refused=why))
    return plan


def prove_squeeze(squeeze: nn.Module) -> str | None:
    """Why a squeeze-and-excitation branch is not that of `TNT`, or None."""
    generator = torch.Generator().manual_seed(0)
    try:
        twin = clone(squeeze, generator).eval()
        state = twin.state_dict()
        ours = SE(state["fc.0.weight"].numel()).double().eval()
        ours.load_state_dict(state)
    except Exception as error:
        return f"its squeeze-and-excitation is another: {type(error).__name__}: {error}"
    tokens = _random(generator, IMAGES, SENTENCES + 1, state["fc.0.weight"].numel())
    why = _compare(twin, lambda: twin(tokens), lambda: (ours(tokens),))
    return None if why is None else f"its squeeze-and-excitation is another: {why}"


class _StandIn(nn.Module):
    """In place of a block: cheap, and different in every position, so that their order shows.

    The last one leaves nothing but the class token: a model that reads another token does not give a number.
    """

    def __init__(self, index: int, is_last: bool) -> None:
        super().__init__()
        self.index = index
        self.is_last = is_last

    def forward(self, words: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        seen = words.mean((1, 2)).reshape(tokens.shape[0], -1).mean(1)[:, None, None]
        words = torch.sin(words + self.index)
        tokens = torch.cos(tokens + seen + self.index)
        if self.is_last:
            tokens[:, 1:] = torch.nan
        return words, tokens


def prove_model(model: nn.Module, plan: ModelPlan) -> ModelPlan:
    """The plan with what a run of the model around its blocks found against it: nothing, or a refusal."""
    if plan.refused is not None:
        return plan
    names = plan.names
    plan = replace(plan, pixel=prove_pixel_embed(model.get_submodule(names.pixel_embed), plan.pixel))
    generator = torch.Generator().manual_seed(0)
    try:
        blocks = list(model.get_submodule(names.blocks).children())
        stand_ins = {block: _StandIn(index, index == len(blocks) - 1) for index, block in enumerate(blocks)}
        twin = clone(model, generator, stand_ins).eval()
    except Exception as error:
        return replace(plan, refused=f"a copy for a test run cannot be made: {type(error).__name__}: {error}")
    proj: Any = twin.get_submodule(names.pixel_embed)._modules["proj"]
    image = _random(generator, IMAGES, proj.in_channels, *plan.pixel.img_size)

    def found() -> str | None:
        return _compare(
            twin,
            lambda: twin(image.clone()),
            lambda: (fused.head(twin, plan, fused.run_features(twin, plan, image)),),
        )

    why = found()
    if why is not None:
        why = "its forward uses more than the class token" if why == GIVES_NAN else why
        return replace(plan, refused=why)
    return replace(plan, **_in_training(twin, plan, [plan.noise], found))
