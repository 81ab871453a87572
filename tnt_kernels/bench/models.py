"""Models against their baselines: TNT eager, compiled, exported and by this package, and DeiT beside it."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tnt_kernels._timm import import_timm
from tnt_kernels.bench.cases import (
    Baseline,
    NotRunError,
    Runner,
    check_device,
    check_dtype,
    compiled,
    graphed,
    torch_call,
)
from tnt_kernels.bench.sizes import IMAGE_SIZE, size_of
from tnt_kernels.models.accelerate import accelerate
from tnt_kernels.models.checkpoint import to_timm
from tnt_kernels.models.fast_tnt import FastTNT
from tnt_kernels.models.tnt import TNT

# A float64 pass is slow: of a larger batch so many images are checked, first and last among them.
CHECKED_IMAGES = 8


@dataclass(frozen=True)
class ModelCase:
    """One model at 224 px. dtype float32, or bfloat16: autocast where the runtime is PyTorch.

    device: "cpu" or "cuda", the current GPU.
    """

    model: str
    batch: int
    dtype: str = "float32"
    device: str = "cpu"

    kind = "model"
    unit = "images/s"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        size_of(self.model)
        check_dtype(self.dtype)
        check_device(self.device)

    @property
    def title(self) -> str:
        return f"{size_of(self.model).title}, batch {self.batch}, {self.dtype}"

    @property
    def items(self) -> int:
        return self.batch

    def fields(self) -> dict[str, Any]:
        return asdict(self)

    def baselines(self) -> Mapping[str, Baseline]:
        return BASELINES

    def exact(self, family: str) -> Tensor:
        return exact_logits(self.model, family, self.batch, self.device)

    def eager(self, family: str) -> Tensor:
        return eager_logits(self.model, family, self.batch, self.dtype, self.device)

    def checked(self, output: Tensor) -> Tensor:
        return output[checked_images(self.batch)]


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a seeded value of a trained model's scale: no bias is zero and no gain is one."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if isinstance(module, nn.LayerNorm) and name == "weight":
                value = 1 + 0.1 * noise
            elif parameter.ndim <= 1:
                value = 0.1 * noise
            elif isinstance(module, (nn.Linear, nn.Conv2d)):
                value = noise * parameter[0].numel() ** -0.5
            else:
                value = 0.5 * noise
            parameter.copy_(value)
    return model


def images(batch: int, device: str = "cpu") -> Tensor:
    """Seeded images [batch, 3, 224, 224], normal: of the scale that preprocessing gives a photograph."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(device)


def checked_images(batch: int) -> list[int]:
    last, count = batch - 1, min(batch, CHECKED_IMAGES)
    return sorted({round(i * last / max(count - 1, 1)) for i in range(count)})


@functools.lru_cache(maxsize=2)
def reference(model: str, drop_path_rate: float = 0.0) -> TNT:
    """This package's plain TNT with seeded weights: the one source of weights for every entry."""
    made = TNT(**size_of(model).arguments(), drop_path_rate=drop_path_rate).eval()
    randomize(made)
    return made


def timm_module() -> Any:
    try:
        return import_timm()
    except ImportError as error:
        raise NotRunError(str(error)) from error


def timm_tnt(model: str, drop_path_rate: float = 0.0) -> nn.Module:
    """timm's TNT with the weights of `reference(model)`."""
    timm = timm_module()
    made = timm.models.tnt.TNT(**size_of(model).timm_arguments(), drop_path_rate=drop_path_rate).eval()
    made.load_state_dict(to_timm(reference(model, drop_path_rate).state_dict()))
    return made


def eager_network(model: str, family: str, drop_path_rate: float = 0.0) -> nn.Module:
    """A network of a family as eager PyTorch runs it; TNT without timm is this package's plain one."""
    if family == "deit":
        made = timm_module().create_model(size_of(model).deit, drop_path_rate=drop_path_rate).eval()
        return randomize(made)
    try:
        return timm_tnt(model, drop_path_rate)
    except NotRunError:
        return copy.deepcopy(reference(model, drop_path_rate))


