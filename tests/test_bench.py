"""The benchmark engine: statistics, checks, entries that fail, training, memory, result files."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tnt_kernels import dispatch
from tnt_kernels._timm import import_timm
from tnt_kernels.bench import (
    accuracy,
    cases,
    engine,
    environment,
    gradients,
    memory,
    models,
    ops,
    results,
    timing,
    training,
)
from tnt_kernels.bench.cases import Baseline, NotRunError, Runner


class TinyCase:
    """x -> 2x, with baselines that are right, wrong, slow to set up and broken."""

    kind = "op"
    unit = "images/s"
    dtype = "float32"
    device = "cpu"
    title = "tiny"
    items = 4
    x = torch.linspace(-1, 1, 64)

    def fields(self):
        return {"op": "tiny"}

    def exact(self, family):
        return self.x.double() * 2

    def eager(self, family):
        return self.x * 2

    def checked(self, output):
        return output

    def baselines(self):
        return {b.name: b for b in self._baselines()}

    def _baselines(self):
        def runner(function):
            return lambda case, artifacts: Runner(lambda: function(self.x), torch.float32, "a note")

        def broken(case, artifacts):
            raise RuntimeError("it broke\nand said more")

        def absent(case, artifacts):
            raise NotRunError("nowhere is not installed")

        yield Baseline("eager", "eager", runner(lambda x: x * 2))
        yield Baseline("fast", "fast", runner(lambda x: x + x), ours=True)
        yield Baseline("slightly_off", "slightly off", runner(lambda x: x * 2.0001), ours=True)
        yield Baseline("nan", "nan", runner(lambda x: x * math.nan))
        yield Baseline("shape", "shape", runner(lambda x: x[:-1] * 2))
        yield Baseline("broken", "broken", broken)
        yield Baseline("absent", "absent", absent)


def run_tiny(**kwargs):
    names = list(TinyCase().baselines())
    return engine.run([TinyCase()], names, rounds=3, with_memory=False, **kwargs)


def entry_of(document, name):
    return next(e for e in document["results"][0]["entries"] if e["name"] == name)


def test_only_checked_entries_get_a_time():
    document = run_tiny()
    entries = {e["name"]: e for e in document["results"][0]["entries"]}
    assert {n: e["status"] for n, e in entries.items()} == {
        "eager": "ok",
        "fast": "ok",
        "slightly_off": "wrong",
        "nan": "wrong",
        "shape": "wrong",
        "broken": "not run",
        "absent": "not run",
    }
    for name, entry in entries.items():
        assert ("per_second" in entry) == (name in ("eager", "fast"))
    assert entries["broken"]["reason"] == "RuntimeError: it broke and said more"
    assert entries["absent"]["reason"] == "nowhere is not installed"
    assert entries["fast"]["per_second"] == pytest.approx(4e3 / entries["fast"]["median_ms"])
    assert len(entries["fast"]["samples_ms"]) == 3
    assert len(results.wrong(document)) == 3


def test_report_shows_what_ran_and_why_the_rest_did_not():
    text = results.report(run_tiny())
    assert "slightly off: WRONG, not timed: error" in text
    assert "absent: not run: nowhere is not installed" in text
    assert "fast: a note" in text
    assert "/ eager" in text


def test_document_survives_a_file(tmp_path):
    document = run_tiny()
    path = tmp_path / "sub" / "r.json"
    results.save(document, path)
    assert results.load(path) == document
    assert {"date", "rounds", "device", "results"} <= set(document)
    assert document["device"]["threads"] == 1
    assert document["device"]["versions"]["torch"].startswith(torch.__version__.split("+")[0])


@pytest.mark.parametrize("content", ["no json", "[]", "{}"])
def test_foreign_result_file_is_refused(tmp_path, content):
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"r\.json"):
        results.load(path)


def test_unknown_baseline_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match=r"baselines must be of eager, .*; got nothing"):
        engine.run([TinyCase()], ["eager", "nothing"])


def test_threads_are_set_and_given_back():
    seen = []

    class Case(TinyCase):
        def eager(self, family):
            seen.append(torch.get_num_threads())
            return super().eager(family)

    engine.run([Case()], ["eager"], rounds=1, threads=2, with_memory=False)
    assert set(seen) == {2}
    assert torch.get_num_threads() == 1
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        engine.run([Case()], ["eager"], threads=0)


def test_rounds_are_interleaved_and_rotate(monkeypatch):
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    monkeypatch.setattr(timing, "SETTLE_SECONDS", 0.0)
    found = timing.interleave(calls, rounds=3, visit_seconds=0.0)
    assert "".join(order) == "aabbcc" + "abc" + "bca" + "cab"
    assert all(len(t.samples) == 3 for t in found.values())
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        timing.interleave(calls, rounds=0)


def test_statistics():
    t = timing.Timing((4.0, 1.0, 2.0, 3.0, 5.0))
    assert t.median == 3.0
    assert t.quartiles == (2.0, 4.0)
    assert t.spread == pytest.approx(2 / 3)
    assert timing.Timing((2.0,)).spread == 0.0


def test_limit_of_error():
    exact = torch.tensor([0.0, 1.0, -100.0], dtype=torch.float64)
    eager = (exact + 1e-3).float()
    assert accuracy.as_accurate_as_eager((exact + 1.4e-3).float(), eager, exact).passed
    assert not accuracy.as_accurate_as_eager((exact + 1.8e-3).float(), eager, exact).passed
    assert accuracy.as_accurate_as_eager((exact + 5e-5).float(), exact, exact).passed
    assert not accuracy.as_accurate_as_eager(torch.full((3,), math.nan), eager, exact).passed
    assert not accuracy.as_accurate_as_eager(eager[:2], eager, exact).passed
    assert not accuracy.close_enough((exact + 0.2).float(), eager, exact, torch.float32).passed


def test_error_of_gradients_counts_each_alike_in_its_own_units():
    exact = [torch.tensor([100.0, -50.0], dtype=torch.float64), torch.ones(8, dtype=torch.float64)]
    off = [exact[0] + torch.tensor([3.0, -3.0]), exact[1] + 0.04]
    assert accuracy.rms_error(off, exact) == pytest.approx(((0.03**2 + 0.04**2) / 2) ** 0.5)
    assert accuracy.rms_error(exact, exact) == 0.0
    assert accuracy.rms_error(exact[:1], exact) == math.inf
    assert accuracy.rms_error([exact[0], exact[1][:4]], exact) == math.inf
    assert accuracy.rms_error([torch.zeros(3)], [torch.zeros(3, dtype=torch.float64)]) == 0.0


def test_gradients_are_judged_by_their_worst_group():
    exact = {name: [torch.linspace(-1, 1, 64, dtype=torch.float64)] for name in ("a", "b")}
    eager = {name: [group[0] + 1e-3] for name, group in exact.items()}
    result = {"a": [exact["a"][0] + 1.4e-3], "b": [exact["b"][0] + 1e-4]}
    found = accuracy.as_accurate_as_eager(result, eager, exact)
    assert (found.group, found.passed) == ("a", True)
    assert found.ratio == pytest.approx(1.4)
    for wrong in ([exact["b"][0] + 1.6e-3], [exact["b"][0] * math.nan], [exact["b"][0][:3]], []):
        found = accuracy.as_accurate_as_eager({**result, "b": wrong}, eager, exact)
        assert (found.group, found.passed) == ("b", False)
    assert not accuracy.as_accurate_as_eager({"a": result["a"]}, eager, exact).passed
    rough = {**eager, "a": [exact["a"][0] + 5e-3]}
    assert accuracy.close_enough(rough, eager, exact, torch.bfloat16).passed
    assert not accuracy.close_enough(rough, eager, exact, torch.float32).passed


def test_ratios_divide_by_the_fastest_other():
    def entry(name, speed):
        return {"name": name, "status": "ok", "per_second": speed}

    missing = {"name": "deit", "status": "not run"}
    result = {"kind": "model", "entries": [entry("timm", 10.0), entry("compile", 20.0), missing]}
    result["entries"] += [entry("openvino", 25.0), entry("fast", 50.0)]
    found = results.ratios(result)
    assert found["/ eager TNT"]["fast"] == 5.0
    assert found["/ best other TNT"]["fast"] == 2.0
    assert "/ eager DeiT" not in found


def test_table_is_aligned():
    lines = results.table(["", "n"], [["a", "1"], ["bcd", "20"]], right=(1,)).splitlines()
    assert lines == ["|     |   n |", "| --- | --: |", "| a   |   1 |", "| bcd |  20 |"]


def test_slug_names_the_device():
    device = {"processor": {"name": "Intel(R) Xeon(R) Platinum 8480C", "cores": 4}}
    assert environment.slug(device) == "intel-xeon-platinum-8480c-4-cores"


@pytest.mark.parametrize("op", list(ops.OPS))
@pytest.mark.parametrize("dtype", list(cases.DTYPES))
def test_every_op_has_baselines_that_pass_their_check(op, dtype):
    case = ops.OpCase(op, "tnt_s", 1, dtype)
    document = engine.run([case], ["eager", "fast"], rounds=1, with_memory=False)
    for entry in document["results"][0]["entries"]:
        if entry["status"] == "not run":
            assert "_native" in entry["reason"]
        else:
            assert entry["status"] == "ok", entry["reason"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing", "tnt_s", 1, "float32"), "op must be one of pixel_embed"),
        (("inner_mlp", "vit", 1, "float32"), "model must be one of tnt_ti"),
        (("inner_mlp", "tnt_s", 0, "float32"), "batch must be at least 1, got 0"),
        (("inner_mlp", "tnt_s", 1, "int8"), "dtype must be one of float32, bfloat16, got 'int8'"),
    ],
)
def test_bad_op_case(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.OpCase(*arguments)


def test_forced_tier_is_given_back():
    from tnt_kernels import native

    module = native.load()
    if module is None:
        pytest.skip(str(native.why_missing()))
    before = module.tier()
    with ops.forced_tier("portable"):
        assert module.tier() == "portable"
    assert module.tier() == before
    with pytest.raises(NotRunError, match="SIMD tier nothing: not built"), ops.forced_tier("nothing"):
        pass


def test_checked_images_hold_the_first_and_the_last():
    assert models.checked_images(1) == [0]
    assert models.checked_images(8) == list(range(8))
    many = models.checked_images(100)
    assert (many[0], many[-1], len(many)) == (0, 99, 8)


def test_randomize_leaves_nothing_trivial():
    model = models.randomize(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)), seed=3)
    assert all(p.unique().numel() == p.numel() for p in model.parameters())
    again = models.randomize(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_compile_without_a_compiler_is_not_run(monkeypatch):
    from torch._inductor import cpp_builder

    def none():
        raise RuntimeError("no compiler")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(NotRunError, match=r"needs a C\+\+ compiler"):
        cases.compiled(torch.sin)


@pytest.mark.parametrize("name", ["timm", "fast", "accelerate", "reference", "deit"])
def test_model_baselines_pass_their_check(name):
    if name not in ("fast", "reference"):
        try:
            import_timm()
        except ImportError as error:
            pytest.skip(str(error))
    document = engine.run([models.ModelCase("tnt_ti", 1)], [name], rounds=1, with_memory=False)
    (entry,) = document["results"][0]["entries"]
    assert entry["status"] == "ok", entry["reason"]


def test_without_timm_its_entries_are_not_run(monkeypatch):
    def none():
        raise ImportError("timm is not installed")

    monkeypatch.setattr(models, "import_timm", none)
    for cache in (models.eager_model, models.exact_logits, models.eager_logits):
        cache.cache_clear()
    try:
        case = models.ModelCase("tnt_ti", 1)
        document = engine.run([case], ["timm", "fast", "deit"], rounds=1, with_memory=False)
        found = {e["name"]: (e["status"], e["reason"]) for e in document["results"][0]["entries"]}
        assert found["timm"] == found["deit"] == ("not run", "timm is not installed")
        assert found["fast"][0] == "ok"
    finally:
        for cache in (models.eager_model, models.exact_logits, models.eager_logits):
            cache.cache_clear()


def test_rounds_of_zero_leave_out_the_timing():
    document = engine.run([TinyCase()], ["eager", "slightly_off"], rounds=0, with_memory=False)
    eager, off = document["results"][0]["entries"]
    assert (eager["status"], off["status"]) == ("ok", "wrong")
    assert "median_ms" not in eager
    text = results.report(document)
    assert "Medians" not in text
    assert "| eager |" in text
    with pytest.raises(ValueError, match="rounds must be at least 0, got -1"):
        engine.run([TinyCase()], ["eager"], rounds=-1)


@pytest.mark.parametrize(
    "op", [name for name, op in ops.OPS.items() if op.function.__name__ in dispatch.TRAINABLE]
)
@pytest.mark.parametrize("dtype", list(cases.DTYPES))
def test_gradients_of_every_trainable_op_pass_their_check(op, dtype):
    case = ops.OpCase(op, "tnt_s", 1, dtype, backward=True)
    assert "forward + backward" in case.title
    document = engine.run([case], ["eager", "fast"], rounds=1, with_memory=False)
    for entry in document["results"][0]["entries"]:
        if entry["status"] == "not run":
            assert "_native" in entry["reason"]
        else:
            assert entry["status"] == "ok", entry["reason"]
            assert entry["check"]["group"]


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_backends_for_gpus_do_not_run_on_the_cpu(backend):
    document = engine.run(
        [ops.OpCase("pixel_embed", "tnt_s", 1)], ["eager", backend], rounds=1, with_memory=False
    )
    entry = entry_of(document, backend)
    assert (entry["status"], entry["reason"]) == ("not run", f"the {backend} backend is for GPUs")


def test_backends_of_an_op_on_a_gpu(monkeypatch):
    """Those that have kernels for it; the fastest of them is what the package takes by itself."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops.gpu, "why_unusable", lambda index: None)
    monkeypatch.setattr(ops.gpu, "why_no_cuda", lambda index: None)
    forced = []
    monkeypatch.setattr(ops, "_runner", lambda case, function, backend: forced.append(backend))
    for op in ("pixel_embed", "pixel_embed_legacy", "inner_mlp"):
        case = ops.OpCase(op, "tnt_s", 1, device="cuda")
        for name in ("fast", "triton"):
            ops.BASELINES[name].build(case, Path())
    assert forced == ["cuda", "triton", "cuda", "triton", "triton", "triton"]
    with pytest.raises(NotRunError, match="the cuda backend has no kernel for inner_mlp"):
        ops.BASELINES["cuda"].build(case, Path())
    assert set(ops.GPU_NAMES) < set(ops.BASELINES)
    assert set(ops.CPU_NAMES) == set(ops.BASELINES) - {"cuda", "triton"}


