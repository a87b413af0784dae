# Every target sets up .venv by itself; `make` alone lists the targets.
# PYTHON= names the interpreter .venv is built on. BIN= (empty) uses the tools on PATH and sets nothing up.
# JOBS= is the number of processes that run tests side by side.
PYTHON ?= python3
BIN := .venv/bin/

ifeq ($(BIN),.venv/bin/)
READY := .venv/.ready
TESTABLE := .venv/.testable
OLDEST := .venv/oldest-triton/.ready
endif

# The tests' tensors are small: a second thread brings little, and where cores are shared its spinning costs a lot.
ONE_THREAD := env OMP_NUM_THREADS=1
PYTEST := env -u TRITON_INTERPRET OMP_NUM_THREADS=1 $(BIN)pytest

# Tests start many processes. Where nothing is kept, each compiles the package and rewrites hypothesis's assertions.
unexport PYTHONDONTWRITEBYTECODE

# Processes of each leg. A file's tests stay in one, so that what they share is made once.
JOBS ?= 2
SPREAD := -n $(JOBS) --dist loadfile

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup demo test lint format test-reference test-interpreter test-compile oldest-triton test-oldest \
	test-slow gpu bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

SOURCES := .ci/setup pyproject.toml constraints.txt anpgpu/_version.py

.venv/.ready: $(SOURCES)
	.ci/setup cpu,examples,plot $(PYTHON)
	@touch $@

# Linters, pytest and NVRTC, a compiler the tests of the CuPy kernels use: what only a developer needs.
.venv/.testable: $(SOURCES)
	.ci/setup cpu,examples,plot,test,dev $(PYTHON)
	@touch .venv/.ready $@

# Compilers need no torch of their version: the package alone, in a folder that is put in front of the newer one.
.venv/oldest-triton/.ready: constraints-oldest.txt $(TESTABLE)
	rm -rf $(@D)
	$(BIN)python -m pip install -qq --disable-pip-version-check --no-deps --target $(@D) -r constraints-oldest.txt
	@mkdir -p $(@D) && touch $@

setup: $(TESTABLE) ## make .venv (the other targets do this when needed)

demo: $(READY) ## train on handwritten digits without backpropagation, write plots to output/
	$(BIN)python examples/digits.py --output output/

test: lint test-reference test-interpreter test-compile ## what CI runs: lint and the three CPU legs

lint: $(TESTABLE) ## ruff and mypy
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)mypy

format: $(TESTABLE) ## apply ruff's fixes and formatting
	$(BIN)ruff check --fix .
	$(BIN)ruff format .

# Each leg is a process of its own, and pytest's exit status 5 (nothing to run) fails it.
test-reference: $(TESTABLE) ## torch on the CPU
	$(PYTEST) tests $(SPREAD) -m "not slow and not gpu and not interpreter and not compile"

test-interpreter: $(TESTABLE) ## Triton's interpreter against the reference
	$(ONE_THREAD) TRITON_INTERPRET=1 $(BIN)pytest tests $(SPREAD) -m "interpreter and not slow"

test-compile: $(TESTABLE) $(OLDEST) ## compile every kernel, no GPU needed
	$(PYTEST) tests $(SPREAD) -m "compile and not slow"

oldest-triton: $(OLDEST) ## put the oldest supported Triton into .venv/oldest-triton

test-oldest: $(TESTABLE) $(OLDEST) ## compile every kernel for every architecture with the oldest Triton
	$(PYTEST) tests/test_kernels_compile_oldest.py -m compile
	PYTHONPATH=.venv/oldest-triton $(PYTEST) tests/test_repeated_launches.py -m compile

test-slow: $(TESTABLE) ## the thorough tests (those of the oldest Triton: test-oldest)
	HYPOTHESIS_PROFILE=slow $(PYTEST) tests $(SPREAD) -m "slow and not gpu" --ignore tests/test_kernels_compile_oldest.py

gpu: $(TESTABLE) ## the tests that need a CUDA device, and compute-sanitizer; the result goes to profiling/results
	$(ONE_THREAD) $(BIN)python profiling/check_gpu.py

bench: $(READY) ## time updates on a CUDA device, beside their goals; the result goes to profiling/results
	$(BIN)python profiling/goals.py

clean: ## remove .venv, caches and outputs
	rm -rf .venv output build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
