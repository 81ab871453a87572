# Every target runs from a fresh clone: it makes .venv and installs what it needs there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: demo train-demo test bench lint format sanitize clean native

# What is shown on this machine needs no kernels for other GPUs than its own; compiling those takes minutes.
ifeq ($(shell nvidia-smi -L 2>/dev/null),)
demo train-demo bench: export TNT_BUILD_CUDA ?= 0
else
demo train-demo bench: export TNT_CUDA_ARCHS ?= native
endif

demo: $(VENV)/.programs native
	$(BIN)/python -m tnt_kernels demo

# A small TNT on handwritten digits, then what it makes of some that it has not seen.
train-demo: $(VENV)/.programs native
	$(BIN)/python python/train.py --dataset digits --output runs/train-demo --overwrite
	$(BIN)/python python/digits.py runs/train-demo/digits --per-class 1
	$(BIN)/python python/predict.py runs/train-demo/digits/val --checkpoint runs/train-demo/best.pt --top-k 2

# A machine that cannot build the CPU kernels, a warning of nvcc, or a test that did not run fails the run. Without
# nvcc the summary says which tests were NOT RUN.
test: export TNT_BUILD_AMX_EMULATION = 1
test: export TNT_BUILD_CPU = 1
test: export NVCC_APPEND_FLAGS += -Werror all-warnings -Xptxas=--warn-on-spills
test: $(VENV)/.test native
	$(BIN)/python -m pytest -rs --no-skips -m ''
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -rs --no-skips tests/interpreter

bench: $(VENV)/.bench native
	$(BIN)/python -m tnt_kernels bench

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	$(BIN)/mypy

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

sanitize: $(VENV)/.test
	PYTHON=$(BIN)/python tools/sanitize

clean:
	rm -rf $(VENV) build dist *.egg-info tnt_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Ninja compiles only what changed.
native:
	$(BIN)/python setup.py -q build_ext --inplace

# torch comes first and pinned: left to a dependency, pip takes the newest build, gigabytes of CUDA with it.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $$(grep '^torch==' constraints.txt) setuptools pybind11 ninja
	touch $@

# $(VENV)/.test has the extra [test], and so on; the native module is the target above.
$(VENV)/.%: $(VENV)/.torch pyproject.toml
	TNT_BUILD_CPU=0 $(INSTALL) -e '.[$*]'
	touch $@

.PRECIOUS: $(VENV)/.torch
