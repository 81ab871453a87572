"""Training through the fused operations: the gradients, draws, losses and memory of the model as it was."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import golden_cases
import pytest
import torch
import torch.nn.functional as F
from model_cases import (
    AUTHORS,
    TIMM,
    USERS_MODELS,
    assert_near,
    images,
    make,
    randomize,
    without_inner_dropout,
)
from oracle import ERROR_FLOOR, ERROR_RATIO, arguments, assert_as_accurate
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from user_models import huawei_style

from tnt_kernels import TNT, FastTNT, accelerate, dispatch, ops, restore, use_backend
from tnt_kernels._timm import import_timm
from tnt_kernels.models import fused
from tnt_kernels.models.explain import explain
from tnt_kernels.models.tnt import DropPath

pytestmark = pytest.mark.usefixtures("needs_native")

KINDS = ("fast", *USERS_MODELS)

# Every noise that a model can train with. Attention dropout in timm's and the authors' code works in place,
# on the softmax that autograd keeps: outside of fused operations it fails in the backward pass.
NOISE = {
    "fast": {"drop_rate": 0.2, "attn_drop_rate": 0.1, "drop_path_rate": 0.3},
    "timm": {"proj_drop_rate": 0.2, "pos_drop_rate": 0.3, "drop_rate": 0.4, "drop_path_rate": 0.3},
    "authors": {"drop_rate": 0.2, "drop_path_rate": 0.3},
}
NOISE["timm_legacy"] = NOISE["timm"]


def pair(kind: str, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """A model as it was and its fused twin, of the same weights, in training mode."""
    if kind == "fast":
        reference = randomize(TNT(**{**AUTHORS, **kwargs}))
        return reference.train(), FastTNT.from_reference(reference).train()
    return make(kind, **kwargs).train(), accelerate(make(kind, **kwargs)).train()


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    logits = model(x)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, torch.arange(len(x)) % logits.shape[1])


def gradients(model: nn.Module, x: Tensor, *, seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    """Gradients of the loss by the image and by every parameter that has one."""
    model.zero_grad()
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    (loss_of(model, x) * scale).backward()
    found = {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}
    return {"image": x.grad / scale, **found}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).abs().max()
        assert error <= 2e-5 * max(gradient.abs().max().item(), 1e-6), (name, error)


def saved_bytes(run: Callable[[], Tensor], apart: set[int]) -> int:
    """Bytes of the tensors that autograd keeps for backward, but for storages at these addresses."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(kept.values())


@pytest.mark.parametrize("kind", KINDS)
def test_what_runs(kind: str, counted: dict[str, int]) -> None:
    """In training everything is fused, and the last block computes its class token alone."""
    _, model = pair(kind, drop_path_rate=0.0 if kind == "authors" else 0.3)
    counted.clear()
    with use_backend("cpu"):
        loss_of(model, images()).backward()
    assert counted == {
        "pixel_embed": 1,
        "inner_block": 3,
        "word_to_sentence": 4,
        "outer_block": 2,
        "class_token_block": 1,
    }
    assert all(part.fused for part in explain(model).parts)


def test_an_operation_without_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TRAINABLE", dispatch.TRAINABLE - {"outer_block"})
    _, model = pair("fast")
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"outer_block: .* a gradient is needed"):
        model(images())
    assert "a gradient is needed" in {p.part: p.why for p in explain(model).parts}["outer half"]


@pytest.mark.parametrize("name", [*golden_cases.TNT_CASES, *golden_cases.TIMM_CASES])
def test_golden_gradients(name: str) -> None:
    golden = golden_cases.load(name)
    if name in golden_cases.TIMM_CASES:
        model = accelerate(import_timm().models.tnt.TNT(**golden.kwargs))
    else:
        model = FastTNT(**golden.kwargs)
    model.load_state_dict(golden.weights)
    model.train()
    x = golden.input.float().requires_grad_()
    F.cross_entropy(model(x), golden.target).backward()
    assert_near(x.grad, golden.grad_input.float())
    for key, gradient in golden.grads.items():
        assert_near(model.get_parameter(key).grad, gradient.float())


