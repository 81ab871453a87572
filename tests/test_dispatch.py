"""The choice of a backend: conditions, forcing, threads and tasks, what happens without the native module."""

from __future__ import annotations

import asyncio
import contextvars
import os
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from oracle import OPS, arguments, run
from torch._subclasses.fake_tensor import FakeTensorMode

from tnt_kernels import dispatch, gpu, native, ops
from tnt_kernels.dispatch import can_run_cpu, choose, requested, requested_anywhere, use_backend

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new interpreter with these environment variables."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TNT_")} | variables
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_cpu_is_chosen(needs_native: None) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.ones(3, dtype=dtype)
        assert choose("op", x, None, torch.nn.Parameter(x, requires_grad=False)) == "cpu"
        assert can_run_cpu("op", x) is None


def test_reasons(needs_native: None) -> None:
    x = torch.ones(3)
    wanting = torch.ones(3, requires_grad=True)
    assert "gradient is needed" in str(can_run_cpu("op", x, wanting))
    assert "gradient is needed" in str(can_run_cpu("op", x, needs_grad=True))
    assert can_run_cpu("op", x, wanting, needs_grad=False) is None
    assert "meta" in str(can_run_cpu("op", x, x.to("meta")))
    assert "float64" in str(can_run_cpu("op", x.double()))
    assert "int64" in str(can_run_cpu("op", x.long()))
    assert "list" in str(can_run_cpu("op", [1.0]))  # type: ignore[arg-type]
    with torch.no_grad():
        assert can_run_cpu("op", wanting) is None
        assert choose("op", wanting) == "cpu"
    with torch.inference_mode():
        assert choose("op", wanting) == "cpu"
    with torch.autograd.forward_ad.dual_level():
        assert "forward-mode" in str(can_run_cpu("op", x))
    torch.func.vmap(lambda v: (_expect("torch.func", v), v)[1])(x)


def _expect(reason: str, *tensors: torch.Tensor) -> None:
    assert reason in str(can_run_cpu("op", *tensors))
    assert choose("op", *tensors) == "reference"


def test_forcing() -> None:
    x = torch.ones(3)
    with use_backend("reference"):
        assert choose("op", x) == "reference"
        assert requested() == "reference"
    with use_backend("cpu"):
        with pytest.raises(RuntimeError, match=r"my_op: the cpu backend is forced .* a gradient is needed"):
            choose("my_op", x.requires_grad_())
        with pytest.raises(RuntimeError, match=r"my_op: .*float64"):
            choose("my_op", x.detach().double())
        with use_backend("auto"):
            assert requested() == "auto"
        assert requested() == "cpu"


