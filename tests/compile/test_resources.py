"""Every Triton kernel, compiled without a GPU, against committed limits; and what the tool must notice."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_kernels
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from tnt_kernels.backends.triton import LAUNCHERS, configs, runtime
from tnt_kernels.backends.triton.configs import Config
from tnt_kernels.bench import kernel_cases, resources, sass
from tnt_kernels.bench.kernel_cases import CASES

ROOT = Path(__file__).resolve().parent.parent.parent
LIMITS = Path(__file__).with_name("limits.json")


@pytest.fixture(scope="module")
def rows() -> tuple[resources.Row, ...]:
    return resources.measure(resources.committed())


def test_every_kernel_keeps_its_limits(rows: tuple[resources.Row, ...]) -> None:
    limits = resources.load_limits(LIMITS)
    found = resources.violations(rows, limits)
    assert not found, "\n".join(found)
    limited = {(case, kernel) for case, kernels in limits["kernels"].items() for kernel in kernels}
    assert limited == {(row.case, row.name) for row in rows}, "run benchmarks/resources.py --write-limits"


def test_the_limits_are_of_the_pinned_triton() -> None:
    pinned = (ROOT / "constraints.txt").read_text().split()
    assert f"triton=={resources.load_limits(LIMITS)['triton']}" in pinned


def test_every_launcher_is_in_a_case() -> None:
    called = {launcher for case in CASES for launcher in case.launchers}
    assert set(LAUNCHERS) <= called


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def scale(n: int, *, rounds: int = 5, offset: int = 0, bias: Tensor | None = None) -> runtime.Launch:
    x = meta(n + offset)[offset:]
    arguments = {"x_ptr": x, "out_ptr": meta(n), "n": n, "rounds": rounds, "bias_ptr": bias}
    return runtime.Launch(
        toy_kernels.scale_kernel, (triton.cdiv(n, 64),), arguments, {"ROWS": 64}, Config(64, 2)
    )


def product(rows: int, k: int, precision: str = "tf32", dtype: torch.dtype = torch.float32) -> runtime.Launch:
    arguments = {"x_ptr": meta(4096, k, dtype=dtype), "w_ptr": meta(k, k, dtype=dtype)}
    arguments["out_ptr"] = meta(4096, k, dtype=dtype)
    constants = {"ROWS": rows, "K": k, "PRECISION": precision}
    return runtime.Launch(toy_kernels.product_kernel, (4096 // rows,), arguments, constants, Config(rows, 4))


def compiled(launch: runtime.Launch, architecture: int = 90) -> sass.Resources:
    return sass.compile_one(sass.compilation_of(launch, architecture))


def row(launch: runtime.Launch, architecture: int = 90, **others: Any) -> resources.Row:
    """The row of a toy kernel as if it were a case's."""
    found = compiled(launch, architecture)
    values = {
        "case": "toy",
        "strict": True,
        "precision": "float32",
        "architecture": architecture,
        "kernel": launch.kernel.fn.__name__,
        "config": tuple(launch.config),
        "resources": found,
        "instructions": float(found.total),
    }
    return resources.Row(**(values | others))


def limits_of(*rows: resources.Row) -> dict[str, Any]:
    kernels: dict[str, Any] = {}
    for each in rows:
        kernels.setdefault(each.case, {})[each.name] = each.limits()
    return {"triton": triton.__version__, "kernels": kernels}


@pytest.mark.parametrize("n", [1, 15, 4096, 1 << 33])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("biased", [False, True])
def test_arguments_are_specialised_as_in_a_launch(n: int, offset: int, biased: bool) -> None:
    launch = scale(n, rounds=1, offset=offset, bias=meta(n) if biased else None)
    found = sass.compilation_of(launch, 90)
    kinds = dict(found.signature)
    assert kinds["x_ptr"] == "*fp32"
    assert kinds["n"] == ("constexpr" if n == 1 else "i64" if n > 1 << 31 else "i32")
    assert kinds["rounds"] == "constexpr"
    assert kinds["bias_ptr"] == ("*fp32" if biased else "constexpr")
    assert dict(found.constants) == {3: 1, 5: 64} | ({2: 1} if n == 1 else {}) | ({} if biased else {4: None})
    divided = {0: offset == 0, 1: True, 2: n > 1 and n % 16 == 0, 4: biased}
    assert {position for position, holds in found.attributes if holds} == {
        position for position, holds in divided.items() if holds
    }
    assert sass.source_of(found).hash() == launched_source(launch).hash()