PRECISIONS = {
    "float32": (torch.float32, None),
    "autocast_bfloat16": (torch.float32, torch.bfloat16),
    "autocast_float16": (torch.float32, torch.float16),
    "bfloat16": (torch.bfloat16, None),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["fast", "timm"])
def test_as_accurate_as_eager(kind: str, precision: str) -> None:
    """Every gradient against float64: the error is at most 1.5 times that of the model as it was.

    So is the largest error of all, each gradient in units of its largest value, and the mean one of every
    module. The largest error of a single module is luck: rounding in the last layers shifts all of it.
    """
    dtype, autocast = PRECISIONS[precision]
    scale = 2.0**12 if autocast == torch.float16 else 1.0  # as GradScaler has it
    reference, model = (module.to(dtype) for module in pair(kind, qkv_bias=True, depth=2))
    exact_model = copy.deepcopy(reference).double()
    modules: dict[str, list[Tensor]] = defaultdict(list)  # ours, eager's and exact values [3, n]
    for seed in range(4):
        x = images(4, seed=seed).to(dtype)
        exact = gradients(exact_model, x.double())
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            ours, eager = gradients(model, x, scale=scale), gradients(reference, x, scale=scale)
        assert ours.keys() == eager.keys() == exact.keys()
        for name, gradient in exact.items():
            module = re.sub(r"\.\d+|\.?(weight|bias)$", "", name)
            values = torch.stack([g[name].double().flatten() for g in (ours, eager, exact)])
            modules[module].append(values / gradient.abs().max())
    for module, found in modules.items():
        ours, eager, exact = torch.cat(found, dim=1)
        mine, theirs = ((value - exact).square().mean().sqrt() for value in (ours, eager))
        assert mine <= ERROR_RATIO * theirs + ERROR_FLOOR, module
    assert_as_accurate(*torch.cat([torch.cat(found, dim=1) for found in modules.values()], dim=1))


