"""Show versions, processor, GPUs, and which parts of this package are built and usable here, and why not."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch

from tnt_kernels import dispatch, gpu, native
from tnt_kernels._timm import import_timm
from tnt_kernels.bench import environment

HELP = "versions, instruction sets, what is built and usable, and why not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    found = collect()
    print(json.dumps(found, indent=2) if arguments.json else _text(found))
    return 0


def collect() -> dict[str, Any]:
    """Everything that `info` prints."""
    return {
        "versions": environment.versions(),
        "processor": environment.processor(),
        "gpus": _gpus(),
        "threads": _threads(),
        "onednn": _onednn(),
        "native": _native(),
        "backends": _backends(),
        "timm": _timm(),
        "environment": environment.variables(),
    }


def _gpus() -> list[dict[str, Any]]:
    found = environment.gpus()
    for index, of in enumerate(found):
        of["reason"] = gpu.why_unusable(index) or ""
        of["usable"] = not of["reason"]
    return found


def _native() -> dict[str, Any]:
    try:
        module = native.load()
    except ValueError as error:  # TNT_CPU_TIER names no usable tier
        return {"loaded": False, "reason": str(error), "tier": None, "tiers": [], "build": {}}
    if module is None:
        return {"loaded": False, "reason": native.why_missing(), "tier": None, "tiers": [], "build": {}}
    tiers = [{"name": name, "usable": not why, "reason": why} for name, why in module.tiers()]
    cuda = native.cuda()
    build = {
        **module.build_info(),
        "cuda": "no" if cuda is None else f"{cuda.version}, kernels for {native.cuda_targets()}",
    }
    return {"loaded": True, "reason": "", "tier": module.tier(), "tiers": tiers, "build": build}


def _backends() -> list[dict[str, Any]]:
    found = []
    for name in dispatch.BACKENDS:
        why = ""
        if name == "cpu":
            try:
                why = dispatch.can_run_cpu("inner_block", torch.zeros(1)) or ""
            except ValueError as error:
                why = str(error)
        elif name == "cuda":
            why = native.why_no_cuda() or _why_not_on_gpus(gpu.why_no_cuda)
        elif name == "triton":
            why = _why_not_on_gpus(gpu.why_unusable)
        found.append({"name": name, "usable": not why, "reason": why})
    try:
        requested, problem = dispatch.requested(), ""
    except ValueError as error:
        requested, problem = "", str(error)
    for backend in found:
        backend["requested"] = backend["name"] == requested
        if problem:
            backend.update(usable=False, reason=problem)
    return found


def _why_not_on_gpus(why: Callable[[int], str | None]) -> str:
    """Empty where a GPU can be used."""
    reasons = [why(index) for index in range(torch.cuda.device_count())]
    if None in reasons:
        return ""
    return reasons[0] if reasons and reasons[0] else "torch sees no GPU"


def _threads() -> dict[str, Any]:
    return {
        "torch": torch.get_num_threads(),
        "torch_interop": torch.get_num_interop_threads(),
        "openmp": torch.backends.openmp.is_available(),
        "cores": environment.usable_cores(),
        "load_average": environment.load_average(),
    }


def _onednn() -> dict[str, Any]:
    available = torch.backends.mkldnn.is_available()
    found: dict[str, Any] = {"available": available, "enabled": torch.backends.mkldnn.enabled}
    if available:
        found["bfloat16"] = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        found["float16"] = bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return found


def _timm() -> dict[str, Any]:
    try:
        import_timm()
    except ImportError as error:
        return {"usable": False, "reason": str(error)}
    return {"usable": True, "reason": ""}


def _yes(usable: bool, reason: str) -> str:
    return "usable" if usable else f"not usable: {reason}"


def _text(found: dict[str, Any]) -> str:
    processor, threads, onednn, module = (found[k] for k in ("processor", "threads", "onednn", "native"))
    sets = " ".join(processor["instruction_sets"]) or "unknown (this torch does not tell)"
    sections: list[tuple[str, list[tuple[str, str]]]] = [
        ("versions", [(name, version or "not installed") for name, version in found["versions"].items()]),
        (
            "processor",
            [
                ("name", f"{processor['name']} ({processor['architecture']})"),
                ("usable cores", str(processor["cores"])),
                ("instruction sets", sets),
            ],
        ),
        ("GPUs", _gpu_lines(found["gpus"])),
        (
            "threads",
            [
                ("torch", f"{threads['torch']} ({'OpenMP' if threads['openmp'] else 'without OpenMP'})"),
                ("between operators", str(threads["torch_interop"])),
                (
                    "load average",
                    "unknown" if threads["load_average"] is None else f"{threads['load_average']:.2f}",
                ),
            ],
        ),
        ("oneDNN", [(key, "yes" if value else "no") for key, value in onednn.items()]),
        ("native module", _native_lines(module)),
        (
            "backends",
            [
                (b["name"] + " (forced)" * b["requested"], _yes(b["usable"], b["reason"]))
                for b in found["backends"]
            ],
        ),
        ("timm", [("models", _yes(found["timm"]["usable"], found["timm"]["reason"]))]),
        (
            "environment",
            list(found["environment"].items()) or [("(none)", "no variable that matters here is set")],
        ),
    ]
    lines = []
    for title, pairs in sections:
        width = max(len(name) for name, _ in pairs)
        lines += [title, *(f"  {name:<{width}}  {value}".rstrip() for name, value in pairs), ""]
    return "\n".join(lines).rstrip()


def _gpu_lines(gpus: list[dict[str, Any]]) -> list[tuple[str, str]]:
    if not gpus:
        return [("(none)", "torch sees no GPU")]
    return [
        (
            f"{index}",
            f"{of['name']}, compute capability {of['capability']}, {of['memory_gib']} GiB, driver "
            f"{of['driver'] or 'unknown'}, CUDA {of['cuda']}; {_yes(of['usable'], of['reason'])}",
        )
        for index, of in enumerate(gpus)
    ]


def _native_lines(module: dict[str, Any]) -> list[tuple[str, str]]:
    if not module["loaded"]:
        return [("loaded", f"no: {module['reason']}")]
    lines = [("loaded", "yes"), *sorted(module["build"].items())]
    for tier in module["tiers"]:
        active = ", active" if tier["name"] == module["tier"] else ""
        lines.append((f"tier {tier['name']}", _yes(tier["usable"], tier["reason"]) + active))
    return lines
