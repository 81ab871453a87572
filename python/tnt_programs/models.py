"""Models by name: FastTNT and the reference TNT, or timm's; their preprocessing, heads and weights."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import timm
import timm.models.tnt
from torch import Tensor, nn

import tnt_kernels
from tnt_kernels.models.checkpoint import dialect_of, load_checkpoint, to_authors

# Of the handwritten digits, 8 x 8 pixels on 32 x 32: every pixel is a word, every quarter a sentence.
DIGITS = {
    "img_size": 32,
    "outer_dim": 192,
    "inner_dim": 24,
    "depth": 4,
    "outer_num_heads": 4,
    "inner_num_heads": 4,
}
PREPROCESSING = {
    "input_size": [3, 224, 224],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
}
# Arguments that not every timm model takes. One that has no img_size takes images of any.
OPTIONAL = ("img_size", "drop_path_rate", "attn_drop_rate")


def _digits(model: type[nn.Module], **kwargs: Any) -> nn.Module:
    return model(**{**DIGITS, **kwargs})


# By name: FastTNT's factory and the reference's.
TNTS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
    "tnt_digits": (partial(_digits, tnt_kernels.FastTNT), partial(_digits, tnt_kernels.TNT)),
    "tnt_ti_patch16_224": (tnt_kernels.fast_tnt_ti_patch16_224, tnt_kernels.tnt_ti_patch16_224),
    "tnt_s_patch16_224": (tnt_kernels.fast_tnt_s_patch16_224, tnt_kernels.tnt_s_patch16_224),
    "tnt_b_patch16_224": (tnt_kernels.fast_tnt_b_patch16_224, tnt_kernels.tnt_b_patch16_224),
}


def full_name(name: str) -> str:
    """The name that `build` knows: `fast_` of our own is left out, timm's may lack its size.

    Raises:
        ValueError: there is no such model; the message says which come near.
    """
    own = name.removeprefix("fast_")
    if own in TNTS:
        return own
    timms = name.removeprefix("timm:")
    for candidate in (timms, f"{timms}_224", f"{timms}_patch16_224"):
        if timm.is_model(candidate.partition(".")[0]):
            return f"timm:{candidate}" if candidate in TNTS else candidate
    near = difflib.get_close_matches(timms, [*TNTS, *timm.list_models()], n=5)
    hint = f"; near it: {', '.join(near)}" if near else ""
    raise ValueError(f"--model must be {', '.join(TNTS)} or a model of timm's, got {name!r}{hint}")


def build(
    name: str, arguments: Mapping[str, Any], *, reference: bool = False, pretrained: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """A model with new weights or timm's published ones.

    Args:
        name: from `full_name`. timm's own TNT is "timm:tnt_s_patch16_224" and so on.
        arguments: of its constructor, num_classes among them. Those of `OPTIONAL` that a timm model does not
            take are left out.
        reference: plain PyTorch; otherwise FastTNT, or timm's TNT accelerated.
        pretrained: timm's weights; a head of another number of classes is new.

    Returns:
        The model and the arguments that it was made with.

    Raises:
        ValueError: it does not take one of the arguments, or there are no published weights.
    """
    if name in TNTS:
        fast, plain = TNTS[name]
        try:
            model = (plain if reference else fast)(**arguments)
        except TypeError as error:
            raise ValueError(f"--model-args: {error}") from error
        if pretrained:
            published = _create(name, {}, pretrained=True)[0]
            classes = published.get_classifier().out_features
            load_checkpoint(
                model, published.state_dict(), head=arguments.get("num_classes", classes) == classes
            )
        return model, dict(arguments)
    model, used = _create(name.removeprefix("timm:"), arguments, pretrained=pretrained)
    if isinstance(model, timm.models.tnt.TNT) and not reference:
        tnt_kernels.accelerate(model)
    return model, used


def _create(name: str, arguments: Mapping[str, Any], *, pretrained: bool) -> tuple[Any, dict[str, Any]]:
    used = dict(arguments)
    while True:
        try:
            return timm.create_model(name, pretrained=pretrained, **used), used
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None or unknown[1] not in OPTIONAL or unknown[1] not in used:
                raise ValueError(f"--model-args: {name}: {error}") from error
            del used[unknown[1]]
        except (RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0]
            what = f"--pretrained: no weights of {name}" if pretrained else f"--model {name}"
            raise ValueError(f"{what}: {reason}") from error


def preprocessing_of(name: str, model: nn.Module) -> dict[str, Any]:
    """Size, colours and crop of the images that a model of `build` is made for."""
    if name not in TNTS:
        found = timm.data.resolve_model_data_config(model)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
    embed: Any = model.patch_embed
    whole = {"crop_pct": 1.0} if name == "tnt_digits" else {}
    return {**PREPROCESSING, **whole, "input_size": [3, *embed.img_size]}


def head_of(model: Any) -> list[nn.Module]:
    """The classifier, or several (a distilled DeiT has two)."""
    found = model.get_classifier()
    return list(found) if isinstance(found, (tuple, list, nn.ModuleList)) else [found]


def freeze(model: nn.Module) -> None:
    """Leave nothing but the head to train."""
    model.requires_grad_(False)
    for head in head_of(model):
        head.requires_grad_(True)


def train_mode(model: nn.Module, frozen: bool) -> None:
    """Training mode; of a frozen model, the head alone: the rest neither drops nor gathers statistics."""
    model.train(not frozen)
    if frozen:
        for head in head_of(model):
            head.train()


def is_tnt(model: nn.Module) -> bool:
    try:
        dialect_of(model.state_dict())
    except ValueError:
        return False
    return True


def authors_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The current TNT's weights under the authors' names; any other model's as they are."""
    try:
        return to_authors(state)
    except ValueError:
        return dict(state)


def load_weights(model: nn.Module, state: Mapping[str, Tensor], *, head: bool = True) -> None:
    """Weights into a model, a TNT's from any dialect.

    Args:
        model: from `build`.
        state: state dict.
        head: False leaves the model's own head.

    Raises:
        ValueError: they do not fit; the message says where.
    """
    if is_tnt(model):
        load_checkpoint(model, state, head=head)
        return
    state, own = dict(state), model.state_dict()
    if not head:
        for key in _head_keys(model):
            state[key] = own[key]
    wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
    wrong += [key for key in state if key not in own]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"the checkpoint does not fit a {type(model).__name__}: missing, foreign or of another shape are "
            f"{', '.join(wrong[:5])}{more}"
        )
    model.load_state_dict(state)


def classes_in(model: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """How many classes the head in a state dict tells apart; None where it has no head of this model's."""
    keys = ["head.weight"] if is_tnt(model) else [key for key in _head_keys(model) if key.endswith("weight")]
    return state[keys[0]].shape[0] if keys and keys[0] in state else None


def _head_keys(model: nn.Module) -> list[str]:
    heads = {id(head) for head in head_of(model)}
    names = [name for name, module in model.named_modules() if id(module) in heads]
    return [key for key in model.state_dict() if any(key.startswith(f"{name}.") for name in names)]


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute every block in the backward pass. ValueError for a model that offers no such thing."""
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:
        raise ValueError(f"--checkpoint-activations: {type(model).__name__} cannot do that") from error