def test_grad_scaler() -> None:
    """float16 autocast with GradScaler: the steps of the reference, an overflow skipped."""
    losses = []
    for model in pair("fast"):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        found = []
        for _ in range(20):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_of(model, images(4))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            found.append(loss.item())
        assert scaler.get_scale() < 2.0**22
        losses.append(found)
    theirs, ours = map(torch.tensor, losses)
    assert ours[-1] < 0.7 * ours[0]
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", ["fast", "timm"])
def test_trains_as_the_reference(kind: str) -> None:
    """Fifty steps of AdamW with drop path, from one seed: the losses of the model as it was."""
    losses = []
    for model in pair(kind, depth=2, drop_path_rate=0.3):
        torch.manual_seed(5)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
        found = []
        for seed in range(50):
            loss = loss_of(model, images(4, seed=seed))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    theirs, ours = map(torch.tensor, losses)
    assert ours.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_noise_outside_of_the_inner_halves(kind: str) -> None:
    """Drop path and every dropout but the inner halves': from one seed, the draws of the model as it was."""
    reference, model = map(without_inner_dropout, pair(kind, **NOISE[kind]))
    assert_same_gradients(gradients(model, images(4)), gradients(reference, images(4)))
    quiet = gradients(pair(kind)[0], images(4))
    assert not torch.allclose(quiet["image"], gradients(model, images(4))["image"], rtol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_every_noise(kind: str) -> None:
    """torch's seed fixes all draws, and another gives others."""
    _, model = pair(kind, **NOISE[kind])
    once, again, other = (gradients(model, images(4), seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not any(torch.equal(once[name], other[name]) for name in once if "qk.bias" not in name)


INNER_DROPOUTS = [
    *(("fast", name) for name in ("inner_attn.attn_drop", "inner_attn.proj_drop", "inner_mlp.drop")),
    *(("timm", name) for name in ("attn_in.attn_drop", "attn_in.proj_drop", "mlp_in.drop1", "mlp_in.drop2")),
]


@pytest.mark.parametrize(("kind", "name"), INNER_DROPOUTS)
def test_inner_dropout(kind: str, name: str, counted: dict[str, int]) -> None:
    """Dropout inside the fused inner half: means and variances are those of the module's."""
    samples = 400
    words, tokens = torch.randn(1, 6, 16, 24), torch.randn(1, 7, 96)
    words = words.expand(samples, -1, -1, -1).reshape(samples * 6, 16, 24)
    found = []
    for model in pair(kind):
        block = model.blocks[1]
        block.get_submodule(name).p = 0.3
        counted.clear()
        with torch.no_grad():
            found.append(block(words, tokens.expand(samples, -1, -1).clone())[0].unflatten(0, (samples, 6)))
    assert counted == {"inner_block": 1, "word_to_sentence": 1, "outer_block": 1}
    theirs, ours = found
    variances = theirs.var(0), ours.var(0)
    spread = ((variances[0] + variances[1]) / samples).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() <= 5 * spread + 1e-5).all()
    assert 0.97 < (variances[1].sum() / variances[0].sum()) < 1.03
    assert not torch.equal(ours[0], ours[1])


def test_inner_dropout_is_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block has a seed of its own in every call, and the rates of the moment."""
    _, model = pair("timm", proj_drop_rate=0.2, attn_drop_rate=0.1, depth=2)
    model.blocks[1].mlp_in.drop2.p = 0.4
    seen: list[dict[str, Any]] = []
    own = fused.ops.inner_block
    monkeypatch.setattr(fused.ops, "inner_block", lambda *args, **kw: seen.append(kw) or own(*args, **kw))
    with torch.no_grad():
        model(images()), model(images())
        model.eval()(images())
    seeds = {int(options.pop("seed")) for options in seen[:4]}
    assert len(seeds) == 4
    rates = [{key: value for key, value in options.items() if key.endswith("_drop")} for options in seen]
    first = {"attn_drop": 0.1, "proj_drop": 0.2, "hidden_drop": 0.2, "out_drop": 0.2}
    assert rates == [first, {**first, "out_drop": 0.4}] * 2 + [{}, {}]


def test_inner_dropout_of_another_kind(counted: dict[str, int]) -> None:
    """Dropout that is not where TNT has it is left to the user's modules."""

    class DropsFirst(huawei_style.Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.drop(self.act(self.fc1(self.drop(x)))))

    def model() -> Any:
        made = make("authors", drop_rate=0.2)
        for block in made.blocks:
            block.inner_mlp.__class__ = DropsFirst
        return made.train()

    reference, ours = model(), accelerate(model())
    counted.clear()
    assert_same_gradients(gradients(ours, images(4)), gradients(reference, images(4)))
    assert "inner_block" not in counted
    whys = {part.part: part.why for part in explain(ours).parts if part.module == "blocks.1"}
    assert whys["inner half"] == "inner_attn.proj_drop is active (p=0.2)"
    ours.eval()
    with torch.no_grad():
        assert all(part.fused for part in explain(ours).parts)


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_draws_in_lower_precision(precision: str) -> None:
    """Whatever dtype eager draws in, the same branches fall."""
    reference, model = pair("timm", drop_path_rate=0.5)
    x = images(16)
    if precision == "bfloat16":
        reference, model, x = reference.bfloat16(), model.bfloat16(), x.bfloat16()
    outs = []
    for module in (reference, model):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            outs.append(module(x).float())
    theirs, ours = outs
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()
    assert torch.equal(torch.get_rng_state(), _state_after(reference, x, precision))


def _state_after(model: nn.Module, x: Tensor, precision: str) -> Tensor:
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        model(x)
    return torch.get_rng_state()


@pytest.fixture
def factors(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Tensor]]:
    """The factors of drop path that every fused operation got."""
    found: dict[str, list[Tensor]] = defaultdict(list)

    def record(owner: Any, name: str) -> None:
        own = getattr(owner, name)

        def recording(*args: Any, **kwargs: Any) -> Any:
            found[name].extend(kwargs[key] for key in ("drop_path1", "drop_path2") if key in kwargs)
            return own(*args, **kwargs)

        monkeypatch.setattr(owner, name, recording)

    record(fused.ops, "inner_block")
    record(fused.outer, "outer_block")
    record(fused, "class_token_block")
    return found


def test_drop_path_statistics(factors: dict[str, list[Tensor]]) -> None:
    """One draw for each sentence in the inner half, one for each image in the outer, no two alike."""
    _, model = pair("fast", depth=3, drop_path_rate=0.4)
    factors.clear()
    batch, n = 64, 6
    with torch.no_grad():
        model(images(batch))
    rates = (0.2, 0.4)
    assert [f.shape for f in factors["inner_block"]] == [(batch * n,)] * 4
    assert [f.shape for f in (*factors["outer_block"], *factors["class_token_block"])] == [(batch,)] * 4
    assert all(f.dtype == torch.float32 for found in factors.values() for f in found)
    for rate, inner, outer in zip(
        rates,
        (factors["inner_block"][:2], factors["inner_block"][2:]),
        (factors["outer_block"], factors["class_token_block"]),
        strict=True,
    ):
        for first, second in (inner, outer):
            assert not torch.equal(first, second)
            for factor in (first, second):
                dropped = factor == 0
                assert_near(factor[~dropped], torch.full_like(factor[~dropped], 1 / (1 - rate)))
                spread = (rate * (1 - rate) / len(factor)) ** 0.5
                assert abs(dropped.float().mean().item() - rate) < 4 * spread


def test_drop_path_switches(factors: dict[str, list[Tensor]]) -> None:
    """Rates and switches are read in every call, and so are the modes of the modules."""
    reference, model = pair("timm", drop_path_rate=0.2)
    x = images(4)

    def same() -> int:
        factors.clear()
        with torch.no_grad():
            torch.manual_seed(2)
            expected = reference(x)
            torch.manual_seed(2)
            assert_near(model(x), expected)
        return len(factors["inner_block"])

    assert same() == 4  # none in the first block, whose rate is 0
    for module in (reference, model):
        module.blocks[1].drop_path.scale_by_keep = False
        module.blocks[2].drop_path.drop_prob = 1.0
    assert same() == 4
    for module in (reference, model):
        module.blocks[1].drop_path.drop_prob = 0.0
    assert same() == 2
    for module in (reference, model):
        module.eval()
        module.blocks[1].drop_path.drop_prob = 0.5
        module.blocks[1].drop_path.train()
    assert same() == 2
    for module in (reference, model):
        module.blocks[1].drop_path.eval()
    assert same() == 0


def test_unknown_drop_path(counted: dict[str, int]) -> None:
    """A DropPath that is neither timm's nor ours is called itself, in halves that run as written."""
    reference, model = pair("authors", drop_path_rate=0.3)
    counted.clear()
    assert_same_gradients(gradients(model, images(4)), gradients(reference, images(4)))
    assert counted["inner_block"] == 1  # the first block has none
    assert counted["word_to_sentence"] == 4
    whys = {part.part: part.why for part in explain(model).parts if part.module == "blocks.1"}
    assert whys == {
        "inner half": "drop_path is active (drop_prob=0.15)",
        "projection": "",
        "outer half": "drop_path is active (drop_prob=0.15)",
    }


def test_timms_drop_path_in_the_authors_code(counted: dict[str, int]) -> None:
    drop_path = import_timm().layers.DropPath

    def with_timms() -> Any:
        model = make("authors")
        for block in model.blocks:
            block.drop_path = drop_path(0.3)
        return model.train()

    reference, model = with_timms(), accelerate(with_timms())
    counted.clear()
    assert_same_gradients(gradients(model, images(4)), gradients(reference, images(4)))
    assert counted["inner_block"] == 3
    assert counted["class_token_block"] == 1


@pytest.mark.parametrize("name", ["attn_out.proj_drop", "mlp.drop1", "mlp.drop2"])
def test_dropout_in_the_outer_half(name: str) -> None:
    """That half alone runs as written, from the moment on that its rate is above 0."""
    reference, model = pair("timm", drop_path_rate=0.3)
    for module in (reference, model):
        module.blocks[1].get_submodule(name).p = 0.4
    assert_same_gradients(gradients(model, images(4)), gradients(reference, images(4)))
    parts = {part.part: part for part in explain(model).parts if part.module == "blocks.1"}
    for part, report in parts.items():
        assert report.why == (f"{name} is active (p=0.4)" if part == "outer half" else "")
    for module in (reference, model):
        module.blocks[1].get_submodule(name).p = 0.0
    assert all(part.fused for part in explain(model).parts)


def test_position_and_head_dropout(counted: dict[str, int]) -> None:
    reference, model = pair("timm", pos_drop_rate=0.3, drop_rate=0.4)
    counted.clear()
    assert_same_gradients(gradients(model, images(4)), gradients(reference, images(4)))
    assert counted["word_to_sentence"] == 4
    assert counted["class_token_block"] == 1


class DropsOnce(huawei_style.Block):
    """Draws one drop path more than a TNT's block does."""

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        x, z = super().forward(x, z)
        return x, self.drop_path(z)


class DropsTheHead(huawei_style.TNT):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.head_drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.head_drop(self.forward_features(x)))


