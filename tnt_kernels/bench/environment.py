"""What a measurement was taken on: processor, versions, threads, load."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from tnt_kernels._version import __version__

PACKAGES = ("numpy", "torch", "triton", "timm", "torchvision", "onnxruntime", "openvino")
INSTRUCTION_SETS = (
    "sse4_2", "avx", "avx2", "fma3", "f16c", "avx_vnni", "avx512_f", "avx512_bw", "avx512_dq", "avx512_vl",
    "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16",
    "neon", "bf16", "fp16_arith", "dot", "i8mm", "sve", "sve2", "sve_bf16", "sme", "sme2",
)  # fmt: skip


def versions() -> dict[str, str | None]:
    """Version of every package that matters here; None where it is not installed."""
    found: dict[str, str | None] = {"tnt_kernels": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def processor() -> dict[str, Any]:
    """Name, architecture, usable cores and instruction sets of the processor."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    known = [name for name in INSTRUCTION_SETS if capabilities.get(name)]
    return {
        "name": _processor_name(),
        "architecture": platform.machine(),
        "cores": usable_cores(),
        "instruction_sets": known,
    }


def usable_cores() -> int:
    """Cores that this process may run on (its affinity mask, where the system has one)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def memory_gib() -> float | None:
    """Physical memory, or None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return None


def load_average() -> float | None:
    """Load of the last minute, or None where the system does not tell. Above 0, others share the cores."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def gpus() -> list[dict[str, Any]]:
    """Name, compute capability and memory of every GPU that torch sees, and the driver's version."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": of.name,
                "capability": f"{of.major}.{of.minor}",
                "multiprocessors": of.multi_processor_count,
                "memory_gib": round(of.total_memory / 2**30, 1),
                "driver": _driver(),
                "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
            }
        )
    return found


@functools.cache
def _driver() -> str:
    """Version of the GPU driver, as nvidia-smi tells it; empty where it does not."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""


def describe(gpu: bool = False) -> dict[str, Any]:
    """The block that every result file begins with. gpu: the measurement was taken on the current GPU."""
    memory = memory_gib()
    return {
        **({"gpu": gpus()[torch.cuda.current_device()]} if gpu else {}),
        "processor": processor(),
        "memory_gib": None if memory is None else round(memory, 1),
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "load_average": load_average(),
        "environment": variables(),
    }


def variables() -> dict[str, str]:
    """Environment variables that are set and change speed or path."""
    prefixes = (
        "TNT_",
        "OMP_",
        "MKL_",
        "GOMP_",
        "KMP_",
        "DNNL_",
        "ONEDNN_",
        "ATEN_",
        "TORCHINDUCTOR_",
        "TRITON_",
    )
    names = ("CUDA_VISIBLE_DEVICES", "MALLOC_CONF", "LD_PRELOAD", "CXX", "CC")
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(prefixes) or k in names}


def slug(environment: dict[str, Any]) -> str:
    """File name for results of this device: 'AMD EPYC', 2 cores -> 'amd-epyc-2-cores', or a GPU's name."""
    if "gpu" in environment:
        return re.sub(r"[^a-z0-9]+", "-", environment["gpu"]["name"].lower()).strip("-")
    name = re.sub(r"\((r|tm)\)", "", environment["processor"]["name"], flags=re.IGNORECASE)
    words = f"{name} {environment['processor']['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
