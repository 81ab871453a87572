"""Builds csrc/ into one native module, tnt_kernels/_native, that knows nothing of torch.

csrc/cpu/kernels.cpp and gradients.cpp are compiled once per SIMD tier, each time with its own -m flags.
bindings.cpp and dispatch.cpp get no -m flag: they run before the processor's features are known.
csrc/cuda is compiled where nvcc is found (build_cuda.py); the CUDA runtime is linked statically, so that the
module loads without a driver. docs/environment.md lists the variables that are read here.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple, NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # pip builds without it

import build_cuda  # noqa: E402

COMMON_FLAGS = [
    "-std=c++17",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-fPIC",
    "-g0",
    "-Wall",
    "-Wextra",
]

# Shares no pybind11 state with other modules in the process: their C++ runtime may be another one.
PRIVATE_PYBIND11 = ['-DPYBIND11_COMPILER_TYPE="_tnt_kernels"']


class Tier(NamedTuple):
    name: str
    flags: list[str]
    probe: str  # a statement that the compiler and the assembler must both know


AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
BF16_PROBE = "_mm512_dpbf16_ps(_mm512_setzero_ps(), __m512bh(), __m512bh())"

PORTABLE = Tier("portable", [], "")
X86_TIERS = [
    Tier("avx2", AVX2, "_mm256_fmadd_ps(_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps())"),
    Tier("avx512", AVX512, "_mm512_setzero_ps()"),
    Tier("avx512_bf16", AVX512_BF16, BF16_PROBE),
    Tier("amx", [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"], "_tile_dpbf16ps(0, 1, 2)"),
]
AMX_EMULATED = Tier("amx_emulated", AVX512_BF16, BF16_PROBE)


def say(message: str) -> None:
    print(f"tnt_kernels: {message}", file=sys.stderr, flush=True)


def fail(message: str) -> NoReturn:
    raise SystemExit(f"tnt_kernels: {message}")


def tri_state(name: str) -> bool | None:
    """The value of a build variable: unset or empty = None, 1 = True, 0 = False."""
    value = os.environ.get(name, "").strip()
    if value not in ("", "0", "1"):
        fail(f"{name}={value}: must be 1 (build it), 0 (skip it) or unset (build it where possible)")
    return None if value == "" else value == "1"


def jobs() -> int:
    value = os.environ.get("MAX_JOBS", "").strip()
    if not value:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not value.isdigit() or int(value) == 0:
        fail(f"MAX_JOBS={value}: must be a whole number, 1 or more")
    return int(value)


def find_compiler() -> list[str] | None:
    if os.name == "nt":
        return None  # the flags are those of GCC and Clang
    if os.environ.get("CXX"):
        program, *options = shlex.split(os.environ["CXX"])
        found = shutil.which(program)
        return [found, *options] if found else None
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else None


def find_toolkit(compiler: list[str]) -> build_cuda.Toolkit | None:
    wanted = tri_state("TNT_BUILD_CUDA")
    if wanted is False:
        say("TNT_BUILD_CUDA=0: built without CUDA kernels")
        return None
    try:
        return build_cuda.find_toolkit(compiler)
    except ValueError as error:
        fail(str(error))
    except build_cuda.Unusable as error:
        if wanted:
            fail(f"TNT_BUILD_CUDA=1, but {error}")
        say(f"{error}: built without CUDA kernels, GPUs run those of Triton")
        return None


def find_ninja() -> str | None:
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    return shutil.which("ninja", path=ninja.BIN_DIR) or shutil.which("ninja")


def compiles(compiler: list[str], flags: list[str], source: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.cpp")
        path.write_text(source)
        command = [*compiler, "-w", str(path), "-o", str(path.with_suffix(".out")), *flags]
        return subprocess.run(command, capture_output=True).returncode == 0


def choose_tiers(compiler: list[str]) -> list[Tier]:
    tiers = [PORTABLE]
    if not compiles(compiler, ["-c"], "#ifndef __x86_64__\n#error not x86-64\n#endif\n"):
        return tiers
    wanted = [*X86_TIERS, *([AMX_EMULATED] if tri_state("TNT_BUILD_AMX_EMULATION") else [])]
    for tier in wanted:
        source = f"#include <immintrin.h>\nvoid probe() {{ {tier.probe}; }}\n"
        if compiles(compiler, ["-c", *tier.flags], source):
            tiers.append(tier)
        else:
            say(f"the compiler does not know {' '.join(tier.flags)}: built without tier {tier.name}")
    return tiers


def openmp_flags(compiler: list[str]) -> list[str]:
    source = "#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }\n"
    if compiles(compiler, ["-fopenmp"], source):
        return ["-fopenmp"]
    say("the compiler has no OpenMP (-fopenmp): built without it, the CPU kernels run on one thread")
    return []


def sanitizer_flags() -> list[str]:
    names = os.environ.get("TNT_SANITIZE", "").strip()
    if not names:
        return []
    return [f"-fsanitize={names}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g1"]


def link_flags(compiler: list[str], sanitizers: list[str]) -> list[str]:
    if sys.platform == "darwin":
        return ["-bundle", "-undefined", "dynamic_lookup"]
    flags = ["-shared", "-Wl,--version-script=exports.map"]
    # The C++ runtime goes inside, so that an older libstdc++ in the process (conda's, say) does no harm.
    # libgomp stays outside: by its name libgomp.so.1 the loader finds the one that torch brought along.
    static = ["-static-libstdc++", "-static-libgcc"]
    source = "#include <string>\nint main() { return std::string().size(); }\n"
    if not sanitizers and compiles(compiler, static, source):
        flags += static
    return flags if sanitizers else [*flags, "-s"]  # no names of local symbols


def ninja_path(path: str | Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_command(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def ninja_file(compiler: list[str], toolkit: build_cuda.Toolkit | None, output: Path) -> str:
    import pybind11

    sanitizers = sanitizer_flags()
    openmp = openmp_flags(compiler)
    tiers = choose_tiers(compiler)
    # The user's flags come first: where the two disagree, ours hold.
    compile_flags = [*shlex.split(os.environ.get("CXXFLAGS", "")), *COMMON_FLAGS, *openmp, *sanitizers]
    link = [*link_flags(compiler, sanitizers), *openmp, *sanitizers[:1]]
    link += toolkit.libraries if toolkit else []
    link += shlex.split(os.environ.get("LDFLAGS", ""))

    have = [f"-DTNT_HAVE_{tier.name.upper()}=1" for tier in tiers]
    includes = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    units = {
        "bindings.o": (
            "csrc/bindings.cpp",
            [*have, f"-DTNT_HAVE_CUDA={int(toolkit is not None)}", *PRIVATE_PYBIND11, *includes],
        ),
        "dispatch.o": ("csrc/cpu/dispatch.cpp", have),
    }
    if toolkit is not None:
        units["cuda_bindings.o"] = (
            "csrc/cuda_bindings.cpp",
            [*toolkit.defines, *PRIVATE_PYBIND11, *includes],
        )
    for tier in tiers:
        defines = [f"-DTNT_TIER={tier.name}", f"-DTNT_TIER_{tier.name.upper()}=1"]
        for source in ("kernels", "gradients"):
            units[f"{source}_{tier.name}.o"] = (f"csrc/cpu/{source}.cpp", [*defines, *tier.flags])

    command = ninja_command(compiler)
    lines = [
        "rule compile",
        f"  command = {command} {ninja_command(compile_flags)} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = {command} $in {ninja_command(link)} -o $out",
        "  description = link $out",
    ]
    objects = list(units)
    if toolkit is not None:  # before the others: these take longest, and ninja begins at the top
        lines += cuda_lines(toolkit)
        objects += cuda_objects()
    for target, (source, flags) in units.items():
        lines.append(f"build {target}: compile {ninja_path(ROOT / source)}")
        lines.append(f"  flags = {ninja_command(flags)}")
    lines.append(f"build {ninja_path(output)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def cuda_objects() -> dict[str, Path]:
    """Every source of csrc/cuda, the longest first, by the object it becomes."""
    sources = sorted(ROOT.glob("csrc/cuda/*.cu"), key=lambda path: (-path.stat().st_size, path))
    return {f"{path.stem}_cuda.o": path for path in sources}


def cuda_lines(toolkit: build_cuda.Toolkit) -> list[str]:
    # nvcc compiles for several GPUs at once, and takes as many processors for one source.
    threads = min(jobs(), len(toolkit.architectures) + 1)
    command = ninja_command([toolkit.nvcc, *toolkit.flags, f"--threads={threads}"])
    lines = [
        "pool cuda",
        f"  depth = {max(1, jobs() // threads)}",
        "rule compile_cuda",
        f"  command = {command} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  pool = cuda",
        "  description = compile $out",
    ]
    return lines + [f"build {name}: compile_cuda {ninja_path(path)}" for name, path in cuda_objects().items()]


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        wanted = tri_state("TNT_BUILD_CPU")
        compiler = None if wanted is False else find_compiler()
        if compiler is None:
            why = "TNT_BUILD_CPU=0" if wanted is False else "no C++ compiler found (CXX, c++, g++, clang++)"
            for variable in ("TNT_BUILD_CPU", "TNT_BUILD_CUDA"):
                if tri_state(variable):
                    fail(f"{variable}=1, but {why}")
            say(f"{why}: installed without the native module, every op runs in plain PyTorch")
            output.unlink(missing_ok=True)  # of an earlier build
            return
        processes = jobs()
        ninja = find_ninja()
        if ninja is None or importlib.util.find_spec("pybind11") is None:
            fail("building without isolation needs two packages: pip install pybind11 ninja")

        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        (folder / "exports.map").write_text("{ global: PyInit__native; local: *; };\n")
        toolkit = find_toolkit(compiler)
        (folder / "build.ninja").write_text(ninja_file(compiler, toolkit, output))
        if subprocess.run([ninja, "-C", str(folder), "-j", str(processes)]).returncode:
            ways_out = "TNT_BUILD_CUDA=0 leaves out the CUDA kernels, " if toolkit else ""
            ways_out += "TNT_BUILD_CPU=0 installs without it"
            fail(f"the native module did not compile, see above; {ways_out}")


setup(
    # optional: setuptools then accepts that a build without a compiler leaves no file
    ext_modules=[Extension("tnt_kernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