class Auxiliary(huawei_style.TNT):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return 2 * out if self.training else out


def test_noise_of_another_kind() -> None:
    """What a test run finds to be drawn or used otherwise runs as written while it acts."""
    drop_path = import_timm().layers.DropPath

    def model(kind: str) -> Any:
        if kind == "block":
            made = make("authors", block_class=DropsOnce)
            for block in made.blocks:
                block.drop_path = drop_path(0.3)
            return made.train()
        own = {"head": DropsTheHead, "model": Auxiliary}[kind]
        return randomize(own(**AUTHORS)).train()

    whys = {
        "block": ("blocks.1", "drop_path is active (drop_prob=0.3)"),
        "head": ("", "head_drop is active (p=0.5)"),
        "model": ("", "in training mode it computes something else than a TNT"),
    }
    for kind, (module, why) in whys.items():
        reference, ours = model(kind), accelerate(model(kind))
        assert why in {part.why for part in explain(ours).parts if part.module == module}
        assert_same_gradients(gradients(ours, images(4)), gradients(reference, images(4)))
        reference.eval(), ours.eval()
        with torch.no_grad():
            assert all(part.fused for part in explain(ours).parts)
            assert_near(ours(images()), reference(images()))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_that_had_a_gradient_has_one(kind: str) -> None:
    """Zeros where eager has them, as DistributedDataParallel wants it."""
    reference, model = pair(kind, qkv_bias=True)
    ours, theirs = gradients(model, images()), gradients(reference, images())
    assert ours.keys() == theirs.keys()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == ours.keys() - {"image"}
    bias = next(name for name in names if re.search(r"blocks\.2\.(attn_out|outer_attn)\.qk\.bias", name))
    keys = ours[bias].chunk(2)[1]
    assert theirs[bias].chunk(2)[1].abs().max() < 1e-6 * theirs[bias].abs().max()
    assert not keys.any()


