"""The CUDA backend from operator to kernel, on a CPU: its launchers call the bindings of emulated kernels."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from gradients import assert_gradients_as_accurate, eager_and_exact_gradients, tensors_of
from oracle import arguments, assert_as_accurate, eager_and_exact, operator_arguments, randn
from torch import Tensor

from tnt_kernels import native
from tnt_kernels.backends import cuda

pybind11 = pytest.importorskip("pybind11")

ROOT = Path(__file__).resolve().parent.parent
OP = "pixel_embed"
PRECISIONS = [
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    library = tmp_path_factory.mktemp("cuda") / f"emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas", "-fvisibility=hidden"]
    folders = [ROOT / "tests/cuda", ROOT / "csrc/cuda", pybind11.get_include(), sysconfig.get_path("include")]
    defines = ['-DTNT_CUDA_VERSION="0.0"', "-DTNT_CUDA_ARCHITECTURES=80"]
    sources = [*(ROOT / "csrc/cuda").glob("pixel_embed*.cu"), ROOT / "csrc/cuda_bindings.cpp"]
    sources.append(ROOT / "tests/cuda/module.cpp")
    includes = [f"-I{folder}" for folder in folders]
    command = [compiler, *flags, *includes, *defines, "-x", "c++", *map(str, sources), "-o", str(library)]
    subprocess.run(command, check=True)
    spec = importlib.util.spec_from_file_location("emulated", library)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(autouse=True)
def emulated(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cuda", lambda: module.cuda)
    monkeypatch.setattr(cuda.gpu, "why_no_cuda", lambda _: None)
    monkeypatch.setattr(cuda, "_stream_of", lambda _: contextlib.nullcontext(0))


def run(given: dict[str, Any], compute_dtype: torch.dtype | None = None, *normal: Any) -> Tensor:
    return cuda.pixel_embed(*operator_arguments(OP, given, compute_dtype), *normal)


def gradients(
    given: dict[str, Any], grad: Tensor, compute_dtype: torch.dtype | None = None, *wanted: str
) -> dict[str, Tensor]:
    names = tensors_of(given)
    needed = [name in (wanted or names) for name in ("image", "weight", "bias", "position")]
    found = cuda.pixel_embed_backward(grad, needed, *operator_arguments(OP, given, compute_dtype))
    return dict(zip([name for name in names if name in (wanted or names)], found, strict=True))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("change", [{}, {"patch_size": 8, "stride": 2}], ids=["field", "any"])
@pytest.mark.parametrize(("dtype", "compute_dtype"), PRECISIONS)
def test_accuracy(
    dtype: torch.dtype, compute_dtype: torch.dtype | None, change: dict[str, Any], legacy: bool
) -> None:
    given = {**arguments(OP, dtype), **change, "legacy": legacy}
    eager, exact = eager_and_exact(OP, given, compute_dtype)
    out = run(given, compute_dtype)
    assert out.shape == eager.shape
    assert out.dtype == eager.dtype
    assert_as_accurate(out, eager, exact)

    grad = randn(*out.shape, dtype=out.dtype)
    found = gradients(given, grad, compute_dtype)
    assert {name: value.dtype for name, value in found.items()} == dict.fromkeys(found, dtype)
    theirs, exact_ones = eager_and_exact_gradients(OP, given, grad, compute_dtype)
    assert_gradients_as_accurate(found, theirs, exact_ones)


@pytest.mark.parametrize("wanted", ["image", "weight", "bias", "position"])
def test_only_the_gradients_asked_for(wanted: str) -> None:
    given = arguments(OP)
    grad = randn(*run(given).shape)
    (name,) = (found := gradients(given, grad, None, wanted))
    assert name == wanted
    assert torch.equal(found[wanted], gradients(given, grad)[wanted])


def test_any_strides() -> None:
    given = arguments(OP)
    grad = randn(*run(given).shape)
    turned = {
        "image": given["image"].to(memory_format=torch.channels_last),
        "weight": given["weight"].to(memory_format=torch.channels_last),
        "bias": torch.stack([given["bias"], given["bias"]], 1)[:, 0],
        "position": given["position"].mT.contiguous().mT,
    }
    assert torch.equal(run({**given, **turned}), run(given))
    ours, plain = (gradients(values, grad.mT.contiguous().mT) for values in ({**given, **turned}, given))
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_without_bias_and_position() -> None:
    given = {**arguments(OP), "bias": None, "position": None}
    eager, exact = eager_and_exact(OP, given)
    assert_as_accurate(run(given), eager, exact)
    grad = randn(*eager.shape)
    found = gradients(given, grad)
    assert list(found) == ["image", "weight"]
    assert_gradients_as_accurate(found, *eager_and_exact_gradients(OP, given, grad))


def test_no_images() -> None:
    given = arguments(OP)
    given["image"] = given["image"][:0]
    assert run(given).shape == (0, 16, 24)
    found = gradients(given, randn(0, 16, 24))
    assert found["image"].shape == (0, 3, 32, 48)
    assert all((found[name] == 0).all() for name in ("weight", "bias", "position"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uint8(dtype: torch.dtype) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    given = arguments(OP, dtype)
    pixels = torch.randint(0, 256, given["image"].shape, dtype=torch.uint8)
    normal = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    out = run({**given, "image": pixels}, None, mean, std)
    assert out.dtype == dtype
    eager, exact = eager_and_exact(OP, {**given, "image": normal.to(dtype)})
    assert_as_accurate(out, eager, exact)
    grad = randn(*out.shape, dtype=dtype)
    values = operator_arguments(OP, {**given, "image": pixels})
    found = cuda.pixel_embed_backward(grad, [False, True, True, True], *values, mean, std)
    wanted = gradients({**given, "image": normal.to(dtype)}, grad, None, "weight", "bias", "position")
    for ours, theirs in zip(found, wanted.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-3)


def test_tf32_where_torch_allows_it() -> None:
    given = arguments(OP)
    plain = run(given)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        rounded = run(given)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert not torch.equal(plain, rounded)
    torch.testing.assert_close(plain, rounded, rtol=0, atol=1e-2)


def test_sizes_that_32_bits_do_not_count() -> None:
    given = arguments(OP)
    given["image"] = randn(1, 3, 1, 1).expand(2**27, 3, 16, 16)  # no memory behind it
    given |= {"patch_size": 1, "stride": 1, "position": None}
    with pytest.raises(ValueError, match="more patches, words or taps than 32 bits count"):
        cuda._call(
            given["image"], [given["weight"], None, None], None, (1, 1, 1, False), torch.float32, None, None
        )