@functools.lru_cache(maxsize=2)
def eager_model(model: str, family: str, device: str) -> nn.Module:
    """`eager_network`, made once; nobody changes it."""
    return eager_network(model, family).to(device)


@functools.lru_cache(maxsize=4)
def exact_logits(model: str, family: str, batch: int, device: str = "cpu") -> Tensor:
    """Logits of the checked images in float64."""
    exact = copy.deepcopy(eager_model(model, family, device)).double()
    with torch.inference_mode():
        return exact(images(batch, device)[checked_images(batch)].double())


@functools.lru_cache(maxsize=4)
def eager_logits(model: str, family: str, batch: int, dtype: str, device: str = "cpu") -> Tensor:
    """Logits of the checked images in eager PyTorch."""
    checked = images(batch, device)[checked_images(batch)]
    return torch_call(eager_model(model, family, device), (checked,), dtype)()


def _torch(case: ModelCase, model: Any) -> Runner:
    call = torch_call(model, (images(case.batch, case.device),), case.dtype)
    return Runner(call, check_dtype(case.dtype))


def _timm_tnt(case: ModelCase) -> nn.Module:
    return timm_tnt(case.model).to(case.device)


def _fast_tnt(case: ModelCase) -> FastTNT:
    return FastTNT.from_reference(reference(case.model)).eval().to(case.device)


def _timm(case: ModelCase, artifacts: Path) -> Runner:
    return _torch(case, _timm_tnt(case))


def _reference(case: ModelCase, artifacts: Path) -> Runner:
    return _torch(case, copy.deepcopy(reference(case.model)).to(case.device))


def _reference_compiled(case: ModelCase, artifacts: Path) -> Runner:
    return _torch(case, compiled(copy.deepcopy(reference(case.model)).to(case.device)))


def _timm_compiled(case: ModelCase, artifacts: Path) -> Runner:
    return _torch(case, compiled(_timm_tnt(case)))


def _timm_frozen(case: ModelCase, artifacts: Path) -> Runner:
    return _torch(case, compiled(_timm_tnt(case), freezing=True))


def _timm_reduce_overhead(case: ModelCase, artifacts: Path) -> Runner:
    _needs_gpu(case)
    return _torch(case, compiled(_timm_tnt(case), mode="reduce-overhead"))


def _timm_max_autotune(case: ModelCase, artifacts: Path) -> Runner:
    _needs_gpu(case)
    return _torch(case, compiled(_timm_tnt(case), mode="max-autotune"))


def _fast(case: ModelCase, artifacts: Path) -> Runner:
    return _torch(case, _fast_tnt(case))


def _fast_compiled(case: ModelCase, artifacts: Path) -> Runner:
    return _torch(case, compiled(_fast_tnt(case)))


def _fast_reduce_overhead(case: ModelCase, artifacts: Path) -> Runner:
    _needs_gpu(case)
    return _torch(case, compiled(_fast_tnt(case), mode="reduce-overhead"))


def _fast_graph(case: ModelCase, artifacts: Path) -> Runner:
    _needs_gpu(case)
    call = torch_call(_fast_tnt(case), (images(case.batch, case.device),), case.dtype)
    return Runner(graphed(call), check_dtype(case.dtype))


def _accelerated(case: ModelCase, artifacts: Path) -> Runner:
    return _torch(case, accelerate(_timm_tnt(case)))


def _deit(case: ModelCase, artifacts: Path) -> Runner:
    return _torch(case, eager_model(case.model, "deit", case.device))


def _deit_compiled(case: ModelCase, artifacts: Path) -> Runner:
    return _torch(case, compiled(eager_model(case.model, "deit", case.device)))


def _needs_cpu(case: ModelCase) -> None:
    if case.device != "cpu":
        raise NotRunError("measured on the CPU alone")


