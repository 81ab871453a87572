"""Finds nvcc for setup.py and says how csrc/cuda is compiled: for which GPUs, and linked with what."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

OLDEST = (12, 4)
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)

COMMON_FLAGS = [
    "-std=c++17",
    "-O3",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-g0",
    "-Wno-deprecated-gpu-targets",
]
# What the kernels need, in the least code: 16-bit types, a kernel, the runtime.
PROBE = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
__global__ void probe(__nv_bfloat16* out) { *out = __float2bfloat16(__half2float(__half(1.f))); }
int main() { probe<<<1, 1>>>(nullptr); return cudaGetLastError(); }
"""


class Unusable(Exception):
    """CUDA kernels cannot be built here; the message says why."""


class Toolkit(NamedTuple):
    """An nvcc that works."""

    nvcc: str
    release: tuple[int, int]  # (13, 0)
    host: list[str]  # flags that choose the host compiler
    architectures: list[int]  # 90 for sm_90; PTX too for the last of them
    libraries: list[str]  # link flags

    @property
    def flags(self) -> list[str]:
        return [*self.host, *COMMON_FLAGS, compression(self.release), *gpu_flags(self.architectures)]

    @property
    def defines(self) -> list[str]:
        """What cuda_bindings.cpp tells of the build."""
        major, minor = self.release
        numbers = ",".join(map(str, self.architectures))
        return [f'-DTNT_CUDA_VERSION="{major}.{minor}"', f"-DTNT_CUDA_ARCHITECTURES={numbers}"]


def compression(release: tuple[int, int]) -> str:
    """Machine code for seven GPUs is most of the module and packs to an eighth.

    The stronger mode needs a driver of CUDA 12.4 or later. What CUDA 12 builds may meet an older one; what
    CUDA 13 builds would not run there anyway.
    """
    return "--compress-mode=size" if release >= (13, 0) else "-Xfatbin=-compress-all"


def gpu_flags(architectures: list[int]) -> list[str]:
    """Machine code for each of them, and PTX of the newest for GPUs that come later."""
    code = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    newest = architectures[-1]
    return [*code, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def find_toolkit(compiler: list[str]) -> Toolkit:
    """Returns the nvcc to be used, tried with this C++ compiler as its host compiler.

    Raises:
        Unusable: there is none, or it is too old or does not get on with the compiler.
        ValueError: TNT_CUDA_ARCHS asks for what cannot be.
    """
    nvcc = find_nvcc()
    release = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
    if release is None:
        raise Unusable(f"{nvcc} --version tells no version")
    major, minor = map(int, release.groups())
    if (major, minor) < OLDEST:
        raise Unusable(f"{nvcc} is of CUDA {major}.{minor}; {OLDEST[0]}.{OLDEST[1]} is the oldest supported")
    known = {int(code) for code in re.findall(r"^sm_(\d+)$", _output(nvcc, "--list-gpu-code"), re.MULTILINE)}
    toolkit = Toolkit(
        nvcc,
        (major, minor),
        host_flags(compiler),
        choose_architectures(os.environ.get("TNT_CUDA_ARCHS", ""), known),
        [*_library_folders(nvcc), "-lcudart_static", "-lpthread", "-ldl", "-lrt"],
    )
    _try(toolkit, compiler)
    return toolkit


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        found = shutil.which("nvcc", path=Path(home, "bin"))
        if found is None:
            raise Unusable(f"CUDA_HOME={home} has no bin/nvcc")
        return found
    found = shutil.which("nvcc") or next(_from_packages(), None)
    if found is None:
        raise Unusable("no nvcc found (CUDA_HOME, PATH, pip's nvidia-cuda-nvcc)")
    return found


def _from_packages() -> Iterator[str]:
    """nvcc of the package nvidia-cuda-nvcc, in this environment or the one that pip builds for."""
    folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for folder in dict.fromkeys(folders):
        for path in sorted(Path(folder).glob("nvidia/cu*/bin/nvcc"), reverse=True):
            found = shutil.which(str(path))
            if found is not None:
                yield found


def host_flags(compiler: list[str]) -> list[str]:
    if os.environ.get("NVCC_CCBIN"):
        return []
    program, *options = compiler
    return [f"-ccbin={program}", *(f"-Xcompiler={option}" for option in options)]


def choose_architectures(wanted: str, known: set[int]) -> list[int]:
    """Returns what TNT_CUDA_ARCHS asks for, or when it is empty all of ours that nvcc knows.

    `wanted` lists them as 90, 9.0 or sm_90; `native` stands for the GPUs of this machine.

    Raises ValueError for one that nvcc does not know.
    """
    names = re.findall(r"[^\s,;]+", wanted)
    if not names:
        return [number for number in ARCHITECTURES if number in known]
    found: set[int] = set()
    for name in names:
        if name == "native":
            found.update(_native())
        elif re.fullmatch(r"(sm_)?\d{2,3}|\d{1,2}\.\d", name):
            found.add(int(name.removeprefix("sm_").replace(".", "")))
        else:
            raise ValueError(
                f"TNT_CUDA_ARCHS={wanted}: {name} is none of native, 90, 9.0, sm_90 and the like"
            )
    unknown = sorted(found - known)
    if unknown:
        raise ValueError(
            f"TNT_CUDA_ARCHS={wanted}: this nvcc does not know {', '.join(f'sm_{n}' for n in unknown)}; "
            f"it knows {', '.join(f'sm_{number}' for number in sorted(known))}"
        )
    return sorted(found)


def _native() -> list[int]:
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        lines = ""
    found = [int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", lines, re.MULTILINE)]
    if not found:
        raise ValueError("TNT_CUDA_ARCHS=native: nvidia-smi shows no GPU")
    return found


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unusable(f"{command[0]} does not run ({error})") from error


def _library_folders(nvcc: str) -> list[str]:
    """Where nvcc itself would look for the runtime."""
    shown = subprocess.run([nvcc, "-dryrun", "none.cu"], capture_output=True, text=True).stderr
    folders = re.findall(r'"-L([^"]*)"', shown)
    folders += [str(Path(top, "lib")) for top in re.findall(r"TOP=(.*)", shown)]
    found = (Path(folder).resolve() for folder in folders if Path(folder).is_dir())
    return [f"-L{folder}" for folder in dict.fromkeys(found)]


def _try(toolkit: Toolkit, compiler: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "probe.cu"), Path(folder, "probe.o")
        source.write_text(PROBE)
        newest = toolkit._replace(architectures=toolkit.architectures[-1:])  # one is enough to see
        compile_it = [toolkit.nvcc, *newest.flags, "-c", str(source), "-o", str(target)]
        link_it = [*compiler, str(target), *toolkit.libraries, "-o", str(target.with_suffix(""))]
        for command in (compile_it, link_it):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                host = os.environ.get("NVCC_CCBIN")
                name = f"{command[0]} with NVCC_CCBIN={host}" if host else command[0]
                raise Unusable(f"{name} fails on a small program: {_telling_line(done.stderr + done.stdout)}")


def _telling_line(shown: str) -> str:
    lines = [line.strip() for line in shown.splitlines() if line.strip()] or ["no message"]
    return next((line for line in lines if re.search("error|fatal|cannot find", line)), lines[0])
