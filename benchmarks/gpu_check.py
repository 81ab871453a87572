"""Everything that needs a GPU, in one command that ends inside ten minutes.

    python benchmarks/gpu_check.py --output DIR
    python benchmarks/gpu_check.py --output DIR --dry-run     # lists the steps
    python benchmarks/gpu_check.py --output DIR --only tests  # steps whose names begin so

Tests, compute-sanitizer, kernels against their floors, the pixel embedding against other ways to compute it,
models in inference and training, tuner. Each step runs in a process with a time limit: one that fails or
hangs leaves the others. DIR gets summary.md, gpu_check.json and result files after every step, and logs/.
Exit status: 0 where all steps are ok, 1 where one is not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout need not be installed

from tnt_kernels import native
from tnt_kernels._timm import import_timm
from tnt_kernels.bench import goals, steps
from tnt_kernels.bench.environment import describe
from tnt_kernels.bench.results import table
from tnt_kernels.bench.steps import Outcome, Step

SECONDS = 520  # for everything
SHARDS = 10  # processes that share the tests
SMALL_TESTS = [
    f"tests/gpu/test_gpu_ops.py::test_{what}[{case}-triton-float32]"
    for what in ("forward", "gradients")
    for case in ("inner_block m=9 c=10", "inner_block c=24", "word_to_sentence m=9 c=10", "outer_block d=384")
]
PYTEST = (sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider")
LARGE = "tests/gpu/test_gpu_large.py"  # needs much of the GPU's memory


def stages(output: Path) -> list[list[Step]]:
    """Steps that run at once, stage by stage. What is timed runs alone, the goals' figures first."""
    eager, compiled = ("timm", "compile") if _has_timm() else ("reference", "reference_compile")
    model_names = tuple(goals.WIDTHS)
    checks = [
        Step("info", (sys.executable, "-m", "tnt_kernels", "info"), 60),
        *(
            Step(f"tests-{i}", (*PYTEST, "tests/gpu", "--ignore", LARGE, "--shard", f"{i}/{SHARDS}"), 220)
            for i in range(1, SHARDS + 1)
        ),
        *(
            _sanitizer(tool, "triton", *PYTEST[1:], *SMALL_TESTS)
            for tool in ("memcheck", "racecheck")  # PyTorch's own kernels run there too
        ),
        *(
            _sanitizer(tool, "cuda", "benchmarks/cuda_calls.py")
            for tool in ("memcheck", "racecheck", "initcheck")
        ),
    ]
    # torch.compile takes a minute for each of these; what is compiled here is found in its cache later.
    warm = {
        f"compile-{what}{model}": _models(output, f"logs/compile-{what}{model}", 200, model, name, *more)
        for model in model_names
        for what, name, more in (
            ("", compiled, ("--rounds", "1")),
            ("deit-", "deit_compile", ("--rounds", "1")),
            ("training-", compiled, ("--rounds", "1", "--train")),
        )
    }
    large = warm.pop("compile-training-tnt_b")
    warm["compile-pixel_embed"] = Step(
        "compile-pixel_embed", _program("pixel_embed.py", "--entries", "compile", "--repeats", "1"), 150
    )
    timed = ("--rounds", "5")
    return [
        [_build()],
        [*checks, *warm.values()],
        [Step("tests-large", (*PYTEST, LARGE), 100), large],
        [Step("floors", _program("floors.py", "--output", str(output / "floors.json")), 90)],
        [Step("pixel_embed", _program("pixel_embed.py", "--output", str(output / "pixel_embed.json")), 60)],
        *(
            [_models(output, f"models-{model}", 60, model, f"{eager} fast fast_graph deit", *timed)]
            for model in model_names
        ),
        *(
            [_models(output, f"training-{model}", 90, model, f"{eager} fast", *timed, "--train", memory=True)]
            for model in model_names
        ),
        *(
            [_models(output, f"models-compiled-{model}", 90, model, f"{compiled} fast deit_compile", *timed)]
            for model in model_names
        ),
        *(
            [_models(output, f"training-compiled-{model}", 90, model, f"{compiled} fast", *timed, "--train")]
            for model in model_names
        ),
        [
            Step(
                "tune",
                _program("tune.py", "--quick", "--seconds", "40", "--output", str(output / "configs.json")),
                90,
            )
        ],
        *(
            [
                _models(
                    output, f"models-one-{model}", 45, model, f"{eager} fast fast_graph deit", *timed, batch=1
                )
            ]
            for model in model_names
        ),
    ]


def _program(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, f"benchmarks/{name}", *arguments)


def _models(
    output: Path,
    name: str,
    limit: float,
    model: str,
    names: str,
    *more: str,
    batch: int = goals.BATCH,
    memory: bool = False,
) -> Step:
    """A run of benchmarks/models.py that writes `name`.json."""
    command = _program(
        "models.py", "--device", "cuda", "--dtype", "bfloat16", "--model", model, "--batch", str(batch),
        "--baselines", *names.split(), *more, *([] if memory else ["--no-memory"]),
        "--output", str(output / f"{name}.json"),
    )  # fmt: skip
    return Step(Path(name).name, command, limit)


def _has_timm() -> bool:
    try:
        import_timm()
    except ImportError:
        return False
    return True