CHECKPOINTS = ("reentrant", "non-reentrant", "set_grad_checkpointing")


@pytest.mark.parametrize("how", CHECKPOINTS)
@pytest.mark.parametrize("kind", ["fast", "timm"])
def test_activation_checkpointing(kind: str, how: str) -> None:
    """The second run draws what the first did: the gradients are those without checkpoints."""
    _, model = pair(kind, **NOISE[kind])
    _, quiet = pair(kind, drop_path_rate=0.3)  # everything fused
    for module in (model, quiet):
        plain = gradients(module, images(4))
        if how == "set_grad_checkpointing":
            module.set_grad_checkpointing()
            assert_same_gradients(gradients(module, images(4)), plain)
            module.set_grad_checkpointing(False)
        else:
            for block in module.blocks:
                _checkpoint(block, how == "reentrant")
            assert_same_gradients(gradients(module, images(4)), plain)


def _checkpoint(block: nn.Module, reentrant: bool) -> None:
    """Replace a block's forward, as a user's wrapper does."""
    own = block.forward
    block.forward = lambda *args: checkpoint(own, *args, use_reentrant=reentrant)


def test_checkpoint_of_the_whole_model() -> None:
    _, model = pair("fast", drop_path_rate=0.3)
    plain = gradients(model, images(4))

    class Checkpointed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(model, x, use_reentrant=False)

        def zero_grad(self, set_to_none: bool = True) -> None:
            model.zero_grad(set_to_none)

        def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
            return model.named_parameters()

    assert_same_gradients(gradients(Checkpointed(), images(4)), plain)