def test_backward_gives_every_gradient_of_an_op():
    tensors, options = ops.arguments("inner_attention", "tnt_ti", 1)
    backward = ops.Backward(ops.OPS["inner_attention"].function, tensors, options, torch.float32)
    found = backward.gradients()
    assert [g.shape for g in found] == [t.shape for t in tensors if t is not None]
    assert all(g.abs().sum() > 0 for g in found)
    groups = backward.result("inner_attention")
    assert list(groups) == ["x", "small parameters"]
    assert len(groups["small parameters"]) == len(found) - 1


def needs_timm():
    try:
        import_timm()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ["timm", "reference", "fast", "accelerate", "deit"])
def test_training_baselines_pass_their_check(name):
    if name not in ("reference", "fast"):
        needs_timm()
    case = training.TrainingCase("tnt_ti", 1, drop_path=0.1)
    document = engine.run([case], [name], rounds=1, with_memory=False)
    (entry,) = document["results"][0]["entries"]
    assert entry["status"] == "ok", entry["reason"]
    assert entry["per_second"] > 0


def test_training_in_bfloat16_passes_its_check():
    document = engine.run(
        [training.TrainingCase("tnt_ti", 1, "bfloat16")], ["fast"], rounds=0, with_memory=False
    )
    (entry,) = document["results"][0]["entries"]
    assert entry["status"] == "ok", entry["reason"]