def _needs_gpu(case: ModelCase) -> None:
    if case.device != "cuda":
        raise NotRunError("CUDA graphs need a GPU")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """For exporters: no gradients, and none of the notes that they print while they trace."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        warnings.catch_warnings(action="ignore"),
        torch.no_grad(),
    ):
        yield


def _onnxruntime(case: ModelCase, artifacts: Path) -> Runner:
    """Always float32: the CPU provider of ONNX Runtime has no bfloat16 kernels for these operators."""
    _needs_cpu(case)
    try:
        import onnxruntime
    except ImportError as error:
        raise NotRunError("onnxruntime is not installed") from error
    path = _exported_onnx(case, artifacts)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images(case.batch).numpy()}
    note = "" if case.dtype == "float32" else "in float32: ONNX Runtime has no bfloat16 on the CPU"
    return Runner(lambda: torch.from_numpy(session.run(None, feed)[0]), torch.float32, note)


def _exported_onnx(case: ModelCase, artifacts: Path) -> Path:
    path = artifacts / f"{case.model}_{case.batch}.onnx"
    if not path.exists():
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise NotRunError(f"the export to ONNX needs {error.name}, which is not installed") from error
        with _quiet():
            torch.onnx.export(
                timm_tnt(case.model),
                (images(case.batch),),
                str(path),
                dynamo=True,
                verbose=False,
                external_data=True,
            )
    return path


def _openvino(case: ModelCase, artifacts: Path) -> Runner:
    _needs_cpu(case)
    try:
        import openvino
    except ImportError as error:
        raise NotRunError("openvino is not installed") from error
    path = artifacts / f"{case.model}_{case.batch}.xml"
    example = images(case.batch)
    if not path.exists():
        with _quiet():
            exported = openvino.convert_model(timm_tnt(case.model), example_input=example)
        exported.reshape(list(example.shape))
        openvino.save_model(exported, path, compress_to_fp16=False)
    precision = check_dtype(case.dtype)
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if precision is torch.bfloat16 else "f32",
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    array = example.numpy()
    note = "inference precision bf16" if precision is torch.bfloat16 else ""

    def call() -> Tensor:
        return torch.from_numpy(request.infer([array], share_inputs=True, share_outputs=True)[0])

    return Runner(call, precision, note)


BASELINES: dict[str, Baseline] = {
    b.name: b
    for b in (
        Baseline("timm", "timm TNT, eager", _timm),
        Baseline("compile", "timm TNT, torch.compile", _timm_compiled),
        Baseline("frozen", "timm TNT, torch.compile with frozen weights", _timm_frozen),
        Baseline("reduce_overhead", "timm TNT, torch.compile reduce-overhead", _timm_reduce_overhead),
        Baseline("max_autotune", "timm TNT, torch.compile max-autotune", _timm_max_autotune),
        Baseline("onnxruntime", "timm TNT, ONNX Runtime", _onnxruntime),
        Baseline("openvino", "timm TNT, OpenVINO", _openvino),
        Baseline("reference", "plain TNT of this package, eager", _reference),
        Baseline("reference_compile", "plain TNT of this package, torch.compile", _reference_compiled),
        Baseline("fast", "FastTNT", _fast, ours=True),
        Baseline("fast_compile", "FastTNT, torch.compile", _fast_compiled, ours=True),
        Baseline(
            "fast_reduce_overhead",
            "FastTNT, torch.compile reduce-overhead",
            _fast_reduce_overhead,
            ours=True,
        ),
        Baseline("fast_graph", "FastTNT, CUDA graph", _fast_graph, ours=True),
        Baseline("accelerate", "accelerate(timm TNT)", _accelerated, ours=True),
        Baseline("deit", "timm DeiT, eager", _deit, family="deit"),
        Baseline("deit_compile", "timm DeiT, torch.compile", _deit_compiled, family="deit"),
    )
}
DEFAULT_NAMES = ("timm", "compile", "fast", "fast_compile", "accelerate", "deit", "deit_compile")
GPU_NAMES = (
    "timm", "compile", "reduce_overhead", "fast", "fast_compile", "fast_reduce_overhead", "fast_graph",
    "accelerate", "deit", "deit_compile",
)  # fmt: skip
CPU_NAMES = (
    "timm", "compile", "frozen", "onnxruntime", "openvino", "reference", "fast", "fast_compile", "accelerate",
    "deit", "deit_compile",
)  # fmt: skip
