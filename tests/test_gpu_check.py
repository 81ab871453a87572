"""benchmarks/gpu_check.py as far as it goes without a GPU: steps that fail or hang, goals, the summary."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tnt_kernels.bench import floors, goals, models, pixel_embed, steps, training
from tnt_kernels.bench.kernel_cases import KernelCase
from tnt_kernels.bench.steps import FAILED, NOT_RUN, OK, TIMED_OUT, Outcome, Step

ROOT = Path(__file__).resolve().parent.parent


def load(path: str) -> Any:
    """A program of this repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu_check = load("benchmarks/gpu_check.py")


def python(code: str, name: str = "step", limit: float = 60) -> Step:
    return Step(name, (sys.executable, "-c", code), limit)


def test_a_step_that_fails_leaves_the_others(tmp_path: Path) -> None:
    stages = [
        [python("print('fine')", "first"), python("raise ValueError('it broke')", "second")],
        [python("import os; print(os.environ['GIVEN'])", "third")],
        [Step("fourth", ("/no/such/program",), 60), Step("fifth", (), 60, why_not="there is none")],
    ]
    stages[1][0] = Step("third", stages[1][0].command, 60, variables={"GIVEN": "a value"})
    seen: list[Outcome] = []
    found = steps.run_all(stages, tmp_path, 60, seen.append)
    assert found == seen
    assert [o.status for o in found] == [OK, FAILED, OK, FAILED, NOT_RUN]
    assert [o.said[-1] for o in found[:3]] == ["fine", "ValueError: it broke", "a value"]
    assert "No such file" in found[3].said[0]
    assert found[4].said == ("there is none",)
    assert (tmp_path / "first.txt").read_text() == "fine\n"


def test_a_step_that_hangs_is_stopped_with_its_children(tmp_path: Path) -> None:
    child = "import subprocess, sys, time; print('begun', flush=True); "
    child += "print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    outcome = steps.run(python(child, limit=3), tmp_path / "log", 60)
    assert outcome.status == TIMED_OUT
    assert outcome.said[:2] == ("stopped after 3 s", "begun")
    assert not running(int(outcome.said[2]))


def running(pid: int) -> bool:
    """Whether a process does anything; one that was killed may stay until its parent has looked."""
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return False
            os.kill(pid, 0)
        except (ProcessLookupError, FileNotFoundError):
            return False
        time.sleep(0.1)
    return True


def test_what_has_no_time_left_is_not_run(tmp_path: Path) -> None:
    sleeping = [[python("import time; time.sleep(1)", f"step-{i}")] for i in range(4)]
    found = steps.run_all(sleeping, tmp_path, 2.5, lambda _: None)
    assert found[0].status == OK
    assert (found[-1].status, found[-1].said) == (NOT_RUN, ("no time is left",))


def test_the_first_errors_are_shown() -> None:
    text = "\n".join(["collected", "E   assert 1 == 2", "more", "FAILED tests/x.py::test_y", *["end"] * 50])
    assert steps.excerpt(text, FAILED) == ("E   assert 1 == 2", "FAILED tests/x.py::test_y")
    assert len(steps.excerpt("\n".join("abcdefghijklmnopqrstuvwxyz"), TIMED_OUT)) == steps.SHOWN
    assert steps.excerpt("a\nb\n\n", OK) == ("b",)
    assert steps.excerpt("", OK) == ()


def result(model: str, kind: str = "model", batch: int = goals.BATCH, **figures: float) -> dict[str, Any]:
    entries = [{"name": name, "per_second": value} for name, value in figures.items()]
    return {"kind": kind, "model": model, "batch": batch, "dtype": "bfloat16", "entries": entries}


def layer(case: str, microseconds: float, precision: str = "bfloat16", problem: str = "") -> dict[str, Any]:
    return {"case": case, "precision": precision, "microseconds": microseconds, "problem": problem}


