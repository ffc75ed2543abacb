# make demo: a fresh machine to a streamed answer.    make test: everything that has to pass.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
# One thread: for the tests' small tensors a second one only waits, and on a busy machine it waits long.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
.DEFAULT_GOAL := help
.PHONY: help demo test lint slow sanitize neon model clean
KERNELS := CMakeLists.txt $(wildcard src/kvant/kernels/cpu/csrc/*)

help:
	@echo "make demo      install kvant into $(VENV), fetch a small model (98 MB) and talk to it"
	@echo "make test      install the development tools, then run linters, type checks and tests"
	@echo "make lint      linters and type checks only"
	@echo "make slow      the tests that take longer"
	@echo "make sanitize  the kernels' tests under AddressSanitizer and UBSan; needs CMake and g++"
	@echo "make neon      the kernels' tests on an emulated ARM CPU: docs/notes/neon.md tells what that needs"
	@echo "make clean     remove $(VENV) and everything that was built or cached here"
	@echo "PYTHON=... picks the interpreter (3.11 or newer), VENV=... another place than .venv."

demo: $(VENV)/.kvant model
	@$(BIN)/python examples/demo.py

# A process for each CPU that is ours, eight at most; who is done first takes over tests of others.
PARALLEL := -n $(shell nproc 2>/dev/null || echo 2) --maxprocesses 8 --dist worksteal
# Triton's interpreter would be two to three times as slow under the coverage tool.
test: lint model
	@$(PYTEST) $(PARALLEL) -k "not triton" --cov=kvant --cov-report=term
	@$(PYTEST) $(PARALLEL) -k triton

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

slow: $(VENV)/.dev model
	@$(PYTEST) -m slow

# The interpreter is built without the sanitizer: its runtime has to be loaded before, with the C++ library it wraps.
sanitize: $(VENV)/.dev
	@dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; set -e; \
	cmake -S . -B "$$dir" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DKVANT_SANITIZE=address,undefined; \
	cmake --build "$$dir" --parallel; \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 KVANT_CPU_LIBRARY="$$dir/_kernels.so" \
	$(PYTEST) tests/test_parity.py tests/kernels

# torch 2.9 has no indexing of 8-bit floats on ARM.
ARM_CXX ?= aarch64-linux-gnu-g++
ARM_PYTHON ?= qemu-aarch64-static -cpu max,pauth-impdef=on -L $(ARM_ROOT) $(ARM_ROOT)/usr/bin/python3
ARM_TESTS ?= (neon or generic) and not fp8 and not test_a_layer_without_a_kernel
neon:
	@dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; set -e; \
	cmake -S . -B "$$dir" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(ARM_CXX); \
	cmake --build "$$dir" --parallel; \
	KVANT_CPU_LIBRARY="$$dir/_kernels.so" PYTHONPATH=src:$(ARM_ROOT)/site OMP_NUM_THREADS=1 \
	$(ARM_PYTHON) -m pytest tests/test_parity.py tests/kernels --ignore=tests/kernels/triton -k "$(ARM_TESTS)"

model: $(VENV)/.kvant
	@$(BIN)/kvant models pull smollm2

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
	find src tests examples -name __pycache__ -type d -exec rm -rf {} +

# Each install leaves a stamp, so that the next run begins with the work. The second leaves kvant itself as it is.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "kvant needs Python 3.11 or newer, and $(PYTHON) is not that. Name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.kvant: pyproject.toml constraints.txt $(KERNELS) | $(VENV)/.python
	@echo "Installing kvant into $(VENV), and building its kernels; PyTorch is large, this can take minutes."
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.kvant
	@echo "Installing the development tools into $(VENV)."
	@$(PIP) install -c constraints.txt 'kvant[serve,dev]'
	@touch $@
