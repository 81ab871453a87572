"""TNT checkpoints: the naming dialects, reading files, loading into a model of another dialect or resolution.

Four dialects are known. "authors" are the names of the authors' code and of `TNT`; "timm" those of timm's
current TNT, the same network; "timm_legacy" timm's names for another network (the convolution sees the
whole image, the words are normalised one by one); "mmpretrain" that other network under mmpretrain's
names, which is recognised only to be refused.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tnt import TNT, VARIANTS

Dialect = Literal["authors", "timm", "timm_legacy", "mmpretrain"]
Model = TypeVar("Model", bound=TNT)

_AUTHORS_TO_TIMM = {
    "outer_pos": "patch_pos",
    "inner_pos": "pixel_pos",
    "patch_embed": "pixel_embed",
    "proj_norm1": "norm1_proj",
    "proj_norm2": "norm2_proj",
}
_AUTHORS_TO_TIMM_IN_BLOCK = {
    "inner_norm1": "norm_in",
    "inner_attn": "attn_in",
    "inner_norm2": "norm_mlp_in",
    "inner_mlp": "mlp_in",
    "proj_norm1": "norm1_proj",
    "proj_norm2": "norm2_proj",
    "outer_norm1": "norm_out",
    "outer_attn": "attn_out",
    "outer_norm2": "norm_mlp",
    "outer_mlp": "mlp",
}
_TIMM_TO_AUTHORS = {timm: authors for authors, timm in _AUTHORS_TO_TIMM.items()}
_TIMM_TO_AUTHORS_IN_BLOCK = {timm: authors for authors, timm in _AUTHORS_TO_TIMM_IN_BLOCK.items()}

_WEIGHTS = ("state_dict", "model", "module")
_EMA_WEIGHTS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
_CONSTRUCTOR_DEFAULTS = {"outer_dim": 768, "inner_dim": 48, "outer_num_heads": 12, "inner_num_heads": 4}
_NETWORK = {
    "authors": "the current TNT",
    "timm": "the current TNT",
    "timm_legacy": "timm's legacy TNT",
    "mmpretrain": "mmpretrain's TNT (timm's legacy TNT under other names)",
}


def read_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, Any], *, use_ema: bool = True
) -> dict[str, Tensor]:
    """The state dict of a checkpoint, in its own dialect and without the prefixes of DDP and torch.compile.

    Args:
        source: a file (`.safetensors`, or what torch.save wrote: `.pth`, `.pth.tar`, ...), or its contents.
            Files are read with weights_only=True. A state dict under a key such as "state_dict", "model" or
            "state_dict_ema" is found.
        use_ema: of a checkpoint that holds both, take the averaged weights.

    Raises:
        ValueError: there is no state dict in it, or the file is damaged or holds code to run.
        ImportError: a `.safetensors` file without the safetensors package.
    """
    content: Any = source if isinstance(source, Mapping) else _read_file(os.fspath(source))
    names = (*_EMA_WEIGHTS, *_WEIGHTS) if use_ema else (*_WEIGHTS, *_EMA_WEIGHTS)
    while isinstance(content, Mapping):
        inner = next((content[name] for name in names if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"no state dict in the checkpoint: it holds {_describe(content)}")
    foreign = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if foreign:
        raise ValueError(f"no state dict in the checkpoint: {_listed(foreign, 'entry', 'entries')} no tensor")
    return _without_prefixes(dict(content))


def _read_file(path: str) -> Any:
    if path.endswith(".safetensors"):
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"reading {path!r} needs safetensors: pip install safetensors") from error
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path!r} is damaged or not a checkpoint: {error}") from error
    with open(path, "rb") as file:
        try:
            # Training scripts save their parsed arguments beside the weights; the class holds plain values.
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # what a damaged file raises depends on where it is damaged
            foreign = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
            if foreign:
                raise ValueError(
                    f"{path!r} holds more than weights: {foreign[1]}; save its state dict alone"
                ) from error
            raise ValueError(f"{path!r} is damaged or not a checkpoint") from error


def _describe(content: Any) -> str:
    return "an empty dict" if isinstance(content, Mapping) else f"a {type(content).__name__}"


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _WRAPPER_PREFIXES:
        if all(key.startswith(prefix) for key in state):
            return _without_prefixes({key[len(prefix) :]: value for key, value in state.items()})
    return state


def dialect_of(state: Mapping[str, Tensor]) -> Dialect:
    """Which dialect a state dict is in. Raises ValueError if it is of no known TNT."""
    if "outer_pos" in state or any(".inner_attn." in key or ".outer_attn." in key for key in state):
        return "authors"
    if "patch_pos" in state or any(".attn_in." in key or ".attn_out." in key for key in state):
        return "timm_legacy" if _is_legacy(state) else "timm"
    if any(re.match(r"(backbone\.)?layers\.\d+\.(inner|outer)_block\.", key) for key in state):
        return "mmpretrain"
    raise ValueError(f"not a TNT checkpoint of a known dialect: {_listed(state, 'key', 'keys')}")


def _is_legacy(state: Mapping[str, Tensor]) -> bool:
    norm, width, stem = (
        state[key].shape[0] if key in state else None
        for key in ("blocks.0.norm1_proj.weight", "pixel_embed.proj.weight", "norm1_proj.weight")
    )
    if norm is not None and width is not None and stem is not None and width != stem:
        return norm == width
    # One word per sentence: both networks normalise as many values. Only the legacy projection has a bias.
    return "blocks.0.proj.bias" in state


def to_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the current network ("authors" or "timm") in the authors' names.

    The authors' unused `outer_tokens`, which timm's lack, are zeros. Keys of neither dialect stay as they
    are. Raises ValueError for the legacy network.
    """
    if _require_current(state) == "authors":
        return dict(state)
    out = _renamed(state, _TIMM_TO_AUTHORS, _TIMM_TO_AUTHORS_IN_BLOCK)
    inner_pos, outer_pos = out.get("inner_pos"), out.get("outer_pos")
    if inner_pos is not None and inner_pos.ndim == 4:
        out["inner_pos"] = inner_pos.flatten(2).transpose(1, 2).contiguous()
    if outer_pos is not None and outer_pos.ndim == 3:
        out["outer_tokens"] = torch.zeros_like(outer_pos[:, 1:])
    return out


