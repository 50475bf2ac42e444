# Every target sets up what it needs in $(VENV); `make help` lists the targets.
#
#   PYTHON=python3          the Python to start from; a torch >= 2.10 that it has is used
#   TORCH='torch==2.13.0'   install this torch instead
#   VENV=.venv              where the environment goes
#   WORKERS=2               processes that run the tests; unset, one per core, 4 at most
#   ARGS='--size small'     options of bench/real_models.py
#   SANTA_CUDA, SANTA_CUDA_ARCHS, MAX_JOBS: see setup.py. Unset, SANTA_CUDA_ARCHS is native for what is installed here
#                           and setup.py's default for a wheel, which others install.

PYTHON ?= python3
TORCH ?=
VENV ?= .venv
PYTEST_ARGS ?=
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); echo $$((n < 4 ? n : 4)))
ARGS ?=

# Resolved before PATH changes below, where python3 would become the environment's own.
PYTHON_EXE := $(shell $(PYTHON) -c 'import sys; print(sys.executable)')
ifeq ($(PYTHON_EXE),)
$(error '$(PYTHON)' is not a Python that runs: choose one with make PYTHON=...)
endif
BIN := $(abspath $(VENV))/bin
# The starting Python's folder comes last: a ninja or cmake beside it may be the only one.
export PATH := $(BIN):$(PATH):$(dir $(PYTHON_EXE))

# Files of tests go to processes of one thread each: those that are about threads say how many they want.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

OPTIONS := $(VENV)/.options
ENV := $(VENV)/.env-ready
INSTALL := $(VENV)/.installed
LINT := $(VENV)/.lint-ready
GATE := $(VENV)/.gate-ready
MODELS := out/real-models/packages
# How the package itself is built: with what the environment has.
PIP := $(BIN)/python -m pip --disable-pip-version-check
LOCAL_ARCHS := $(or $(SANTA_CUDA_ARCHS),native)
LOCAL := --no-build-isolation --no-deps --no-index --no-cache-dir
SOURCES := setup.py $(shell find csrc -type f)
SETUP_ENV := $(PYTHON_EXE) tools/setup_env.py $(VENV)
CPP_FILES = $(shell find $(wildcard csrc tests bench) -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help env install demo real-models test test-gpu sanitize core-test wheel lint format ci clean FORCE

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

env: $(ENV) ## create the environment without installing the package

install: $(INSTALL) ## build the package and install it, editable, into the environment

demo: $(INSTALL) ## decode a long text with the bundled model, exact and sampled
	$(BIN)/python demo/demo.py

real-models: $(INSTALL) $(MODELS)/.smollm2 $(MODELS)/.gemma3 ## what sampling costs two pretrained models (CPU: half an hour; ARGS='--size small')
	$(BIN)/python bench/real_models.py $(ARGS)

test: $(INSTALL) core-test ## run the tests; those for a GPU say why they are skipped if there is none
	$(PYTEST) $(PYTEST_ARGS)

test-gpu: $(INSTALL) ## run the tests that need a GPU
	$(PYTEST) -m gpu $(PYTEST_ARGS)

# The sanitizers slow the GPU down a hundredfold, hence a selection of tests.
sanitize: $(INSTALL) ## run GPU tests under each tool of compute-sanitizer
	@for tool in memcheck racecheck synccheck initcheck; do echo "== $$tool"; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 9 \
	  $(BIN)/python -m pytest -m "gpu and sanitize" -q $(PYTEST_ARGS) || exit 1; done

core-test: ## run the C++ tests of csrc/core, which need no torch
	@if command -v cmake >/dev/null; then \
	  cmake -S . -B build/cmake -DSANTA_CUDA=OFF >/dev/null && cmake --build build/cmake --parallel && \
	  ctest --test-dir build/cmake --output-on-failure; \
	else echo "there is no cmake: the C++ tests are skipped"; fi

wheel: $(ENV) ## build a wheel and a source distribution into dist/
	@rm -f dist/*.whl dist/*.tar.gz
	$(PIP) wheel $(LOCAL) --wheel-dir dist .
	$(BIN)/python -c 'from setuptools import build_meta; build_meta.build_sdist("dist")' >/dev/null

lint: $(LINT) ## check Python and C++ style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: $(LINT) ## apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

ci: lint $(INSTALL) $(GATE) $(MODELS)/.smollm2 ## everything that .ci/run checks
	$(BIN)/python tools/check_symbols.py santa/_ops.so santa/_ops_cuda.so
	$(BIN)/python tools/check_kernels.py santa/_ops_cuda.so sm_89 sm_90
	$(MAKE) wheel
	$(BIN)/python tools/check_wheel.py dist/*.whl $(TORCH)
	SANTA_CUDA=0 $(PIP) wheel $(LOCAL) --wheel-dir build/from_sdist dist/*.tar.gz
	$(MAKE) test

clean: ## remove what was built; the environment stays
	rm -rf build dist *.egg-info santa/*.so santa/build_info.json $(INSTALL)

# Changes only if an option does, and then everything that depends on the options is redone.
$(OPTIONS): FORCE
	@mkdir -p $(@D)
	@echo '$(PYTHON_EXE) $(TORCH) $(SANTA_CUDA) $(LOCAL_ARCHS)' >$@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

$(ENV): pyproject.toml tools/setup_env.py $(OPTIONS)
	$(SETUP_ENV) package build test transformers --optional bench $(if $(TORCH),--torch '$(TORCH)')
	@touch $@

$(INSTALL): $(ENV) $(SOURCES)
	@echo "compiling santa (minutes with CUDA, less when little has changed)"
	SANTA_CUDA_ARCHS='$(LOCAL_ARCHS)' $(PIP) install $(LOCAL) -e .
	@touch $@

# Not into the environment: Transformers behaves differently where accelerate is installed.
$(MODELS)/.%: bench/pretrained/requirements-%.txt | $(ENV)
	$(PIP) install --no-deps --upgrade --target $(@D) -r $<
	@touch $@

$(LINT): pyproject.toml tools/setup_env.py
	$(SETUP_ENV) lint
	@touch $@

$(GATE): pyproject.toml tools/setup_env.py $(ENV)
	$(SETUP_ENV) gate --no-deps
	@touch $@