def launched_source(launch: runtime.Launch) -> ASTSource:
    """What Triton's own launch code compiles for these arguments."""
    kernel, backend = launch.kernel, make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"num_warps": launch.config.warps, "num_stages": launch.config.stages}
    bound, specialization, options = bind(**launch.arguments, **launch.constants, **options)
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    return ASTSource(kernel, signature, constants, attributes)


def test_what_is_read_from_machine_code() -> None:
    plain, looping = compiled(scale(4096, rounds=1)), compiled(scale(4096, rounds=5))
    assert plain.loops == 0 < looping.loops
    assert 0 < looping.looped < looping.total
    assert plain.instructions["mufu"] >= 1
    assert plain.instructions["global"] == 2
    assert plain.instructions["tensor"] == plain.stack == plain.spilled == 0
    dot = compiled(product(64, 32, dtype=torch.bfloat16))
    assert dot.instructions["tensor"] > 0 < dot.instructions["shared"]
    assert dot.shared > 0
    assert compiled(product(64, 32, "tf32")).total < compiled(product(64, 32, "tf32x3")).total


@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_waiting_is_no_loop(architecture: int) -> None:
    assert compiled(product(64, 32, dtype=torch.bfloat16), architecture).loops == 0


@pytest.mark.parametrize(
    ("name", "flags", "kind"),
    [
        ("HGMMA", ".64x32x16.F32.BF16", "tensor"),
        ("UTCHMMA", "", "tensor"),
        ("HMMA", ".16816.F32", "tensor"),
        ("FFMA", "", "fp32"),
        ("FADD2", "", "fp32"),
        ("HADD2", ".F32", "conversion"),
        ("HADD2", ".BF16_V2", "other"),
        ("F2FP", ".BF16.F32.PACK_AB", "conversion"),
        ("MUFU", ".EX2", "mufu"),
        ("LDSM", ".16.M88.4", "shared"),
        ("LDL", ".64", "local"),
        ("STG", ".E.128", "global"),
        ("LDGSTS", ".E.128", "global"),
        ("IMAD", ".MOV.U32", "other"),
        ("HFMA2", ".MMA", "other"),
    ],
)
def test_kinds_of_instructions(name: str, flags: str, kind: str) -> None:
    assert sass.kind_of(name, flags) == kind


def test_equal_compilations_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[sass.Compilation] = []
    monkeypatch.setattr(sass, "usable_cores", lambda: 1)
    monkeypatch.setattr(sass, "_attempt", lambda one: made.append(one) or str(len(made)))
    first, second = (sass.compilation_of(scale(n), 90) for n in (4096, 8192))
    third = sass.compilation_of(scale(4095), 90)
    assert sass.compile_all([first, second, third]) == {first: "1", third: "2"}


def test_what_does_not_compile_is_reported() -> None:
    broken = runtime.Launch(toy_kernels.broken_kernel, (1,), {"out_ptr": meta(8)}, {"ROWS": 6}, Config(6, 1))
    good, bad = sass.compilation_of(scale(64), 90), sass.compilation_of(broken, 90)
    found = sass.compile_all([bad, good])  # in processes of their own
    assert isinstance(found[good], sass.Resources)
    assert "power of 2" in str(found[bad])
    failed = row(scale(64), resources=None, instructions=None, problem="arange's range must be a power of 2")
    (said,) = resources.violations([failed], limits_of())
    assert said == "toy: float32 sm_90 scale_kernel: not compiled: arange's range must be a power of 2"
    assert "not compiled" in resources.report([failed])


def test_spills_are_a_violation_in_forward_kernels_alone() -> None:
    spilling = row(product(128, 128, "ieee"))
    assert spilling.resources is not None
    assert spilling.resources.stack > 0 < spilling.resources.spilled
    assert any("stack" in line for line in resources.violations([spilling], limits_of(spilling)))
    backward = dataclasses.replace(
        spilling, strict=False, resources=dataclasses.replace(spilling.resources, registers=255)
    )
    assert resources.violations([backward], limits_of(backward)) == []


def test_a_collapse_is_a_violation_in_any_kernel() -> None:
    found = row(scale(64), strict=False)
    assert found.resources is not None
    collapsed = dataclasses.replace(found.resources, registers=32, stack=5000)
    found = dataclasses.replace(found, resources=collapsed)
    (said,) = resources.violations([found], limits_of(found))
    assert "ptxas collapsed: 32 registers, 5000 bytes of stack" in said


