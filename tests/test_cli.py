"""python -m tnt_kernels: info, verify, bench, demo."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from tnt_kernels import dispatch, gpu, native
from tnt_kernels.__main__ import main
from tnt_kernels._timm import import_timm
from tnt_kernels.bench import accuracy, environment
from tnt_kernels.cli import demo, photo, verify
from tnt_kernels.models.tnt import TNT, tnt_ti_patch16_224

ROOT = Path(__file__).parents[1]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tnt_kernels", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )


def test_info_tells_versions_and_tiers(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in text
    module = native.load()
    if module is not None:
        assert f"tier {module.tier()}" in text
        assert "usable, active" in text


def test_info_json(capsys, monkeypatch):
    monkeypatch.setenv("TNT_SOMETHING", "1")
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"]
    assert found["environment"]["TNT_SOMETHING"] == "1"
    assert {b["name"] for b in found["backends"]} >= {"reference", "cpu"}
    assert found["native"]["loaded"] == (native.load() is not None)
    assert sum(t["usable"] for t in found["native"]["tiers"]) >= found["native"]["loaded"]


def test_info_tells_gpus(capsys, monkeypatch):
    h100 = {
        "name": "NVIDIA H100", "capability": "9.0", "multiprocessors": 132, "memory_gib": 79.1,
        "driver": "580.1", "cuda": "13.0",
    }  # fmt: skip
    monkeypatch.setattr(environment, "gpus", lambda: [dict(h100), dict(h100)])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    reasons = [None, "Triton cannot be imported"]
    monkeypatch.setattr(gpu, "why_unusable", lambda index: reasons[index])
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["usable"] for one in found["gpus"]] == [True, False]
    assert next(b for b in found["backends"] if b["name"] == "triton")["usable"]
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "NVIDIA H100, compute capability 9.0, 79.1 GiB, driver 580.1, CUDA 13.0; usable" in text
    assert "not usable: Triton cannot be imported" in text

    reasons[0] = "Triton cannot run a kernel"
    assert main(["info", "--json"]) == 0
    backends = {b["name"]: b for b in json.loads(capsys.readouterr().out)["backends"]}
    assert backends["triton"]["reason"] == "Triton cannot run a kernel"


def test_info_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(environment, "gpus", list)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^GPUs\n +\(none\) +torch sees no GPU$", text, re.MULTILINE)
    assert re.search(r"^ +triton +not usable: torch sees no GPU$", text, re.MULTILINE)


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_a_missing_gpu_is_an_error(command, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([command, "--device", "cuda"]) == 2
    assert capsys.readouterr().err.endswith(f"{command}: device is cuda, and torch sees no GPU\n")


def test_info_without_the_native_module(capsys, monkeypatch):
    monkeypatch.setattr(native, "_module", None)
    monkeypatch.setattr(native, "_reason", "it was not built")
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "loaded  no: it was not built" in text
    assert "not usable: it was not built" in text


@pytest.mark.parametrize(
    ("variable", "value"),
    [("TNT_CPU_TIER", "nothing"), ("TNT_BACKEND", "nothing"), ("TNT_CPU_TIER", "portable")],
)
def test_info_survives_the_environment(variable, value):
    done = run("info", **{variable: value})
    assert done.returncode == 0, done.stderr
    assert value in done.stdout


def test_verify_quick_passes(capsys):
    assert main(["verify", "--quick"]) == 0
    text = capsys.readouterr().out
    assert "FAILED" not in text
    for what in ("pixel_embed", "inner_block", "word_to_sentence", "outer_block", "FastTNT", "training step"):
        assert what in text
    for op in dispatch.TRAINABLE:
        assert f"{op} gradients" in text


def test_verify_fails_on_a_wrong_result(capsys, monkeypatch):
    def some(quick, device):
        yield verify._op("inner_mlp", "tnt_ti", 1, verify.PRECISIONS[0], "cpu")
        wrong = verify._op("inner_attention", "tnt_ti", 1, verify.PRECISIONS[0], "cpu")
        yield verify.Subject(
            wrong.what,
            wrong.size,
            wrong.precision,
            ours=lambda: wrong.eager() + 1e-3,
            eager=wrong.eager,
            exact=wrong.exact,
        )
        yield verify.Subject(
            "broken", "x", wrong.precision, ours=lambda: 1 / 0, eager=wrong.eager, exact=wrong.exact
        )

    monkeypatch.setattr(verify, "_subjects", some)
    assert main(["verify"]) == 1
    text = capsys.readouterr().out
    assert "FAILED inner_attention" in text
    assert "FAILED broken, x, float32" in text
    assert "ZeroDivisionError" in text
    assert "1 of 3 passed" in text


def test_verify_names_the_wrong_gradient(capsys, monkeypatch):
    right = verify._op_gradients("inner_mlp", "tnt_ti", 1, verify.PRECISIONS[0], "cpu")
    wrong = {**right.eager(), "x": [right.eager()["x"][0] * 1.001]}
    subject = dataclasses.replace(right, ours=lambda: wrong)
    missing = dataclasses.replace(right, what="missing", ours=lambda: {"x": wrong["x"]})
    monkeypatch.setattr(verify, "_subjects", lambda quick, device: [right, subject, missing])
    assert main(["verify"]) == 1
    text = capsys.readouterr().out
    assert "FAILED inner_mlp gradients, TNT-Ti, float32" in text
    assert "error of x " in text
    assert "error of small parameters inf" in text
    assert "1 of 3 passed" in text


def test_verify_float32_logits_must_lie_near_eager(monkeypatch, capsys):
    exact = torch.zeros(4, dtype=torch.float64)
    subject = verify.Subject(
        "m",
        "x",
        verify.PRECISIONS[0],
        lambda: exact.float() + 1e-3,
        lambda: exact.float() - 1e-3,
        lambda: exact,
        1e-4,
    )
    monkeypatch.setattr(verify, "_subjects", lambda quick, device: [subject])
    assert main(["verify"]) == 1
    assert "from eager's logits" in capsys.readouterr().out


def test_bench_writes_json_and_a_table(tmp_path, capsys):
    output = tmp_path / "r.json"
    arguments = ["--model", "tnt_ti", "--batch", "1", "--dtype", "float32", "--rounds", "1", "--no-memory"]
    assert main(["bench", *arguments, "--baselines", "reference", "fast", "--output", str(output)]) == 0
    assert "FastTNT" in capsys.readouterr().out
    (result,) = json.loads(output.read_text())["results"]
    assert [e["status"] for e in result["entries"]] == ["ok", "ok"]


def test_bench_fails_where_a_check_fails(monkeypatch, capsys):
    monkeypatch.setattr(accuracy, "FLOOR", -1.0)
    arguments = ["--model", "tnt_ti", "--batch", "1", "--dtype", "float32", "--rounds", "1", "--no-memory"]
    assert main(["bench", *arguments, "--baselines", "fast"]) == 1
    assert "WRONG, not timed" in capsys.readouterr().out


def test_bench_of_training(tmp_path, capsys):
    output = tmp_path / "r.json"
    arguments = ["--model", "tnt_ti", "--batch", "1", "--dtype", "float32", "--rounds", "1", "--no-memory"]
    arguments += ["--train", "--drop-path", "0.1", "--baselines", "reference", "fast"]
    assert main(["bench", *arguments, "--output", str(output)]) == 0
    assert "TNT-Ti, training step, batch 1, float32, drop path 0.1" in capsys.readouterr().out
    (result,) = json.loads(output.read_text())["results"]
    assert (result["kind"], result["drop_path"]) == ("training", 0.1)
    assert [e["status"] for e in result["entries"]] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--drop-path", "0.1"), "--drop-path needs --train"),
        (("--train", "--baselines", "openvino"), "baselines must be of timm, .*; got openvino"),
    ],
)
def test_bench_refuses_what_does_not_go_together(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("option", "value", "needed"),
    [
        *(("--batch", value, "a whole number of at least 1") for value in ("0", "-1", "x")),
        *(("--rounds", value, "a whole number of at least 0") for value in ("-1", "x")),
        *(("--drop-path", value, r"a number in [0, 1)") for value in ("1", "-0.1", "nan", "x")),
    ],
)
def test_bad_numbers_are_refused(option, value, needed, capsys):
    with pytest.raises(SystemExit):
        main(["bench", option, value])
    assert f"{needed} is needed" in capsys.readouterr().err


def demo_arguments(tmp_path: Path, *more: str) -> list[str]:
    return ["demo", "--model", "tnt_ti", "--rounds", "1", "--output", str(tmp_path / "demo.png"), *more]


def test_demo(tmp_path, capsys):
    pytest.importorskip("PIL")
    pytest.importorskip("matplotlib")
    assert main(demo_arguments(tmp_path)) == 0
    text = capsys.readouterr().out
    assert "same top-5: yes" in text
    assert "random weights (seed 0): the classes mean nothing" in text
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_demo_without_matplotlib(tmp_path, capsys, monkeypatch):
    pytest.importorskip("PIL")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert main(demo_arguments(tmp_path)) == 0
    text = capsys.readouterr().out
    assert "no plot: matplotlib is not installed" in text
    assert not (tmp_path / "demo.png").exists()


def test_demo_without_pillow(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert main(demo_arguments(tmp_path)) == 2
    assert "needs Pillow" in capsys.readouterr().err


def test_demo_takes_a_checkpoint_and_an_image(tmp_path, capsys):
    image_module = pytest.importorskip("PIL.Image")
    torch.manual_seed(5)
    torch.save(
        {
            "state_dict": TNT(
                outer_dim=192, inner_dim=12, outer_num_heads=3, inner_num_heads=2, num_classes=3
            ).state_dict()
        },
        tmp_path / "w.pth.tar",
    )
    image_module.new("RGB", (40, 90), "red").save(tmp_path / "red.png")
    more = ("--checkpoint", str(tmp_path / "w.pth.tar"), "--image", str(tmp_path / "red.png"))
    assert main(demo_arguments(tmp_path, *more)) == 0
    text = capsys.readouterr().out
    assert "red.png, 40 x 90 pixels" in text
    assert "checkpoint w.pth.tar" in text
    assert "class 2" in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--image", "nothing.jpg"), "nothing.jpg"),
        (("--checkpoint", "nothing.pth"), "nothing.pth"),
        (("--output", "no/such/folder/demo.png"), "no/such/folder"),
    ],
)
def test_demo_bad_files(tmp_path, capsys, more, message):
    pytest.importorskip("PIL")
    assert main(demo_arguments(tmp_path, *more)) == 2
    assert message in capsys.readouterr().err


def test_demo_file_that_is_no_image(tmp_path, capsys):
    pytest.importorskip("PIL")
    (tmp_path / "x.jpg").write_text("no image")
    assert main(demo_arguments(tmp_path, "--image", str(tmp_path / "x.jpg"))) == 2
    assert "x.jpg" in capsys.readouterr().err


def test_demo_fails_where_the_answers_differ(tmp_path, capsys, monkeypatch):
    pytest.importorskip("PIL")

    class Other(TNT):
        @classmethod
        def from_reference(cls, model):
            torch.manual_seed(1)
            return tnt_ti_patch16_224()

    monkeypatch.setattr(demo, "FastTNT", Other)
    assert main(demo_arguments(tmp_path)) == 1
    assert "same top-5: NO" in capsys.readouterr().out


def test_preprocessing_is_timms():
    image_module = pytest.importorskip("PIL.Image")
    try:
        timm = import_timm()
    except ImportError as error:
        pytest.skip(str(error))
    transform = timm.data.create_transform(
        (3, 224, 224), interpolation="bicubic", crop_pct=0.9, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    values = np.random.default_rng(0).integers(0, 256, (301, 452, 3), dtype=np.uint8)
    for array in (values, values.transpose(1, 0, 2), values[:, :301], values[:100, :60]):
        image = image_module.fromarray(np.ascontiguousarray(array))
        ours = photo.to_tensor(photo.crop(image, 224, 224))
        torch.testing.assert_close(ours[0], transform(image), rtol=0, atol=1e-6)


def test_photograph_comes_with_its_licence():
    assets = resources.files("tnt_kernels") / "assets"
    assert len((assets / "chelsea.jpg").read_bytes()) < 100_000
    assert "CC0" in (assets / "README.md").read_text()


def test_help_and_version(capsys):
    for arguments in (["--help"], ["--version"], ["info", "--help"], ["bench", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    assert "bench" in capsys.readouterr().out
