"""Resident memory of one baseline, measured in a process that holds nothing else.

The process sets the baseline up, calls it twice, gives freed memory back to the system, and then watches
its own peak over three more calls. `peak_mib` is that peak (interpreter, libraries, weights, packed copies,
optimizer state, and what a call needs); `call_mib` is the part of it that was not resident between calls.
On a GPU it is the memory that PyTorch's allocator gave out there, counted likewise. Of resident memory, Linux
alone can reset the peak; elsewhere `peak_mib` is that of the whole process with its set-up, and `call_mib` is
None. Where a call has a backward pass, `saved_mib` is what the forward pass holds for it.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

CALLS = 3


def measure(case: Any, name: str, artifacts: Path, threads: int, timeout: float = 900) -> dict[str, Any]:
    """Run this module for one baseline of `case`. RuntimeError: it failed; the message is its last line."""
    request = {
        "kind": case.kind,
        "fields": case.fields(),
        "name": name,
        "artifacts": str(artifacts),
        "threads": threads,
    }
    command = [sys.executable, "-m", __name__, json.dumps(request)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no answer in {timeout:.0f} s") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        said = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise RuntimeError(f"exit status {done.returncode}: {said}")
    return json.loads(lines[-1])


def status_mib(field: str) -> float | None:
    """A field of /proc/self/status (VmRSS, VmHWM) in MiB; None where there is no such file."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return None


def reset_peak() -> bool:
    """Give free heap memory back and set the peak to what is resident now. False where that is impossible."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def whole_process_mib() -> float | None:
    """Peak since the process began."""
    try:
        import resource
    except ImportError:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (unit / 2**20)


def watch_gpu(call: Any) -> dict[str, Any]:
    """Peak memory of `call` on the current GPU, once it has settled."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(CALLS):
        call()
    peak = torch.cuda.max_memory_allocated()
    return {
        "peak_mib": round(peak / 2**20, 1),
        "call_mib": round((peak - held) / 2**20, 1),
        "measure": "peak on the GPU over calls after warm-up",
    }


def watch(call: Any) -> dict[str, Any]:
    """Peak memory of `call`, once it has settled."""
    for _ in range(2):
        call()
    if not reset_peak():
        for _ in range(CALLS):
            call()
        return {
            "peak_mib": whole_process_mib(),
            "call_mib": None,
            "measure": "peak of the process with set-up",
        }
    resident = status_mib("VmRSS")
    for _ in range(CALLS):
        call()
    peak = status_mib("VmHWM")
    if peak is None or resident is None:
        raise RuntimeError("/proc/self/status has no VmHWM or no VmRSS")
    return {
        "peak_mib": round(peak, 1),
        "call_mib": round(max(peak - resident, 0.0), 1),
        "measure": "peak of the process over calls after warm-up",
    }


def main(argument: str) -> int:
    from tnt_kernels.bench.engine import case_of

    request = json.loads(argument)
    torch.set_num_threads(request["threads"])
    case = case_of(request["kind"], request["fields"])
    runner = case.baselines()[request["name"]].build(case, Path(request["artifacts"]))
    found = watch_gpu(runner.call) if case.device == "cuda" else watch(runner.call)
    if runner.saved_bytes is not None:
        found["saved_mib"] = round(runner.saved_bytes() / 2**20, 1)
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