def test_a_kernel_without_its_work_is_a_violation() -> None:
    found = row(scale(64))
    assert found.resources is not None
    empty = dataclasses.replace(found.resources, instructions={"other": 2})
    found = dataclasses.replace(found, resources=empty)
    (said,) = resources.violations([found], limits_of(found))
    assert said == "toy: float32 sm_90 scale_kernel: 2 instructions: the compiler has dropped the work"


@pytest.mark.parametrize(("architecture", "fits"), [(80, True), (86, False), (90, True), (120, False)])
def test_shared_memory_has_the_architectures_limit(architecture: int, fits: bool) -> None:
    found = row(scale(64), architecture=architecture)
    assert found.resources is not None
    found = dataclasses.replace(found, resources=dataclasses.replace(found.resources, shared=130 << 10))
    assert bool(resources.violations([found], limits_of(found))) != fits


@pytest.mark.parametrize("what", ["registers", "stack", "spilled", "shared", "instructions"])
def test_a_figure_above_its_limit_is_a_violation(what: str) -> None:
    found = row(scale(64), strict=False)
    limits = limits_of(found)
    assert resources.violations([found], limits) == []
    limits["kernels"]["toy"][found.name][what] -= 1
    (said,) = resources.violations([found], limits)
    assert said.startswith(f"toy: {found.name}: {what} ")
    assert resources.violations([found], {**limits, "triton": "0"}) == []  # another compiler


def test_odd_sizes_may_have_a_stack_up_to_their_limit() -> None:
    found = row(scale(64), strict=False)
    assert found.resources is not None
    found = dataclasses.replace(found, resources=dataclasses.replace(found.resources, stack=8))
    limits = limits_of(found)
    assert resources.violations([found], limits) == []
    limits["kernels"]["toy"][found.name]["stack"] = 0
    assert "stack 8, the limit is 0" in resources.violations([found], limits)[0]


def test_goals() -> None:
    case, goal = next(iter(resources.GOALS.items()))
    found = row(scale(64, rounds=1), case=case, precision="bfloat16", instructions=float(goal))
    assert resources.violations([found], limits_of(found)) == []
    more = dataclasses.replace(found, instructions=goal + 1.0)
    assert "the goal is" in resources.violations([more], limits_of(more))[0]
    looping = row(scale(64), case=case, precision="bfloat16", instructions=1.0, weighed=False)
    assert "has a loop" in resources.violations([looping], limits_of(looping))[0]


def test_limits_are_written_and_read(tmp_path: Path) -> None:
    found = [row(scale(64)), row(scale(64), case="other"), row(product(64, 32), strict=False)]
    resources.save_limits(found, tmp_path / "limits.json")
    assert resources.load_limits(tmp_path / "limits.json") == limits_of(*found)
    assert json.dumps(resources.as_json(found))
    assert "scale_kernel" in resources.report(found)


def test_rows_of_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel launched twice with the same code is one row, with other code two."""
    case = kernel_cases.KernelCase("inner_block", {"c": 24, "heads": 4})
    monkeypatch.setattr(
        kernel_cases.KernelCase, "launches", lambda *_: [scale(4096), scale(8192), scale(4095)]
    )
    first, second = resources.measure([(case, "float32", 90)])
    assert (first.kernel, second.kernel) == ("scale_kernel", "scale_kernel#2")
    assert first.resources is not None
    assert first.instructions == round(first.resources.total * 2 * 64 / kernel_cases.SENTENCES, 1)


def test_a_loop_over_tiles_is_weighed() -> None:
    kinds = dict.fromkeys((*sass.KINDS, "other"), 0) | {"fp32": 100}
    looping = sass.Resources(32, 0, 0, 0, loops=1, looped=80, instructions=kinds)
    launch = scale(4096)  # 64 programs of 2 warps
    assert resources._instructions(looping, launch, 1000) == (12.8, False)
    over_tiles = launch._replace(arguments=launch.arguments | {"tiles": 640})
    assert resources._instructions(looping, over_tiles, 1000) == (105.0, True)
    nested = dataclasses.replace(looping, loops=2)
    assert resources._instructions(nested, over_tiles, 1000) == (12.8, False)


def test_the_program() -> None:
    command = [sys.executable, "benchmarks/resources.py", "--write-limits", "--op", "inner_block"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--write-limits takes no other option" in done.stderr


def test_every_configuration_of_the_table_is_compiled() -> None:
    taken = set().union(*(resources.entries(*wanted) for wanted in resources.committed()))
    entries = {
        (kernel, name, entry)
        for kernel, architectures in configs.table().items()
        for name, of_architecture in architectures.items()
        for entry in of_architecture
        if name != "other"
    }
    assert entries - taken == set(), "these need a case in kernel_cases.py"