def test_wrong_gradients_get_no_figure(monkeypatch):
    def wrong(case, artifacts):
        model = models.eager_network(case.model, "tnt")
        model.blocks[3].norm2_proj.bias.register_hook(lambda grad: grad * 1.01)
        return training._runner(case, model)

    monkeypatch.setitem(training.BASELINES, "fast", Baseline("fast", "wrong", wrong, ours=True))
    needs_timm()
    document = engine.run([training.TrainingCase("tnt_ti", 1)], ["fast"], rounds=1, with_memory=False)
    (entry,) = document["results"][0]["entries"]
    assert entry["status"] == "wrong"
    assert "error of blocks.*.norm2_proj" in entry["reason"]
    assert "per_second" not in entry


def test_a_training_step_updates_and_drops_the_gradients():
    model = copy.deepcopy(models.reference("tnt_ti"))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    runner = training._runner(training.TrainingCase("tnt_ti", 1), model)
    first, second = runner.call(), runner.call()
    assert second < first
    unused = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert unused == {"outer_tokens"}
    assert all(p.grad is None for p in model.parameters())


def test_the_step_that_is_checked_leaves_nothing_behind():
    model = copy.deepcopy(models.reference("tnt_ti", 0.2))
    before, state = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
    image, label = models.images(1), training.labels(1)
    first = training.step_gradients(model, model, image, label, "float32")
    again = training.step_gradients(model, model, image, label, "float32")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(model.parameters(), before, strict=True))
    for group, found in first.items():
        assert all(map(torch.equal, found, again[group])), group


