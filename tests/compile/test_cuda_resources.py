"""Every CUDA kernel of the native module against committed limits; and what the tool must notice."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import build_cuda
from tnt_kernels import native
from tnt_kernels.bench import cuda_resources, resources
from tnt_kernels.bench.cuda_resources import Module, Row

HERE = Path(__file__).resolve().parent
LIMITS = HERE / "limits.json"


@pytest.fixture(scope="module")
def built() -> Module:
    assert native.cuda() is not None, "nvcc is here, and the native module has no CUDA kernels"
    return cuda_resources.measure()


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Module:
    cubin = tmp_path_factory.mktemp("toys") / "toys.cubin"
    source = HERE / "toy_kernels.cu"
    command = [build_cuda.find_nvcc(), "-O3", "-arch=sm_90", "-cubin", str(source), "-o", str(cubin)]
    subprocess.run(command, check=True, timeout=120)
    return cuda_resources.read(cubin, "1.2")


def toy(toys: Module, name: str) -> Row:
    (found,) = [row for row in toys.rows if row.name == name]
    return found


def limits_of(module: Module) -> dict[str, Any]:
    kernels: dict[str, Any] = {}
    for row in module.rows:
        kernels.setdefault(row.case, {})[row.name] = row.limits()
    return {"nvcc": module.nvcc, "cuda_kernels": kernels}


def said_of(toys: Module, name: str) -> list[str]:
    module = Module(toys.nvcc, (toy(toys, name),))
    return cuda_resources.violations(module, limits_of(module))


def test_every_kernel_keeps_its_limits(built: Module) -> None:
    limits = resources.load_limits(LIMITS)
    found = cuda_resources.violations(built, limits)
    assert not found, "\n".join(found)
    for architecture in cuda_resources.built_for():
        kernels = {row.name for row in built.rows if row.architecture == architecture}
        limited = limits["cuda_kernels"].get(f"sm_{architecture}", {})
        assert kernels == set(limited), "run benchmarks/resources.py --write-limits"


def test_every_architecture_of_the_build_is_read(built: Module) -> None:
    assert {row.architecture for row in built.rows} == set(cuda_resources.built_for())
    assert built.nvcc.startswith(native.cuda().version)  # type: ignore[union-attr]
    assert len({(row.architecture, row.kernel) for row in built.rows}) == len(built.rows)


def test_the_limits_are_of_every_architecture() -> None:
    assert cuda_resources.ARCHITECTURES == build_cuda.ARCHITECTURES
    limits = resources.load_limits(LIMITS)["cuda_kernels"]
    assert list(limits) == [f"sm_{number}" for number in build_cuda.ARCHITECTURES]
    assert {tuple(kernels) for kernels in limits.values()} == {tuple(limits["sm_90"])}


def test_what_is_read_from_machine_code(toys: Module) -> None:
    assert {row.kernel for row in toys.rows} == {
        "calling_kernel<BFloat16, 3>", "dividing_kernel", "empty_kernel", "shared_kernel", "stack_kernel",
        "trapping_kernel",
    }  # fmt: skip
    assert {row.architecture for row in toys.rows} == {90}
    shared = toy(toys, "shared_kernel").resources
    assert shared is not None
    assert shared.shared >= 1024
    assert shared.stack == shared.spilled == 0
    assert shared.instructions["shared"] >= 2 <= shared.instructions["global"]
    assert said_of(toys, "dividing_kernel") == []


def test_a_stack_is_a_violation(toys: Module) -> None:
    (said,) = said_of(toys, "stack_kernel")
    assert said.startswith("sm_90 stack_kernel: ")
    assert "bytes of stack" in said


def test_a_function_that_is_not_inlined_is_a_violation(toys: Module) -> None:
    assert "sm_90 calling_kernel<BFloat16, 3>: calls grown, which was not inlined" in said_of(
        toys, "calling_kernel<BFloat16, 3>"
    )


def test_a_kernel_without_its_work_is_a_violation(toys: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    assert said_of(toys, "trapping_kernel") == [
        "sm_90 trapping_kernel: its program has no end: it can only trap"
    ]
    (said,) = said_of(toys, "empty_kernel")
    assert said.endswith("instructions: the compiler has dropped the work")
    monkeypatch.setattr(cuda_resources, "EMPTY", {"empty_kernel"})
    assert said_of(toys, "empty_kernel") == []


def test_a_kernel_without_limits_is_a_violation(toys: Module) -> None:
    module = Module(toys.nvcc, (toy(toys, "dividing_kernel"),))
    for limits in ({}, {"nvcc": "0", "cuda_kernels": {"sm_80": limits_of(module)["cuda_kernels"]["sm_90"]}}):
        (said,) = cuda_resources.violations(module, limits)
        assert said.startswith("sm_90 dividing_kernel: no limits")


@pytest.mark.parametrize("what", ["registers", "stack", "spilled", "shared", "instructions"])
def test_a_figure_above_its_limit_is_a_violation(toys: Module, what: str) -> None:
    module = Module(toys.nvcc, (toy(toys, "dividing_kernel"),))
    limits = limits_of(module)
    limits["cuda_kernels"]["sm_90"]["dividing_kernel"][what] -= 1
    (said,) = cuda_resources.violations(module, limits)
    assert said.startswith(f"sm_90 dividing_kernel: {what} ")
    assert cuda_resources.violations(module, {**limits, "nvcc": "0"}) == []  # another compiler


def test_more_shared_memory_than_a_kernel_may_declare_is_a_violation(toys: Module) -> None:
    row = toy(toys, "shared_kernel")
    assert row.resources is not None
    row = dataclasses.replace(row, resources=dataclasses.replace(row.resources, shared=50 << 10))
    module = Module(toys.nvcc, (row,))
    assert any(
        "static shared memory" in said for said in cuda_resources.violations(module, limits_of(module))
    )


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_ZN3tnt4cuda12_GLOBAL__N_17nothingEv", "nothing"),
        (
            "_ZN3tnt4cuda12_GLOBAL__N_118pixel_embed_kernelINS0_8BFloat16ELi3EEEvNS0_10PixelEmbedEPKfi",
            "pixel_embed_kernel<BFloat16, 3>",
        ),
        ("_ZN3tnt3addIlLb1EEET_S1_", "add<long, true>"),
        ("plain_c", "plain_c"),
    ],
)
def test_names(symbol: str, name: str) -> None:
    assert cuda_resources.short_name(cuda_resources.demangle(symbol)) == name


def test_limits_are_written_and_read(toys: Module, tmp_path: Path) -> None:
    resources.save_limits([], tmp_path / "limits.json", toys.nvcc, toys.rows)
    found = resources.load_limits(tmp_path / "limits.json")
    assert {**found, **limits_of(toys)} == found
    assert json.dumps(cuda_resources.as_json(toys.rows))
    text = cuda_resources.report(toys.rows)
    assert "calling_kernel<BFloat16, 3>" in text
    assert "it can only trap" in text


def test_without_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cuda", lambda: None)
    assert cuda_resources.built_for() == []
    with pytest.raises(RuntimeError, match="without CUDA kernels"):
        cuda_resources.measure()


def test_what_is_no_machine_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.cubin"
    path.write_text("nothing")
    with pytest.raises(RuntimeError, match=r"cuobjdump.*broken\.cubin"):
        cuda_resources.read(path)
