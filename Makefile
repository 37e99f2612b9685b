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

.PHONY: demo test test-faults check test-gpu bench bench-quick bench-gpu clean

demo: $(VENV)/.runtime  ## the main job: a small model, four reference strategies, a table and a picture
	$(BIN)/dpo-fast demo --output_dir runs/demo

test: $(VENV)/.test  ## everything that needs no GPU
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile tests

test-faults: $(VENV)/.test  ## 50 random kills of a training (5 are in `make test`); about 10 minutes
	DPO_FAST_KILLS=50 $(BIN)/python -m pytest -n $(JOBS) --dist load tests/faults/test_random_kills.py

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
	$(BIN)/python -m benchmarks head reference ema precompute

bench-quick: $(VENV)/.test  ## every suite at a small size in minutes: tables and pictures in runs/bench
	$(BIN)/python -m benchmarks --quick

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

clean:
	rm -rf $(VENV) build runs *.egg-info dpo_fast/_C.*