def test_goals() -> None:
    trained = result("tnt_s", timm=100.0, fast=320.0)
    for entry, peak in zip(trained["entries"], (1000.0, 390.0), strict=True):
        entry["memory"] = {"peak_mib": peak}
    found = goals.goals(
        {
            "floors": {
                "results": [
                    layer("inner_block backward c=24 heads=4", 1.0),
                    layer("inner_block c=24 heads=4", 1.0, "autocast"),
                    layer("inner_block c=24 heads=4", 111.0),
                    layer("word_to_sentence d=384 c=24", 60.0),
                ]
            },
            "models": {
                "results": [
                    result("tnt_s", batch=1, timm=1.0, fast=100.0),
                    result("tnt_s", timm=100.0, fast=300.0, fast_graph=360.0),
                    result("tnt_s", compile=200.0, fast=390.0, deit_compile=500.0),
                    result("tnt_b", reference=100.0, fast=360.0),
                ]
            },
            "training": {"results": [trained]},
        }
    )
    verdicts = {(goal.what, goal.model): (goal.value, goal.verdict) for goal in found}
    assert verdicts["inner_block, us a layer", "tnt_s"] == (111.0, "MISSED")
    assert verdicts["word_to_sentence, us a layer", "tnt_s"] == (60.0, "reached")
    assert verdicts["inner_block, us a layer", "tnt_b"] == (None, "not measured")
    assert verdicts["inference, times eager", "tnt_s"] == (3.6, "reached")
    assert verdicts["inference, times compiled", "tnt_s"] == (1.95, "MISSED")
    assert verdicts["inference, times compiled DeiT", "tnt_s"] == (0.78, "reached")
    assert verdicts["inference, times eager", "tnt_b"] == (3.6, "reached")
    assert verdicts["training step, times eager", "tnt_s"] == (3.2, "reached")
    assert verdicts["training step, peak memory over eager's", "tnt_s"] == (0.39, "reached")
    assert verdicts["training step, times compiled", "tnt_s"] == (None, "not measured")
    assert verdicts["pixel_embed, us", "tnt_s"] == (None, "not measured")
    assert {goal.verdict for goal in goals.goals({})} == {"not measured"}


def embedding(what: str, dtype: str = "bfloat16", model: str = "tnt_s", **times: float) -> dict[str, Any]:
    """A result of benchmarks/pixel_embed.py."""
    fields = {"model": model, "batch": goals.BATCH, "dtype": dtype, "pass": what}
    return {**fields, "microseconds": times, "problems": {}}


def test_goals_of_the_pixel_embedding() -> None:
    document = {
        "results": [
            embedding("forward", "float32", cuda=1.0, eager=100.0),
            embedding("forward", model="tnt_b", cuda=1.0, eager=100.0),
            embedding("forward", cuda=81.0, triton=70.0, eager=324.0),
            embedding("backward", cuda=100.0, eager=299.0),
            embedding("backward with the image", triton=100.0, eager=900.0),
        ]
    }
    found = {
        goal.what: (goal.model, goal.value, goal.verdict) for goal in goals.goals({"pixel_embed": document})
    }
    assert found["pixel_embed, us"] == ("tnt_s", 81.0, "MISSED")
    assert found["pixel_embed forward, times eager"] == ("tnt_s", 4.0, "reached")
    assert found["pixel_embed backward, times eager"] == ("tnt_s", 2.99, "MISSED")
    assert found["pixel_embed backward with the image, times eager"] == ("tnt_s", None, "not measured")


def test_the_cuda_kernels_are_sanitized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/toolkit/bin/{name}")
    steps_ = {step.name: step for stage in gpu_check.stages(tmp_path) for step in stage}
    for tool in ("memcheck", "racecheck", "initcheck"):
        step = steps_[f"sanitizer-cuda-{tool}"]
        assert step.command[:3] == ("/toolkit/bin/compute-sanitizer", "--tool", tool)
        assert step.command[-2:] == (sys.executable, "benchmarks/cuda_calls.py")
        assert not step.why_not