def test_groups_are_the_same_under_every_naming():
    needs_timm()
    timm, plain = models.timm_tnt("tnt_ti"), copy.deepcopy(models.reference("tnt_ti"))
    for model in (timm, plain):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    expected, found = gradients.of_model(timm), gradients.of_model(plain)
    shapes = {group: [g.shape for g in members] for group, members in expected.items()}
    assert {group: [g.shape for g in members] for group, members in found.items()} == shapes
    assert len(shapes["blocks.*.attn_in"]) == 12 * 4


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    weight = torch.nn.Parameter(torch.randn(64, 32))
    x = torch.randn(16, 32, requires_grad=True)

    def forward():
        y = torch.nn.functional.linear(x, weight)  # saves x, weight
        z = y.tanh()  # saves z
        return (z * z[:]).sum()  # saves z and a view of it

    assert gradients.saved_bytes(forward, [weight]) == 4 * (x.numel() + 16 * 64)
    assert gradients.saved_bytes(forward, []) == 4 * (x.numel() + 16 * 64 + weight.numel())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vit", 1), "model must be one of tnt_ti"),
        (("tnt_s", 0), "batch must be at least 1, got 0"),
        (("tnt_s", 1, "int8"), "dtype must be one of float32, bfloat16, got 'int8'"),
        (("tnt_s", 1, "float32", 1.0), r"drop_path must lie in \[0, 1\), got 1.0"),
    ],
)
def test_bad_training_case(arguments, message):
    with pytest.raises(ValueError, match=message):
        training.TrainingCase(*arguments)