def to_timm(state: Mapping[str, Tensor], *, words_grid: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """A state dict of the current network ("authors" or "timm") in timm's names.

    `words_grid` is rows and columns of words in a sentence; None: as many rows as columns. The authors'
    unused `outer_tokens` are left out. Raises ValueError for the legacy network, for squeeze-and-excitation,
    which timm's TNT has not, and where the words form no square and `words_grid` is not given.
    """
    if _require_current(state) == "timm":
        return dict(state)
    se = [key for key in state if ".se_layer." in key]
    if se:
        raise ValueError(f"timm's TNT has no squeeze-and-excitation: {_listed(se, 'key', 'keys')}")
    out = _renamed(state, _AUTHORS_TO_TIMM, _AUTHORS_TO_TIMM_IN_BLOCK)
    out.pop("outer_tokens", None)
    pixel_pos = out.get("pixel_pos")
    if pixel_pos is not None and pixel_pos.ndim == 3:
        grid = _grid_of("words_grid", pixel_pos.shape[1], words_grid)
        out["pixel_pos"] = pixel_pos.transpose(1, 2).unflatten(2, grid).contiguous()
    return out


def _require_current(state: Mapping[str, Tensor]) -> Dialect:
    dialect = dialect_of(state)
    if dialect not in ("authors", "timm"):
        raise ValueError(f"the state dict is of {_NETWORK[dialect]}, another network than the current TNT")
    return dialect


def _renamed(
    state: Mapping[str, Tensor], top: Mapping[str, str], in_block: Mapping[str, str]
) -> dict[str, Tensor]:
    out = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "blocks" and len(parts) > 2:
            parts[2] = in_block.get(parts[2], parts[2])
        else:
            parts[0] = top.get(parts[0], parts[0])
        out[".".join(parts)] = value
    return out


def _grid_of(name: str, count: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    side = math.isqrt(count)
    if grid is None:
        if side * side != count:
            raise ValueError(f"{name} must be given: {count} positions form no square")
        return side, side
    if grid[0] * grid[1] != count:
        raise ValueError(f"{name} must hold {count} positions, got {tuple(grid)}")
    return grid


def resize_outer_pos(
    outer_pos: Tensor, grid: tuple[int, int], *, source_grid: tuple[int, int] | None = None
) -> Tensor:
    """Positions of the sentences for another resolution: bicubic on their grid, antialiased as timm's are.

    Args:
        outer_pos: [1, n + 1, d], the class token's position first, which is kept.
        grid: rows and columns of sentences wanted.
        source_grid: rows and columns of sentences that `outer_pos` is of; None: as many rows as columns.

    Returns:
        [1, grid[0] * grid[1] + 1, d], in the dtype of `outer_pos`.
    """
    if outer_pos.ndim != 3 or outer_pos.shape[0] != 1:
        raise ValueError(f"outer_pos must have the shape [1, n + 1, d], got {list(outer_pos.shape)}")
    rows, columns = _grid_of("source_grid", outer_pos.shape[1] - 1, source_grid)
    if (rows, columns) == tuple(grid):
        return outer_pos
    image = outer_pos[:, 1:].transpose(1, 2).unflatten(2, (rows, columns))
    if image.dtype not in (torch.float32, torch.float64):
        image = image.float()
    image = F.interpolate(image, size=tuple(grid), mode="bicubic", antialias=True)
    return torch.cat([outer_pos[:, :1], image.flatten(2).transpose(1, 2).to(outer_pos.dtype)], dim=1)


def infer_arguments(
    state: Mapping[str, Tensor], *, source_grid: tuple[int, int] | None = None, **given: Any
) -> dict[str, Any]:
    """Constructor arguments of the `TNT` whose state dict this is ("authors" or "timm").

    Shapes tell the widths, depth, classes, channels, biases, MLP ratio and SE. They do not tell the heads,
    which are known for the published widths alone, nor the sizes in pixels: patch_size and inner_stride
    are the constructor's defaults where these give the right number of words, and the image has
    `source_grid` rows and columns of sentences (None: as many rows as columns). What is in `given` is
    taken as it is; what can be neither inferred nor found there raises ValueError.
    """
    state = to_authors(state)
    conv = _shape(state, "patch_embed.proj.weight", 4)
    outer_dim = _shape(state, "cls_token", 3)[2]
    inner_dim = conv[0]
    blocks = {int(key.split(".")[1]) for key in state if re.match(r"blocks\.\d+\.", key)}
    arguments: dict[str, Any] = {
        "in_chans": conv[1],
        "num_classes": _shape(state, "head.weight", 2)[0] if "head.weight" in state else 0,
        "outer_dim": outer_dim,
        "inner_dim": inner_dim,
        "depth": max(blocks) + 1 if blocks else 0,
        "qkv_bias": "blocks.0.outer_attn.qk.bias" in state,
        "se": int("blocks.0.se_layer.fc.0.weight" in state),
    }
    if blocks and "mlp_ratio" not in given:
        arguments["mlp_ratio"] = _mlp_ratio(state, inner_dim, outer_dim)
    arguments.update(_heads(outer_dim, inner_dim, given))
    arguments.update(_pixels(state, source_grid, given))
    return {**arguments, **given}


def _shape(state: Mapping[str, Tensor], key: str, ndim: int) -> tuple[int, ...]:
    if key not in state:
        raise ValueError(f"the checkpoint has no {key}")
    shape = tuple(state[key].shape)
    if len(shape) != ndim:
        raise ValueError(f"{key} must have {ndim} dimensions, got the shape {list(shape)}")
    return shape


def _mlp_ratio(state: Mapping[str, Tensor], inner_dim: int, outer_dim: int) -> float:
    inner = _shape(state, "blocks.0.inner_mlp.fc1.weight", 2)[0]
    outer = _shape(state, "blocks.0.outer_mlp.fc1.weight", 2)[0]
    lowest = max(inner / inner_dim, outer / outer_dim)
    for ratio in (lowest, math.nextafter(lowest, math.inf)):
        if int(inner_dim * ratio) == inner and int(outer_dim * ratio) == outer:
            return ratio
    raise ValueError(
        f"no mlp_ratio gives the hidden widths {inner} (inner, width {inner_dim}) and {outer} "
        f"(outer, width {outer_dim})"
    )


def _heads(outer_dim: int, inner_dim: int, given: Mapping[str, Any]) -> dict[str, int]:
    if "outer_num_heads" in given and "inner_num_heads" in given:
        return {}
    for variant in (*VARIANTS.values(), _CONSTRUCTOR_DEFAULTS):
        if (variant["outer_dim"], variant["inner_dim"]) == (outer_dim, inner_dim):
            return {name: variant[name] for name in ("outer_num_heads", "inner_num_heads")}
    raise ValueError(
        f"outer_num_heads and inner_num_heads must be given: no shape tells them, and outer_dim={outer_dim}, "
        f"inner_dim={inner_dim} are not a published size"
    )


def _pixels(
    state: Mapping[str, Tensor], source_grid: tuple[int, int] | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    words = _shape(state, "inner_pos", 3)[1]
    sizes: dict[str, Any] = {
        "patch_size": given.get("patch_size", 16),
        "inner_stride": given.get("inner_stride", 4),
    }
    patch_size, stride = sizes["patch_size"], sizes["inner_stride"]
    height, width = patch_size if isinstance(patch_size, (tuple, list)) else (patch_size, patch_size)
    if math.ceil(height / stride) * math.ceil(width / stride) != words:
        raise ValueError(
            f"patch_size and inner_stride must give the checkpoint's {words} words per sentence, "
            f"got patch_size={patch_size}, inner_stride={stride}"
        )
    if "img_size" not in given:
        rows, columns = _grid_of("source_grid", _shape(state, "outer_pos", 3)[1] - 1, source_grid)
        sizes["img_size"] = (rows * height, columns * width)
    return sizes


def load_checkpoint(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    head: bool = True,
    source_grid: tuple[int, int] | None = None,
    use_ema: bool = True,
) -> None:
    """Load a checkpoint into a TNT: ours, the authors' class or timm's, whichever of their dialects it is in.

    The positions of the sentences are resized if the model is for another resolution. Every other parameter
    must be there with the right shape, and nothing else; the model is not touched otherwise.

    Args:
        model: what to load into; its state dict tells its dialect.
        source, use_ema: see `read_checkpoint`.
        head: False leaves the model's head as it is, whatever the checkpoint has there.
        source_grid: rows and columns of sentences of the checkpoint; None: as many rows as columns.

    Raises:
        ValueError: the checkpoint is of the other network (legacy against current), or keys are missing,
            foreign or of another shape; the message names and counts them.
    """
    target = model.state_dict()
    state = _in_dialect_of(target, read_checkpoint(source, use_ema=use_ema))
    if not head:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
        state.update({key: value for key, value in target.items() if key.startswith("head.")})
    _resize_for(model, target, state, source_grid)
    problems = _differences(target, state)
    if problems:
        raise ValueError(f"the checkpoint does not fit the model: {'; '.join(problems)}")
    model.load_state_dict(state)


def from_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, Any],
    model_class: type[Model] = TNT,  # type: ignore[assignment]
    *,
    source_grid: tuple[int, int] | None = None,
    use_ema: bool = True,
    **arguments: Any,
) -> Model:
    """A model with a checkpoint's weights, its constructor arguments inferred from their shapes.

    Args:
        source, use_ema: see `read_checkpoint`.
        model_class: `TNT` or a class with its constructor.
        source_grid: see `load_checkpoint`.
        arguments: constructor arguments that take precedence, such as another img_size, or a num_classes that
            differs from the checkpoint's: the model then keeps its newly initialised head.

    Raises:
        ValueError: see `infer_arguments` and `load_checkpoint`.
    """
    state = to_authors(read_checkpoint(source, use_ema=use_ema))
    inferred = infer_arguments(state, source_grid=source_grid, **arguments)
    classes = state["head.weight"].shape[0] if "head.weight" in state else 0
    model = model_class(**inferred)
    load_checkpoint(model, state, head=inferred["num_classes"] == classes, source_grid=source_grid)
    return model


def _in_dialect_of(target: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` under the names of the model whose state dict is `target`."""
    try:
        wanted = dialect_of(target)
    except ValueError as error:
        raise ValueError("model must be a TNT: the authors' (such as ours) or timm's") from error
    given = dialect_of(state)
    if wanted == given == "timm_legacy":
        return dict(state)
    if "timm_legacy" in (wanted, given) or "mmpretrain" in (wanted, given):
        raise ValueError(f"the checkpoint is of {_NETWORK[given]}, the model is {_NETWORK[wanted]}")
    if wanted == "timm":
        rows, columns = target["pixel_pos"].shape[2:]
        inner_pos = state.get("inner_pos")
        if inner_pos is not None and inner_pos.ndim == 3 and inner_pos.shape[1] != rows * columns:
            words = inner_pos.shape[1]
            raise ValueError(
                f"the checkpoint has {words} words per sentence, the model {rows} x {columns}: "
                "build it with the checkpoint's patch_size and stride"
            )
        return to_timm(state, words_grid=(rows, columns))
    out = to_authors(state)
    # Nothing reads outer_tokens: a checkpoint without them, or of another resolution, fits all the same.
    unused = target.get("outer_tokens")
    if unused is not None and ("outer_tokens" not in out or out["outer_tokens"].shape != unused.shape):
        out["outer_tokens"] = unused
    return out


def _resize_for(
    model: nn.Module,
    target: Mapping[str, Tensor],
    state: dict[str, Tensor],
    source_grid: tuple[int, int] | None,
) -> None:
    key = "outer_pos" if "outer_pos" in target else "patch_pos"
    if key not in state or state[key].ndim != 3:
        return
    if state[key].shape[1] != target[key].shape[1] or source_grid is not None:
        state[key] = resize_outer_pos(state[key], _sentence_grid(model), source_grid=source_grid)


def _sentence_grid(model: nn.Module) -> tuple[int, int]:
    embed: Any = model.patch_embed if hasattr(model, "patch_embed") else model.pixel_embed
    (height, width), (patch_height, patch_width) = embed.img_size, embed.patch_size
    return height // patch_height, width // patch_width


def _differences(target: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    problems = []
    missing = [key for key in target if key not in state]
    foreign = [key for key in state if key not in target]
    if missing:
        problems.append(f"{_listed(missing, 'key', 'keys')} missing")
    if foreign:
        hint = "; head=False leaves its head out" if "head.weight" in foreign else ""
        problems.append(f"{_listed(foreign, 'key', 'keys')} foreign{hint}")
    shapes = {
        key: (list(state[key].shape), list(value.shape))
        for key, value in target.items()
        if key in state and state[key].shape != value.shape
    }
    if "head.weight" in shapes:
        theirs, ours = (shape[0] for shape in shapes["head.weight"])
        if theirs != ours:
            problems.append(
                f"it has {theirs} classes, the model {ours} (num_classes={theirs} makes a model that fits, "
                "head=False keeps the model's head)"
            )
            shapes = {key: value for key, value in shapes.items() if not key.startswith("head.")}
    if shapes:
        texts = [f"{key} {theirs}, the model's {ours}" for key, (theirs, ours) in shapes.items()]
        problems.append(f"another shape of {_listed(texts, 'tensor', 'tensors')}")
    return problems


def _listed(names: Iterable[str], one: str, many: str, limit: int = 8) -> str:
    """'2 keys (a, b)', cut after `limit` names."""
    names = list(names)
    shown = ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
    return f"{len(names)} {one if len(names) == 1 else many} ({shown})"