@pytest.mark.parametrize(
    ("module", "cuda", "nvcc", "built"),
    [(None, None, "", False), ("here", None, "", True), ("here", None, "/toolkit/bin/nvcc", False),
     ("here", "here", "/toolkit/bin/nvcc", True)],
)  # fmt: skip
def test_the_build_is_for_this_gpu(
    module: Any, cuda: Any, nvcc: str, built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: nvcc)
    monkeypatch.setattr(gpu_check, "_in_toolkit", lambda name: "")
    monkeypatch.setattr(gpu_check.native, "load", lambda: module)
    monkeypatch.setattr(gpu_check.native, "cuda", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    step = gpu_check._build()
    assert bool(step.why_not) == built
    assert step.variables == {"TNT_CUDA_ARCHS": "9.0"} | ({"CUDA_HOME": "/toolkit"} if nvcc else {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pixel_embedding_is_checked_before_it_is_timed(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*tensors: torch.Tensor) -> torch.Tensor:
        return pixel_embed.plain(*tensors) * 1.5

    others = {"cpu": partial(pixel_embed.on_backend, "cpu"), "wrong": wrong}
    for name, function in others.items():
        entry = pixel_embed.Entry(name, lambda function=function: function, ours=True)
        monkeypatch.setitem(pixel_embed.ENTRIES, name, entry)
    calls: list[int] = []

    def clock(call: Any, repeats: int) -> float:
        call()
        calls.append(repeats)
        return 2e-6

    names = ("cpu", "wrong", "eager", "channels_last", "cuda")
    rows = pixel_embed.measure("tnt_s", dtype, 3, clock, repeats=7, names=names, device="cpu")
    assert [row["pass"] for row in rows] == list(pixel_embed.PASSES)
    assert calls == [7] * 9
    for row in rows:
        assert row["microseconds"] == pytest.approx({"cpu": 2.0, "eager": 2.0, "channels_last": 2.0})
        assert set(row["problems"]) == {"wrong", "cuda"}
        assert row["problems"]["wrong"].startswith("wrong: error ")
        assert "not on a GPU" in row["problems"]["cuda"]
    text = pixel_embed.report({"date": "2026-01-01", "results": rows})
    assert "backward with the image" in text
    assert "wrong: error" in text


def test_floor_of_the_pixel_embedding() -> None:
    """Of the image read and the words written, and of their products."""

    def floor(**options: Any) -> floors.Floor:
        case = KernelCase("pixel_embed", {"c": 24}, **options)
        return floors.floor_of(case, torch.bfloat16, floors.PEAKS["H100"], ())

    image, words = 256 * 3 * 224 * 224, 256 * 196 * 16 * 24
    assert floor().memory == pytest.approx((image + words) * 2 / 3.0e12)
    assert floor().arithmetic == pytest.approx(words * 147 * 2 / 600e12)
    assert floor(backward=True, only="weight") == floor()
    assert floor(backward=True).memory == pytest.approx((2 * image + words) * 2 / 3.0e12)
    assert floor(backward=True).arithmetic == pytest.approx(2 * floor().arithmetic)
    assert floor().issue is None


@pytest.mark.parametrize("program", ["pixel_embed", "cuda_calls"])
def test_programs_without_a_gpu(program: str) -> None:
    done = subprocess.run(
        [sys.executable, f"benchmarks/{program}.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{program}: torch sees no GPU\n"


def test_the_calls_that_are_sanitized(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the kernels for CPUs in place of those for GPUs."""
    cuda_calls = load("benchmarks/cuda_calls.py")
    seen = []

    def forward(*arguments: Any) -> torch.Tensor:
        image, weight, *_, compute_dtype, _mean, _std = arguments
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        seen.append((weight.shape[0], image.dtype, weight.dtype, compute_dtype, tf32))
        return torch.ops.tnt_kernels.pixel_embed.default(*arguments)

    monkeypatch.setattr(cuda_calls.cuda, "pixel_embed", forward)
    monkeypatch.setattr(
        cuda_calls.cuda, "pixel_embed_backward", torch.ops.tnt_kernels.pixel_embed_backward.default
    )
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(cuda_calls.gpu, "why_no_cuda", lambda index: None)
    monkeypatch.setattr(sys, "argv", ["cuda_calls.py"])
    assert cuda_calls.main() == 0
    assert {c for c, *_ in seen} >= {12, 24, 40, 48, 37, 70}
    assert {tuple(rest) for _, *rest in seen} == set(cuda_calls.PRECISIONS)
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"


def test_the_plan_names_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests/gpu")
    from gpu_cases import RUNS

    plan = [step for stage in gpu_check.stages(tmp_path) for step in stage]
    assert len({step.name for step in plan}) == len(plan)
    for step in plan:
        names = list(step.command)
        if "--entries" in names:
            assert names[names.index("--entries") + 1] in pixel_embed.ENTRIES
        if "--baselines" in names:
            known = training.BASELINES if "--train" in names else models.BASELINES
            given = names[names.index("--baselines") + 1 :]
            given = given[: next(i for i, name in enumerate(given) if name.startswith("--"))]
            assert set(given) <= set(known), step.name
        for name in names:
            if name.startswith(("benchmarks/", "tests/")):
                assert (ROOT / name.split("::")[0]).exists(), name
    for test in gpu_check.SMALL_TESTS:
        *case, backend, precision = test.split("[")[1].removesuffix("]").split("-")
        assert ("-".join(case), backend) in RUNS
        assert precision == "float32"


def test_results_become_a_summary(tmp_path: Path) -> None:
    (tmp_path / "models-tnt_s.json").write_text(
        json.dumps({"results": [result("tnt_s", timm=100.0, fast=360.0)]})
    )
    (tmp_path / "models-tnt_b.json").write_text(
        json.dumps({"results": [result("tnt_b", timm=100.0, fast=300.0)]})
    )
    outcomes = [
        Outcome("tests-1", ("pytest", "tests/gpu"), FAILED, 12.0, ("E   assert 1 == 2",)),
        Outcome("tune", ("tune",), TIMED_OUT, 90.0, ("stopped after 90 s",)),
        Outcome("sanitizer-memcheck", (), NOT_RUN, said=("compute-sanitizer is not installed",)),
        Outcome("models-tnt_s", ("models",), OK, 30.0, ("written",)),
    ]
    gpu_check.write(tmp_path, outcomes, 9)
    text = (tmp_path / "summary.md").read_text()
    assert "4 of 9 steps" in text
    assert "E   assert 1 == 2" in text
    assert "compute-sanitizer is not installed" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    assert ["inference, times eager", "tnt_s", ">= 3.5", "3.6", "reached"] in rows
    assert ["inference, times eager", "tnt_b", ">= 3.5", "3", "MISSED"] in rows
    document = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [step["status"] for step in document["steps"]] == [FAILED, TIMED_OUT, NOT_RUN, OK]
    assert document["device"]["versions"]["torch"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/gpu_check.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_a_gpu(tmp_path: Path) -> None:
    done = run("--output", str(tmp_path / "results"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu_check: torch sees no GPU\n"
    assert not (tmp_path / "results").exists()
    done = run("--output", str(tmp_path / "results"), "--dry-run")
    assert done.returncode == 0
    assert "tests/gpu" in done.stdout
    assert not (tmp_path / "results").exists()
    done = run("--output", str(tmp_path / "results"), "--dry-run", "--only", "tune")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["tune"]


def test_a_gpu_is_named_in_results() -> None:
    gpu = {"name": "NVIDIA H100 80GB HBM3", "driver": "580.1", "cuda": "13.0"}
    from tnt_kernels.bench import environment, results

    device = {**environment.describe(), "gpu": gpu}
    assert environment.slug(device) == "nvidia-h100-80gb-hbm3"
    document = {"device": device, "date": "2026-01-01", "rounds": 0, "results": []}
    assert "NVIDIA H100 80GB HBM3 (driver 580.1, CUDA 13.0)" in results.report(document)


@pytest.mark.parametrize("case", [models.ModelCase, training.TrainingCase])
def test_a_case_on_a_missing_gpu_is_refused(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is cuda, and torch sees no GPU"):
        case("tnt_s", 1, device="cuda")
    with pytest.raises(ValueError, match="device must be one of cpu, cuda, got 'tpu'"):
        case("tnt_s", 1, device="tpu")