@pytest.mark.parametrize("kind", ["fast", "timm"])
def test_checkpointing_keeps_less_and_says_so(kind: str, counted: dict[str, int]) -> None:
    _, model = pair(kind)
    apart = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def run() -> Tensor:
        return loss_of(model, images(8))

    plain = saved_bytes(run, apart)
    model.set_grad_checkpointing()
    counted.clear()
    assert saved_bytes(run, apart) < 0.7 * plain
    assert "class_token_block" not in counted
    assert counted["inner_block"] == 3
    last = next(part for part in explain(model).parts if part.part.startswith("last block"))
    assert last.why == "activation checkpointing is on (grad_checkpointing)"
    with torch.no_grad():  # nothing is kept then
        run()
        assert all(part.fused for part in explain(model).parts)
    assert counted["class_token_block"] == 1


@pytest.mark.parametrize("kind", ["fast", "timm"])
def test_compiled_training_step(kind: str) -> None:
    torch._dynamo.reset()
    _, model = pair(kind, depth=2, drop_path_rate=0.3)
    x = images(4)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loss(x: Tensor) -> Tensor:
        return loss_of(model, x)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = torch.autograd.grad(loss(x), parameters)
        torch.manual_seed(seed)
        actual = torch.autograd.grad(compiled(x), parameters)
        for ours, theirs in zip(actual, expected, strict=True):
            assert_near(ours, theirs)
    model.eval()
    assert_near(compiled(x), loss(x))


def test_inductor_training_step() -> None:
    torch._dynamo.reset()
    reference, _ = pair("fast", depth=1)
    reference.blocks[0].drop_path = DropPath(0.3)
    model = FastTNT.from_reference(reference)
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(3)
    expected = torch.autograd.grad(loss_of(model, images(4)), parameters)
    with torch._inductor.config.patch(fallback_random=True):  # draw as eager does
        torch.manual_seed(3)
        loss = torch.compile(loss_of, fullgraph=True)(model, images(4))
        for ours, theirs in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
            assert_near(ours, theirs, 2e-5)


def test_function_transforms() -> None:
    """functional_call, grad, and gradients per image by vmap."""
    reference, model = pair("fast", depth=1)
    x, target = images(3), torch.arange(3)
    results = []
    for module in (reference, model):
        state = {name: p.detach() for name, p in module.named_parameters()}

        def loss(state: Any, x: Tensor, target: Tensor, module: nn.Module = module) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(module, state, x), target)

        whole = torch.func.grad(loss)(state, x, target)
        each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(state, x[:, None], target[:, None])
        results.append((whole, each))
    for theirs, ours in zip(*results, strict=True):
        for name, gradient in theirs.items():
            assert_near(ours[name], gradient, 2e-5)
    whole, each = results[1]
    assert_near(each["head.weight"].mean(0), whole["head.weight"], 1e-4)