def _build() -> Step:
    """Builds for the present GPU alone: all architectures would take minutes."""
    home = _toolkit_home()
    built = native.load() is not None and (native.cuda() is not None or not home)
    variables = {"CUDA_HOME": home} if home else {}
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        variables["TNT_CUDA_ARCHS"] = f"{major}.{minor}"
    command = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    return Step("build", command, 150, "the native module is built" if built else "", variables)


def _toolkit_home() -> str:
    """Folder of the CUDA toolkit, or nothing."""
    nvcc = shutil.which("nvcc") or _in_toolkit("nvcc")
    return os.environ.get("CUDA_HOME") or (str(Path(nvcc).parent.parent) if nvcc else "")


def _sanitizer(tool: str, what: str, *command: str) -> Step:
    """Python with these arguments under a tool of compute-sanitizer."""
    program = shutil.which("compute-sanitizer") or _in_toolkit("compute-sanitizer")
    options = ("--tool", tool, "--error-exitcode", "9", "--target-processes", "all")
    return Step(
        f"sanitizer-{what}-{tool}",
        (program or "compute-sanitizer", *options, sys.executable, *command),
        200,
        "" if program else "compute-sanitizer is not installed (it comes with the CUDA toolkit)",
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def _in_toolkit(name: str) -> str:
    found = sorted(Path("/usr/local").glob(f"cuda*/bin/{name}"))
    return str(found[-1]) if found else ""


def _from_checkout(step: Step) -> Step:
    """The step with this process's module path, but for the folder of this program."""
    path = os.pathsep.join(folder for folder in sys.path if Path(folder) != Path(__file__).resolve().parent)
    return dataclasses.replace(step, variables={"PYTHONPATH": path, **step.variables})


def documents(output: Path) -> dict[str, dict[str, Any]]:
    """The result files that there are, those of one kind joined."""
    found: dict[str, dict[str, Any]] = {}
    for kind in ("floors", "models", "training", "pixel_embed"):
        for path in sorted(output.glob(f"{kind}*.json")):
            document = json.loads(path.read_text())
            if kind in found:
                found[kind]["results"] += document["results"]
            else:
                found[kind] = document
    return found


def write(output: Path, outcomes: list[Outcome], planned: int) -> None:
    """Writes what is known so far."""
    device = describe(gpu=torch.cuda.is_available())
    measured = goals.goals(documents(output))
    document = {
        "device": device,
        "steps": [dataclasses.asdict(outcome) for outcome in outcomes],
        "goals": [{**dataclasses.asdict(goal), "verdict": goal.verdict} for goal in measured],
    }
    (output / "gpu_check.json").write_text(json.dumps(document, indent=1) + "\n")
    (output / "summary.md").write_text(summary(device, outcomes, measured, planned))


def summary(device: dict[str, Any], outcomes: list[Outcome], measured: list[goals.Goal], planned: int) -> str:
    gpu = device.get("gpu", {"name": "no GPU", "driver": "", "cuda": ""})
    versions = ", ".join(f"{name} {version}" for name, version in device["versions"].items() if version)
    lines = [
        "# GPU check",
        f"{gpu['name']}, driver {gpu['driver'] or 'unknown'}, CUDA {gpu['cuda']}",
        versions,
        f"{len(outcomes)} of {planned} steps. The goals are an H100's, in bfloat16 at batch {goals.BATCH}.",
        table(
            ["goal", "model", "wanted", "measured", ""],
            [
                [
                    goal.what,
                    goal.model,
                    f"{'<=' if goal.at_most else '>='} {goal.goal:g}",
                    "-" if goal.value is None else f"{goal.value:.3g}",
                    goal.verdict,
                ]
                for goal in measured
            ],
        ),
        table(
            ["step", "", "seconds", "last words"],
            [
                [o.name, o.status, f"{o.seconds:.0f}", (o.said or ("",))[-1][:90].replace("|", "/")]
                for o in outcomes
            ],
        ),
    ]
    for outcome in outcomes:
        if outcome.status in (steps.FAILED, steps.TIMED_OUT):
            lines.append(f"## {outcome.name}: {outcome.status}")
            lines.append("\n".join(["```", " ".join(outcome.command), *outcome.said, "```"]))
    return "\n\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--dry-run", action="store_true", help="list the steps and end")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="steps whose names begin so")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    chosen = [
        [step for step in stage if step.name.startswith(tuple(arguments.only))] for stage in stages(output)
    ]
    chosen = [stage for stage in chosen if stage]
    if arguments.dry_run:
        for stage in chosen:
            for step in stage:
                said = f"  [not run: {step.why_not}]" if step.why_not else ""
                print(f"{step.name} ({step.limit:.0f} s): {' '.join(step.command)}{said}")
        return 0
    if not torch.cuda.is_available():
        print("gpu_check: torch sees no GPU", file=sys.stderr)
        return 2
    output.mkdir(parents=True, exist_ok=True)
    (output / "logs").mkdir(exist_ok=True)
    os.chdir(ROOT)
    outcomes: list[Outcome] = []
    planned = sum(map(len, chosen))

    def done(outcome: Outcome) -> None:
        outcomes.append(outcome)
        print(f"{outcome.name}: {outcome.status} ({outcome.seconds:.0f} s)", flush=True)
        write(output, outcomes, planned)

    write(output, outcomes, planned)
    steps.run_all([list(map(_from_checkout, stage)) for stage in chosen], output / "logs", SECONDS, done)
    print((output / "summary.md").read_text())
    bad = [o for o in outcomes if o.status in (steps.FAILED, steps.TIMED_OUT)]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