def test_report_of_training_compares_memory_with_eager():
    def entry(name, saved, speed):
        return {
            "name": name,
            "label": name,
            "status": "ok",
            "note": "",
            "check": {"error": 1.0, "eager_error": 2.0},
            "memory": {"saved_mib": saved, "call_mib": 2 * saved, "peak_mib": 900.0, "measure": "peak"},
            **({"per_second": speed, "median_ms": 4e3 / speed, "spread": 0.0} if speed else {}),
        }

    document = run_tiny()
    document["results"] = [
        {
            "kind": "training",
            "title": f"case {i}",
            "unit": "images/s",
            "entries": [entry("timm", 200.0, speed), entry("fast", 80.0, 2 * speed)],
        }
        for i, speed in enumerate((10.0, 0.0))
    ]
    text = results.report(document)
    assert "### held MiB" in text
    assert "| case 0 |  200 |   80 |" in text
    rows = [line for line in text.splitlines() if line.startswith("| fast")]
    assert [cell.strip() for cell in rows[0].split("|")[2:-1]] == [
        "20.0", "200", "0.0%", "2.00", "80", "0.40", "160", "0.40", "900", "0.50",
    ]  # fmt: skip
    assert [cell.strip() for cell in rows[1].split("|")[2:-1]] == ["80", "0.40", "160", "0.40", "900", "0.50"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_sees_what_a_call_needs():
    program = (
        "import json, torch\n"
        "from tnt_kernels.bench import memory\n"
        "print(json.dumps(memory.watch(lambda: (torch.ones(2**24) + 1).sum())))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    if found["call_mib"] is None:
        pytest.skip("the peak cannot be reset here")
    assert 100 < found["call_mib"] < 200
    assert found["peak_mib"] > found["call_mib"]


def test_memory_of_an_entry_in_its_own_process(tmp_path):
    found = memory.measure(ops.OpCase("inner_mlp", "tnt_ti", 1), "eager", tmp_path, threads=1)
    assert found["peak_mib"] > 50
    assert found["measure"]
    with pytest.raises(RuntimeError, match="exit status 1: KeyError: 'nothing'"):
        memory.measure(ops.OpCase("inner_mlp", "tnt_ti", 1), "nothing", tmp_path, threads=1)


def test_memory_of_a_training_step_in_its_own_process(tmp_path):
    found = memory.measure(training.TrainingCase("tnt_ti", 1), "fast", tmp_path, threads=1)
    assert 10 < found["saved_mib"] < found["peak_mib"]


def run_script(name: str, *arguments: str) -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, str(root / "benchmarks" / name), *arguments]
    variables = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run(command, check=True, capture_output=True, env=variables)


def test_report_script_writes_tables_and_plots(tmp_path):
    pytest.importorskip("matplotlib")
    document = run_tiny()
    untimed = {
        **document["results"][0],
        "entries": [{**entry_of(document, "eager"), "memory": {"saved_mib": 10.0}}],
    }
    del untimed["entries"][0]["per_second"], untimed["entries"][0]["median_ms"]
    document["results"].append(untimed)
    results.save(document, tmp_path / "tiny.json")
    run_script("report.py", str(tmp_path / "tiny.json"))
    assert "| fast " in (tmp_path / "tiny.md").read_text()
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [
        ("models.py", "--train", "--rounds", "0", "--no-memory", "--baselines", "fast"),
        ("ops.py", "--backward", "--rounds", "1", "--op", "inner_mlp", "--baselines", "eager"),
    ],
)
def test_scripts_measure_training(tmp_path, arguments):
    size = ("--model", "tnt_ti", "--batch", "1", "--dtype", "float32")
    run_script(*arguments, *size, "--output", str(tmp_path / "r.json"))
    (result,) = results.load(tmp_path / "r.json")["results"]
    assert "training step" in result["title"] or "forward + backward" in result["title"]
    (entry,) = result["entries"]
    assert entry["status"] == "ok", entry["reason"]


def test_result_files_in_the_repository_are_readable():
    for path in (Path(__file__).parents[1] / "benchmarks" / "results").glob("*.json"):
        assert results.report(results.load(path))
        assert json.loads(path.read_text())["schema"] == engine.SCHEMA
