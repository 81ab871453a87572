"""The native module: tiers, TNT_CPU_TIER, one thread pool with torch, the GIL, refused arguments."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import USABLE_TIERS
from oracle import OPS, arguments, inner_parameters, randn, run

from tnt_kernels import native
from tnt_kernels.backends import cpu

TIERS = ("amx", "avx512_bf16", "avx512", "avx2", "portable", "amx_emulated")


@pytest.fixture
def module(needs_native: None) -> Any:
    return native.load()


def test_tiers(module: Any) -> None:
    listed = module.tiers()
    names = [name for name, _ in listed]
    assert set(names) <= set(TIERS)
    assert len(set(names)) == len(names)
    assert "portable" in USABLE_TIERS
    order = [name for name in names if name != "amx_emulated"]
    assert order == [name for name in TIERS if name in order], "best first"
    for name, why in listed:
        if why:
            with pytest.raises(Exception, match=name):
                module.set_tier(name)


def test_active_tier(module: Any) -> None:
    best = next(name for name in USABLE_TIERS if name != "amx_emulated")
    module.set_tier("auto")
    assert module.tier() == best
    for name in USABLE_TIERS:
        module.set_tier(name)
        assert module.tier() == name
    with pytest.raises(Exception, match="portable"):  # an error that lists the tiers
        module.set_tier("sse9")
    assert module.tier() == USABLE_TIERS[-1]
    module.set_tier("auto")


@pytest.mark.parametrize("op", OPS)
def test_tiers_agree(module: Any, op: str) -> None:
    values = arguments(op)
    results = {}
    for name in USABLE_TIERS:
        module.set_tier(name)
        results[name] = run(op, values)
    module.set_tier("auto")
    for result in results.values():
        torch.testing.assert_close(result, results["portable"], rtol=1e-5, atol=1e-5)


def test_environment_names_no_tier(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted in ("sse9", *(name for name, why in module.tiers() if why)):
        monkeypatch.setenv("TNT_CPU_TIER", wanted)
        message = native._force_tier(module)
        assert f"TNT_CPU_TIER={wanted!r} names no tier usable here" in str(message)
        assert all(name in str(message) for name, _ in module.tiers())
    monkeypatch.setattr(native, "_tier_error", message)
    with pytest.raises(ValueError, match="TNT_CPU_TIER"):
        run("inner_block", arguments("inner_block"), backend="auto")
    for wanted in ("", " Auto ", "portable"):
        monkeypatch.setenv("TNT_CPU_TIER", wanted)
        assert native._force_tier(module) is None
    assert module.tier() == "portable"
    module.set_tier("auto")


def test_build_info(module: Any) -> None:
    info = module.build_info()
    assert {"compiler", "openmp"} <= set(info)
    assert all(isinstance(value, str) for value in info.values())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_thread_pool_with_torch(module: Any) -> None:
    """torch's OpenMP runtime is the only one, and the kernels start no thread of their own."""
    if module.build_info()["openmp"] != "yes":
        pytest.skip("built without OpenMP")
    maps = Path("/proc/self/maps").read_text()
    runtimes = {line.split()[-1] for line in maps.splitlines() if "libgomp" in line or "libomp" in line}
    assert len(runtimes) == 1, runtimes
    torch.set_num_threads(2)
    a = torch.randn(512, 512)
    values = {"x": randn(512, 16, 24), **inner_parameters(24), "num_heads": 4}
    torch.mm(a, a)
    run("inner_block", values)
    before = len(list(Path("/proc/self/task").iterdir()))
    for _ in range(3):
        torch.mm(a, a)
        run("inner_block", values)
    assert len(list(Path("/proc/self/task").iterdir())) == before


def test_gil_is_released(module: Any) -> None:
    values = {"x": randn(20_000, 16, 24), **inner_parameters(24), "num_heads": 4}
    inside, turns = threading.Event(), []

    def work() -> None:
        inside.set()
        run("inner_block", values)
        inside.clear()

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # the other thread gives the GIL away only where the kernel releases it
    try:
        thread = threading.Thread(target=work)
        thread.start()
        inside.wait()
        while inside.is_set():
            turns.append(1)
            if len(turns) > 1000:
                break
            thread.join(1e-4)
        thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert len(turns) > 10  # a tenth of a millisecond each, while the kernel ran


def test_sample_tells_buffers_apart(module: Any) -> None:
    a = torch.arange(64, dtype=torch.float32)
    first = module.sample(a.data_ptr(), a.nbytes)
    assert module.sample(a.clone().data_ptr(), a.nbytes) == first
    for i in (0, 31, 63):
        b = a.clone()
        b[i] += 1
        assert module.sample(b.data_ptr(), b.nbytes) != first
    assert module.sample(a.data_ptr(), 0) != first
    assert isinstance(module.sample(a.data_ptr(), 7), int)


def native_call(**changes: Any) -> tuple[Any, ...]:
    x, out = torch.zeros(2, 4, 6), torch.zeros(2, 4, 6)
    values: dict[str, Any] = {
        "x": x.data_ptr(), "out": out.data_ptr(), "io": 0, "compute": 0, "s": 2, "m": 4, "c": 6, "hidden": 24,
        "heads": 2, "parts": 3, "scale": 0.5, "eps1": 1e-5, "eps2": 1e-5,
    }  # fmt: skip
    parameters = list(inner_parameters(6).values())
    pointers, codes, _ = cpu._parameters(parameters)
    values |= {"pointers": pointers, "codes": codes}
    values |= {"drop_path1": 0, "drop_path2": 0, "seed": 0, "drops": [0.0] * 4, "threads": 1, **changes}
    native_call.kept = (x, out, parameters)  # type: ignore[attr-defined]
    return tuple(values.values())


@pytest.mark.parametrize(
    "change",
    [
        {"x": 0}, {"out": 0}, {"io": 2}, {"compute": -1}, {"s": -1}, {"m": 0}, {"c": 0}, {"hidden": 0},
        {"heads": 0}, {"heads": 4}, {"parts": 0}, {"parts": 4}, {"threads": 0}, {"pointers": []},
        {"codes": [0] * 13}, {"codes": [7] * 14}, {"pointers": [0] * 14},
        {"drops": [0.0] * 3}, {"drops": [0.0, -0.1, 0.0, 0.0]}, {"drops": [0.0, 0.0, 1.1, 0.0]},
    ],
    ids=str,
)  # fmt: skip
def test_native_refuses(module: Any, change: dict[str, Any]) -> None:
    """The launchers never pass these; the module refuses them all the same instead of crashing."""
    module.inner_block(*native_call())
    with pytest.raises((ValueError, RuntimeError), match=r"\w+ \w+ \w+"):
        module.inner_block(*native_call(**change))
