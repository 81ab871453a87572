"""The tuner, as far as it goes without a GPU: what it tries, what it refuses, what it writes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tnt_kernels.backends.triton import configs
from tnt_kernels.backends.triton.configs import Config, Wanted
from tnt_kernels.bench import tuning
from tnt_kernels.bench.kernel_cases import PRECISIONS, KernelCase, cases

ROOT = Path(__file__).resolve().parent.parent.parent
CASE = KernelCase("inner_block", {"c": 24, "heads": 4})
WANTED = Wanted("inner_block", torch.bfloat16, 24)


def trial(config: Config, milliseconds: float | None, problem: str = "") -> tuning.Trial:
    return tuning.Trial("case", "bfloat16", WANTED, config, milliseconds, problem)


def subject() -> tuning.Subject:
    (found,) = tuning.subjects([CASE], ["bfloat16"], 90)
    return found


def test_every_kernel_of_the_table_is_tuned() -> None:
    found = tuning.subjects([case for case in cases() if not case.odd], list(PRECISIONS), 90)
    assert {one.wanted.kernel for one in found} == set(configs.table())
    assert not any(one.case.op.endswith("_train") for one in found)
    assert len({one.wanted for one in found}) == len(found)


def test_candidates() -> None:
    one = subject()
    assert one.wanted == WANTED
    assert one.current == configs.config_of("inner_block", 90, torch.bfloat16, 24)
    for quick in (True, False):
        found = one.candidates(quick)
        assert found[0] == one.current
        assert len(found) == len(set(found)) > 3
    assert set(one.candidates(True)) < set(one.candidates(False)) | {one.current}


def test_a_forced_configuration_is_compiled() -> None:
    forced = Config(32, 2)
    with configs.forced("inner_block", forced):
        launches = CASE.launches("bfloat16", 90)
    assert forced in [launch.config for launch in launches]
    assert forced not in [launch.config for launch in CASE.launches("bfloat16", 90)]


def test_what_does_not_compile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one = subject()
    bad = Config(48, 4)  # no power of two
    monkeypatch.setattr(tuning.Subject, "candidates", lambda *_: [one.current, bad])
    problems = tuning.refused([one], True, 90)
    assert (one, one.current) not in problems
    assert problems[one, bad]


def test_wrong_results_are_seen() -> None:
    right = torch.randn(100)
    assert tuning.why_wrong(right + 1e-5, right) == ""
    assert "wrong" in tuning.why_wrong(right + 0.1, right)
    assert "wrong" in tuning.why_wrong([right, torch.full((3,), torch.nan)], [right, torch.zeros(3)])


def test_candidates_are_checked_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    good, wrong, failing, refused = (Config(rows, 4) for rows in (16, 32, 64, 128))
    running: list[Config] = []
    x = torch.randn(8)

    def call(self: Any, *_: Any) -> Any:
        def run(given: torch.Tensor) -> torch.Tensor:
            config = configs.config_of("inner_block", 90, torch.bfloat16, 24)
            running.append(config)
            if config == failing:
                raise RuntimeError("Triton kernel failed")
            return given + (config == wrong)

        return run, [x]

    monkeypatch.setattr(KernelCase, "call", call)
    monkeypatch.setattr(tuning, "plain", lambda *_: x)
    one, timed = subject_of(good), itertools.count(1)
    found = list(
        tuning.try_all(
            one,
            [good, wrong, failing, refused],
            {(one, refused): "too much shared memory"},
            lambda once: (once(), float(next(timed)))[1],
        )
    )
    assert [result.milliseconds for result in found] == [1.0, None, None, None]
    assert found[1].problem.startswith("wrong: error 1")
    assert "Triton kernel failed" in found[2].problem
    assert found[3].problem == "too much shared memory"
    assert running == [good, good, wrong, failing]


def subject_of(config: Config) -> tuning.Subject:
    return tuning.Subject(CASE, "bfloat16", WANTED, config)


def test_only_a_clear_win_replaces_the_present_choice() -> None:
    present, other, broken = Config(128, 4), Config(64, 4), Config(256, 4)
    assert tuning.best([trial(present, 1.0), trial(other, 0.99)]).config == present
    assert tuning.best([trial(present, 1.0), trial(other, 0.9)]).config == other
    assert tuning.best([trial(present, None, "fails"), trial(other, 5.0)]).config == other
    assert tuning.best([trial(broken, None, "fails")]) is None


def test_the_table_is_extended_and_written(tmp_path: Path) -> None:
    entries = {"16bit 31": [128, 4, 1], "float32 64": [64, 4, 1]}
    table = {
        "inner_block": {
            "sm_80": entries,
            "sm_90": {"16bit 64": [32, 2, 1]},
            "other": {"16bit 64": [16, 1, 1]},
        }
    }
    trials = [[trial(Config(64, 8, 2), 1.0)]]
    new = tuning.updated(table, 86, trials)["inner_block"]
    assert new["sm_86"] == entries | {"16bit 24": [64, 8, 2]}
    assert new["sm_80"] == entries
    assert tuning.updated(table, 0, trials)["inner_block"]["other"]["16bit 24"] == [64, 8, 2]
    assert tuning.updated(table, 75, trials)["inner_block"]["sm_75"]["16bit 64"] == [16, 1, 1]
    assert "sm_86" not in table["inner_block"]
    tuning.save(new := tuning.updated(table, 90, trials), tmp_path / "configs.json")
    assert json.loads((tmp_path / "configs.json").read_text()) == new


def test_the_program_needs_a_gpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/tune.py", "--quick", "--output", str(tmp_path / "configs.json")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (2, "tune: torch sees no GPU\n")
    assert not list(tmp_path.iterdir())