@pytest.mark.parametrize("kind", ["fast", "timm"])
def test_averaged_models(kind: str) -> None:
    """Copies for averaging run fused and follow their model."""
    ema_v3 = import_timm().utils.ModelEmaV3
    _, model = pair(kind, drop_path_rate=0.2)
    averages = [AveragedModel(model), ema_v3(model, decay=0.5)]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    weights = [model.head.weight.detach().clone()]
    for seed in range(2):
        optimizer.zero_grad()
        loss_of(model, images(2, seed=seed)).backward()
        optimizer.step()
        averages[0].update_parameters(model)
        averages[1].update(model)
        weights.append(model.head.weight.detach().clone())
    assert_near(averages[0].module.head.weight, (weights[1] + weights[2]) / 2)
    assert_near(averages[1].module.head.weight, 0.25 * weights[0] + 0.25 * weights[1] + 0.5 * weights[2])
    with torch.no_grad():
        for average in averages:
            twin = average.module.eval()
            assert all(part.fused for part in explain(twin).parts)
            ours = twin(images())
            reference = TNT(**AUTHORS).eval() if kind == "fast" else restore(twin)
            reference.load_state_dict(twin.state_dict())
            assert_near(ours, reference(images()))


@pytest.mark.parametrize("kind", ["fast", "timm"])
def test_gradient_accumulation(kind: str) -> None:
    _, model = pair(kind)
    x, target = images(8), torch.arange(8) % 7
    F.cross_entropy(model(x), target).backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for part, wanted in zip(x.split(2), target.split(2), strict=True):
        (F.cross_entropy(model(part), wanted) / 4).backward()
    for name, gradient in whole.items():
        assert_near(model.get_parameter(name).grad, gradient, 2e-5)


FROZEN = {
    "inner halves": r"inner_(norm|attn|mlp)|attn_in|mlp_in|norm_in|norm_mlp_in",
    "outer halves": r"outer_(norm|attn|mlp)|attn_out|norm_out|blocks\.\d\.(mlp|norm_mlp)\.",
    "projections": r"proj_norm|norm\d_proj|proj\.weight",
    "embeddings": r"_pos$|cls_token|patch_embed|pixel_embed",
    "biases": r"bias$",
    "weights": r"weight$",
    "all but the head": r"^(?!head)",
    "all but one bias": r"^(?!blocks\.1\..*fc1\.bias)",
    "all but the image": r"",
}


@pytest.mark.parametrize("which", FROZEN)
@pytest.mark.parametrize("kind", ["fast", "timm"])
def test_frozen_parameters(kind: str, which: str) -> None:
    """Any subset: the others have the gradients that eager gives them."""
    found = []
    for model in pair(kind, drop_path_rate=0.3, qkv_bias=True):
        for name, parameter in model.named_parameters():
            if re.search(FROZEN[which], name):
                parameter.requires_grad_(False)
        found.append(gradients(model, images()))
    assert_same_gradients(found[1], found[0])


