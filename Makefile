# `make demo` and `make test` are all that a fresh machine needs: both create .venv and install
# what they use.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
CODE := setup.py $(wildcard dpo_fast kernels benchmarks tests examples)
JOBS ?= 2
ONGPU := PYTHONPATH=$(CURDIR):$(CURDIR)/kernels:$(PYTHONPATH) $(PYTHON)

.PHONY: demo test check test-gpu bench bench-gpu clean

demo: $(VENV)/.runtime  ## the main job: a small model, four reference strategies, a table and a picture
	$(BIN)/dpo-fast demo --output_dir runs/demo

test: $(VENV)/.test $(VENV)/.deepspeed  ## everything that needs no GPU
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile tests

check: $(VENV)/.test  ## lint, format, types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

test-gpu:  ## correctness at real sizes; needs a CUDA device and an environment with torch; PARTS="head bits"
	$(ONGPU) -m tests.gpu $(PARTS)

bench: $(VENV)/.test  ## CPU benchmarks, against the naive loop and TRL
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.ema
	$(BIN)/python -m benchmarks.layout

bench-gpu:  ## LM head and EMA on a CUDA device, against the peers; resumes where it stopped
	$(ONGPU) -m benchmarks.head_gpu --seconds 400
	$(ONGPU) -m benchmarks.ema --device cuda

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: $(SOURCES) | $(VENV)/bin/python
	$(PIP) install -q -c constraints.txt -e .
	touch $@

$(VENV)/.test: $(VENV)/.runtime
	$(PIP) install -q -c constraints.txt -e ".[test,check]"
	touch $@

# In a folder of its own, which only the launches of ZeRO see: transformers, accelerate and TRL import
# DeepSpeed wherever they can, in every process. Without a compiled op it installs in seconds.
$(VENV)/.deepspeed: $(VENV)/.test
	$(PIP) install -q setuptools wheel
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(PIP) install -q --no-build-isolation --no-deps --upgrade \
		-c constraints.txt --target $(VENV)/deepspeed \
		deepspeed einops hjson msgpack ninja py-cpuinfo
	touch $@

clean:
	rm -rf $(VENV) build runs *.egg-info dpo_fast/_C.*
