"""How a build finds nvcc and what it asks of it. A script stands for nvcc; test_nvcc.py has the real one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from small_builds import BUILD_VARIABLES, build, compiled, environment, make_small_tree, modules

import build_cuda

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the stand-in for nvcc is a shell script")

# Objects are plain C++; what it was called with is noted down beside it.
NVCC = """#!/bin/sh
here=$(dirname "$0")
echo "$*" >> "$here/calls"
case "$*" in
  --version) echo "Cuda compilation tools, release RELEASE, V1" ;;
  --list-gpu-code) printf 'sm_75\\nsm_80\\nsm_86\\nsm_87\\nsm_89\\nsm_90\\n' ;;
  -dryrun*) echo "#\\$ TOP=$here/.." >&2 ;;
  *)
    FAILURE
    while [ $# -gt 0 ]; do
      case "$1" in -o) target=$2 ;; *.cu) source=$1 ;; -MF) depfile=$2 ;; esac
      shift
    done
    case "$source" in *probe.cu) code='int main() {}' ;; *) code='int cuda_answer() { return 42; }' ;; esac
    echo "$code" | c++ -x c++ -fPIC -c - -o "$target"
    [ -z "$depfile" ] || echo "$target:" > "$depfile" ;;
esac
"""
UNSUPPORTED = 'echo "host_config.h:1:2: error: #error -- unsupported GNU version!" >&2; exit 1'
CUDA_BINDINGS = """
#include <pybind11/stl.h>
int cuda_answer();
void bind_cuda(pybind11::module_& m) {
  m.attr("cuda_answer") = cuda_answer();
  m.attr("cuda_version") = TNT_CUDA_VERSION;
  m.attr("cuda_architectures") = std::vector<int>{TNT_CUDA_ARCHITECTURES};
}
"""


def make_toolkit(home: Path, release: str = "12.4", failure: str = "") -> Path:
    (home / "bin").mkdir(parents=True)
    (home / "lib").mkdir()
    script = NVCC.replace("RELEASE", release).replace("FAILURE", failure)
    (home / "bin/nvcc").write_text(script)
    (home / "bin/nvcc").chmod(0o755)
    subprocess.run(["ar", "rc", home / "lib/libcudart_static.a"], check=True)
    return home


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = make_small_tree(tmp_path / "a tree")
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/pixel_embed.cu").write_text("// the stand-in writes an object of its own\n")
    (tree / "csrc/cuda_bindings.cpp").write_text(CUDA_BINDINGS)
    return tree


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    return make_toolkit(tmp_path / "tool kit")


def calls(toolkit: Path) -> list[str]:
    path = toolkit / "bin/calls"
    return path.read_text().splitlines() if path.exists() else []


def compilation(toolkit: Path) -> str:
    (found,) = [call for call in calls(toolkit) if "pixel_embed.cu" in call]
    return found


def answer(tree: Path) -> str:
    script = "import tnt_kernels._native as n; print(n.cuda_answer, n.cuda_version, n.cuda_architectures[-1])"
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True).stdout.strip()


def said(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if "CUDA" in line or "nvcc" in line]


def without_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    for name in BUILD_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH", "PATH"])
def test_nvcc_is_found(toolkit: Path, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_nvcc(monkeypatch)
    monkeypatch.setenv(variable, str(toolkit / "bin" if variable == "PATH" else toolkit))
    assert build_cuda.find_nvcc() == f"{toolkit}/bin/nvcc"


def test_nvcc_of_pips_packages_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_nvcc(monkeypatch)
    toolkit = make_toolkit(tmp_path / "site/nvidia/cu13", release="13.0")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    assert build_cuda.find_nvcc() == f"{toolkit}/bin/nvcc"


def test_kernels_for_every_gpu_that_nvcc_knows(tree: Path, toolkit: Path) -> None:
    result = build(tree, TNT_BUILD_CUDA="1", CUDA_HOME=str(toolkit))
    assert "pixel_embed_cuda" in compiled(result)
    assert said(result) == []
    assert answer(tree) == "42 12.4 90"
    # Machine code for each of ours that this nvcc knows, PTX of the newest.
    flags = [word for word in compilation(toolkit).split() if word.startswith("-gencode")]
    codes = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (75, 80, 86, 89, 90)]
    assert flags == [*codes, "-gencode=arch=compute_90,code=compute_90"]
    assert "-Xfatbin=-compress-all" in compilation(toolkit)
    assert compiled(build(tree, TNT_BUILD_CUDA="1", CUDA_HOME=str(toolkit))) == set()
    # Another choice compiles what it concerns.
    result = build(tree, CUDA_HOME=str(toolkit), TNT_CUDA_ARCHS="8.6")
    assert compiled(result) == {"pixel_embed_cuda", "cuda_bindings"}
    last = [word for word in calls(toolkit)[-1].split() if word.startswith("-gencode")]
    assert last == ["-gencode=arch=compute_86,code=sm_86", "-gencode=arch=compute_86,code=compute_86"]
    assert answer(tree) == "42 12.4 86"


def test_skipped_where_it_is_not_wanted(tree: Path, toolkit: Path) -> None:
    result = build(tree, TNT_BUILD_CUDA="0", CUDA_HOME=str(toolkit))
    assert "pixel_embed_cuda" not in compiled(result)
    assert calls(toolkit) == []
    assert said(result) == ["tnt_kernels: TNT_BUILD_CUDA=0: built without CUDA kernels"]


@pytest.mark.parametrize(
    ("release", "failure", "message"),
    [
        ("11.8", "", "is of CUDA 11.8; 12.4 is the oldest supported"),
        ("12.3", "", "is of CUDA 12.3; 12.4 is the oldest supported"),
        (
            "12.8",
            UNSUPPORTED,
            "fails on a small program: host_config.h:1:2: error: #error -- unsupported GNU version!",
        ),
    ],
)
def test_an_nvcc_that_does_not_do(
    tree: Path, tmp_path: Path, release: str, failure: str, message: str
) -> None:
    home = make_toolkit(tmp_path / "toolkit", release, failure)
    result = build(tree, CUDA_HOME=str(home), TNT_BUILD_CUDA="1")
    assert result.returncode != 0
    assert result.stderr == f"tnt_kernels: TNT_BUILD_CUDA=1, but {home}/bin/nvcc {message}\n"


def test_a_host_compiler_that_fails(tree: Path, tmp_path: Path) -> None:
    """The words are nvcc's own where its host compiler does nothing."""
    words = "nvcc fatal   : Failed to preprocess host compiler properties."
    home = make_toolkit(
        tmp_path / "toolkit", failure=f'[ -z "$NVCC_CCBIN" ] || {{ echo "{words}" >&2; exit 1; }}'
    )
    result = build(tree, CUDA_HOME=str(home), NVCC_CCBIN="/bin/false")
    why = f"{home}/bin/nvcc with NVCC_CCBIN=/bin/false fails on a small program: {words}"
    assert said(result) == [f"tnt_kernels: {why}: built without CUDA kernels, GPUs run those of Triton"]
    assert "Traceback" not in result.stderr
    assert modules(tree)
    assert "pixel_embed_cuda" in compiled(build(tree, CUDA_HOME=str(home)))