@pytest.mark.parametrize("kind", ["fast", "timm"])
def test_frozen_parts_cost_nothing(kind: str) -> None:
    """With the head alone to train, nothing before it is kept and no fused operation runs backward."""
    _, model = pair(kind, drop_path_rate=0.3)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    apart = {p.untyped_storage().data_ptr() for p in model.parameters()}
    x = images(4)
    features = 4 * 96 * 4
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert saved_bytes(lambda: model(x), apart) == features
        loss_of(model, x).backward()
    calls = {event.key for event in profile.key_averages()}
    assert "tnt_kernels::inner_block" in calls
    assert not [name for name in calls if name.startswith("tnt_kernels::") and name.endswith("_backward")]

    # The first block is frozen and so is what comes before it: it keeps nothing, the second does.
    model.blocks[1].requires_grad_(True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss_of(model, x).backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["tnt_kernels::inner_block"] == 3
    assert calls["tnt_kernels::inner_block_backward"] == 2
    assert calls["tnt_kernels::word_to_sentence_backward"] == 2
    assert "tnt_kernels::pixel_embed_backward" not in calls


def test_gradients_not_asked_for_are_not_computed() -> None:
    """A frozen inner half has the gradient of its words computed, and no other."""
    asked = []
    own = torch.ops.tnt_kernels.inner_block_backward.default
    _, model = pair("fast")
    for name, parameter in model.named_parameters():
        if re.search(FROZEN["inner halves"], name):
            parameter.requires_grad_(False)

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is own:
                asked.append(args[1])
            return func(*args, **(kwargs or {}))

    loss = loss_of(model, images())
    with Asked():
        loss.backward()
    assert len(asked) == 3
    assert all(needed[0] and not any(needed[1:]) for needed in asked)


def test_backward_twice() -> None:
    _, model = pair("fast", drop_path_rate=0.3)
    loss = loss_of(model, images())
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss.backward()
    for name, gradient in once.items():
        assert_near(model.get_parameter(name).grad, 2 * gradient)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("kind", ["fast", "timm"])
def test_gradient_penalty(kind: str) -> None:
    """create_graph=True: the gradient of the image is differentiated again."""
    found = []
    for model in pair(kind, depth=2, drop_path_rate=0.3):
        torch.manual_seed(0)
        x = images().requires_grad_()
        gradient = torch.autograd.grad(loss_of(model, x), x, create_graph=True)[0]
        gradient.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    # The last layers are linear in what the penalty sees: their gradients may be missing, but not elsewhere.
    theirs, ours = found
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert_near(ours[name], gradient, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_saliency(kind: str) -> None:
    """The image's own gradient, of a frozen model in eval mode."""
    found = []
    for model in pair(kind):
        model.eval().requires_grad_(False)
        x = images(3).requires_grad_()
        model(x)[:, 2].sum().backward()
        found.append(x.grad)
    assert_near(found[1], found[0], 2e-5)


def test_inner_half_keeps_its_input_alone() -> None:
    """For backward it keeps the words it read and the factors of drop path, nothing in between."""
    values = {
        name: value.requires_grad_() if isinstance(value, Tensor) else value
        for name, value in arguments("inner_block").items()
    }
    apart = {
        v.untyped_storage().data_ptr() for name, v in values.items() if name != "x" and torch.is_tensor(v)
    }
    sentences = len(values["x"])
    factors = {name: torch.ones(sentences) for name in ("drop_path1", "drop_path2")}
    kept = saved_bytes(lambda: ops.inner_block(**values, **factors), apart)
    assert kept <= values["x"].nbytes + 2 * 4 * sentences


def test_memory_of_a_model() -> None:
    """A block keeps its words, and what its outer half needs: together under 0.45 of what eager keeps."""
    kept = []
    for model in pair("fast", drop_path_rate=0.3):
        apart = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept.append(saved_bytes(lambda model=model: loss_of(model, images(16)), apart))
    assert kept[1] < 0.45 * kept[0], kept


@pytest.mark.parametrize("op", ["inner_attention", "inner_mlp", "inner_block"])
def test_same_bits_for_every_number_of_threads(op: str) -> None:
    found = []
    values = arguments(op)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        given = {n: v.clone().requires_grad_() if torch.is_tensor(v) else v for n, v in values.items()}
        leaves = [v for v in given.values() if torch.is_tensor(v)]
        out = getattr(ops, op)(**given)
        found.append(torch.autograd.grad(out.square().sum(), leaves))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "save"])
def test_a_run_is_resumed(kind: str, how: str) -> None:
    """Model, optimiser and generator, copied after a step, go on as they would have."""
    _, model = pair(kind, drop_path_rate=0.0 if kind == "authors" else 0.3)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, images(2))
        loss.backward()
        optimizer.step()
        return loss.detach()

    step(model, optimizer)
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    elif how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    resumed = torch.optim.AdamW(twin.parameters(), 1e-3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    state = torch.get_rng_state()
    expected = [step(model, optimizer) for _ in range(2)]
    torch.set_rng_state(state)
    assert torch.equal(torch.stack(expected), torch.stack([step(twin, resumed) for _ in range(2)]))


def test_grad_checkpointing_is_in_no_state_dict() -> None:
    _, model = pair("fast")
    keys = list(model.state_dict())
    model.set_grad_checkpointing()
    assert list(model.state_dict()) == keys
    assert copy.deepcopy(model).grad_checkpointing
    assert TIMM["depth"] == len(model.blocks)