@pytest.mark.parametrize("op", ["pixel_embed", "inner_block"])
def test_backends_of_a_gpu(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's kernels go before Triton's; each reason against one lets the next have the call."""
    reasons: dict[str, str | None] = {"cuda": None, "triton": None}
    monkeypatch.setattr(gpu, "why_no_cuda", lambda index: reasons["cuda"])
    monkeypatch.setattr(gpu, "why_unusable", lambda index: reasons["triton"])
    with FakeTensorMode():
        x = torch.empty(1, 3, 16, device="cuda")
    with torch.no_grad():
        assert choose(op, x) == ("cuda" if op == "pixel_embed" else "triton")
        with use_backend("triton"):
            assert choose(op, x) == "triton"
        reasons["cuda"] = "built without"
        assert choose(op, x) == "triton"
        with (
            use_backend("cuda"),
            pytest.raises(RuntimeError, match=r"built without|no kernel for inner_block"),
        ):
            choose(op, x)
        reasons["triton"] = f"no Triton for {op}"
        with pytest.warns(RuntimeWarning, match=f"no Triton for {op}"):
            assert choose(op, x) == "reference"


def test_what_any_thread_asks_for() -> None:
    found: list[str] = []
    with use_backend("triton"):
        thread = threading.Thread(target=lambda: found.append(requested_anywhere()))
        thread.start()
        thread.join()
        with use_backend("cuda"):
            assert requested_anywhere() == "cuda"
    assert found == ["triton"]
    assert requested_anywhere() == requested()


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ([75, 80, 86, 120], (8, 9), True),
        ([75, 80, 86, 120], (8, 0), True),
        ([86], (8, 0), False),
        ([75, 120], (9, 0), False),
        ([75, 90], (9, 0), True),
        ([75, 90], (12, 1), True),  # by PTX
        ([100, 120], (10, 3), True),
        ([80], (7, 5), False),
    ],
)
def test_gpus_that_a_build_serves(architectures: list[int], capability: tuple[int, int], runs: bool) -> None:
    assert gpu._has_code(architectures, *capability) == runs


def test_why_cuda_kernels_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    why, built = gpu._why_no_cuda.__wrapped__, SimpleNamespace(architectures=[80, 90])
    assert torch.cuda.is_available() or why(0) == "torch sees no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(native, "cuda", lambda: None)
    assert why(0) == (native.why_missing() or "the native module was built without CUDA kernels")
    monkeypatch.setattr(native, "cuda", lambda: built)
    targets = "sm_80 sm_90, PTX of sm_90 for later ones"
    assert why(0) == f"GPU 0 is of compute capability 7.5; the native module was built for {targets}"

    def probe() -> None:
        raise RuntimeError("cudaErrorInsufficientDriver")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    built.probe = probe
    assert why(0) == "CUDA kernels cannot run on GPU 0 (cudaErrorInsufficientDriver)"
    built.probe = lambda: None
    assert why(0) is None


@pytest.mark.parametrize("op", OPS)
def test_forced_cpu_records_what_has_a_backward_pass(
    op: str, needs_native: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {n: v.requires_grad_() if isinstance(v, torch.Tensor) else v for n, v in arguments(op).items()}
    with use_backend("cpu"):
        out = getattr(ops, op)(**values)
        assert torch.equal(out, run(op, values, backend="cpu"))
        out.sum().backward()
    assert all(v.grad is not None for v in values.values() if isinstance(v, torch.Tensor))

    monkeypatch.setattr(dispatch, "TRAINABLE", dispatch.TRAINABLE - {op})
    with use_backend("cpu"), pytest.raises(RuntimeError, match=f"{op}: the cpu backend is forced .*no_grad"):
        getattr(ops, op)(**values)
    run(op, values, backend="cpu")  # without gradients it runs


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="must be one of auto, reference, cpu, cuda, triton; got 'gpu'"):
        use_backend("gpu")


def test_a_context_is_left_on_errors_and_can_be_entered_again() -> None:
    before = requested()
    context = use_backend("reference")
    with pytest.raises(KeyError), context:
        raise KeyError
    assert requested() == before
    with context, context:
        assert requested() == "reference"
    assert requested() == before
    assert dispatch._traced_override is None


def test_the_choice_belongs_to_a_thread() -> None:
    before, seen = requested(), []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(requested()))
        thread.start()
        thread.join()
    assert seen == [before]


def test_the_choice_belongs_to_a_task() -> None:
    async def work(name: str, delay: float) -> str:
        with use_backend(name):
            await asyncio.sleep(delay)
            return requested()

    async def both(first: float, second: float) -> list[str]:
        return await asyncio.gather(work("reference", first), work("cpu", second))

    for first, second in ((0.02, 0.01), (0.01, 0.02)):
        assert asyncio.run(both(first, second)) == ["reference", "cpu"]
        assert dispatch._traced_override is None
    assert contextvars.copy_context().run(requested) == requested()


def test_overhead() -> None:
    """Choosing and checking cost microseconds: a bound that only a mistake passes."""
    values = arguments("inner_block")
    tensors = [v for v in values.values() if isinstance(v, torch.Tensor)]
    best = float("inf")
    with torch.no_grad():
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(50):
                choose("inner_block", *tensors)
            best = min(best, (time.perf_counter() - start) / 50)
    assert best < 100e-6


ENVIRONMENT = """
from oracle import arguments, run
from tnt_kernels import native, ops
from tnt_kernels.dispatch import choose, requested
values = arguments("inner_block")
print(requested(), choose("inner_block", values["x"]), native.load().tier())
ops.inner_block(**values)
try:
    ops.inner_block(**{**values, "x": values["x"].double()})
except RuntimeError as error:
    print(error)
"""


def test_environment_variables(needs_native: None) -> None:
    result = python(ENVIRONMENT, TNT_BACKEND=" CPU ", TNT_CPU_TIER=" Portable ")
    assert result.stdout.startswith("cpu cpu portable\ninner_block: the cpu backend is forced"), result


def test_environment_names_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_environment", "gpu")
    with pytest.raises(
        ValueError, match=r"TNT_BACKEND must be one of auto, .*, cpu, cuda, triton; got 'gpu'"
    ):
        choose("op", torch.ones(1))
    with use_backend("auto"):
        assert requested() == "auto"


MISSING = """
import sys, warnings
sys.modules["tnt_kernels._native"] = None
import torch
from oracle import OPS, arguments, operator, operator_arguments, run
from tnt_kernels import native, ops
from tnt_kernels.dispatch import can_run_cpu, use_backend
assert native.load() is None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for op in OPS:
        values = arguments(op)
        out = run(op, values, backend="auto")
        assert torch.equal(out, run(op, values, backend="reference"))
        assert torch.equal(out, operator(op)(*operator_arguments(op, values)))
        function = torch.compile(lambda given: getattr(ops, op)(**given), backend="eager", fullgraph=True)
        torch.testing.assert_close(function(values), out)
assert [w.category for w in caught if "tnt_kernels" in str(w.message)] == [RuntimeWarning], caught
print(caught[0].message)
print(caught[0].filename)
assert can_run_cpu("op", torch.ones(1)) == native.why_missing()
try:
    run("inner_block", arguments("inner_block"), backend="cpu")
except RuntimeError as error:
    print(error)
"""


def test_without_the_native_module() -> None:
    result = python(MISSING)
    assert result.returncode == 0, result.stderr
    warning, filename, error = result.stdout.splitlines()
    assert "_native cannot be imported" in warning
    assert "pip install" in warning
    assert filename.endswith(("oracle.py", "dispatch.py", "inner_block.py", "pixel_embed.py")), filename
    assert error.startswith("inner_block: the cpu backend is forced but cannot run")
    assert "_native cannot be imported" in error


def test_reason_is_remembered() -> None:
    assert (native.load() is None) == (native.why_missing() is not None)