def test_cuda_13_packs_harder(tree: Path, tmp_path: Path) -> None:
    home = make_toolkit(tmp_path / "toolkit", release="13.0")
    compiled(build(tree, CUDA_HOME=str(home)))
    assert "--compress-mode=size" in compilation(home)


def test_without_the_static_runtime(tree: Path, toolkit: Path) -> None:
    (toolkit / "lib/libcudart_static.a").unlink()
    result = build(tree, CUDA_HOME=str(toolkit), TNT_BUILD_CUDA="1")
    assert result.returncode != 0
    (line,) = result.stderr.splitlines()
    assert "cudart_static" in line


def test_a_folder_without_nvcc(tree: Path, tmp_path: Path) -> None:
    result = build(tree, CUDA_HOME=str(tmp_path))
    assert modules(tree)
    (line,) = said(result)
    assert line.startswith(f"tnt_kernels: CUDA_HOME={tmp_path} has no bin/nvcc: built without CUDA kernels")


@pytest.mark.parametrize("wanted", ["86;80", "8.0, 8.6,", "sm_86 sm_80"])
def test_chosen_architectures(wanted: str) -> None:
    assert build_cuda.choose_architectures(wanted, {75, 80, 86, 90}) == [80, 86]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("70", "this nvcc does not know sm_70; it knows sm_75, sm_80, sm_86, sm_87, sm_89, sm_90"),
        ("90 fast", "fast is none of native, 90, 9.0, sm_90 and the like"),
        ("native", "nvidia-smi shows no GPU"),
    ],
)
def test_architectures_that_cannot_be(tree: Path, toolkit: Path, wanted: str, message: str) -> None:
    result = build(tree, CUDA_HOME=str(toolkit), TNT_CUDA_ARCHS=wanted, PATH="/usr/bin:/bin")
    assert result.returncode != 0
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"tnt_kernels: TNT_CUDA_ARCHS={wanted}: ") or wanted == "native"
    assert line.endswith(message)


def test_architecture_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\nprintf '8.9\\n12.0\\n8.9\\n'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert build_cuda.choose_architectures("native", {75, 80, 89, 120}) == [89, 120]
