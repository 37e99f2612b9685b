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
# Old peers get environments of their own; the second is a folder in front of .venv's packages.
TRL024 := .venv-trl024
AXOLOTL := .venv-axolotl

.PHONY: demo test check test-gpu test-integrations bench bench-gpu clean

demo: $(VENV)/.runtime  ## the main job: a small model, four reference strategies, a table and a picture
	$(BIN)/dpo-fast demo --output_dir runs/demo

test: $(VENV)/.test  ## everything that needs no GPU
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile tests

check: $(VENV)/.test  ## lint, format, types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

test-gpu:  ## correctness at real sizes; needs a CUDA device and an environment with torch; PARTS="head bits"
	$(ONGPU) -m tests.gpu $(PARTS)

test-integrations: $(TRL024)/.ready $(AXOLOTL)/.ready  ## against the frameworks that pin an older TRL
	PYTHONPATH=.:kernels TORCHDYNAMO_DISABLE=1 $(TRL024)/bin/python -m pytest tests/integrations_trl024
	PYTHONPATH=$(AXOLOTL):.:kernels $(BIN)/python -m pytest tests/integrations_axolotl

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

$(TRL024)/.ready: tests/integrations_trl024/requirements.txt tests/integrations_trl024/no_deps.txt
	$(PYTHON) -m venv $(TRL024)
	$(TRL024)/bin/python -m pip --disable-pip-version-check install -q -r $<
	$(TRL024)/bin/python -m pip --disable-pip-version-check install -q --no-deps -r $(word 2,$^)
	touch $@

$(AXOLOTL)/.ready: tests/integrations_axolotl/no_deps.txt | $(VENV)/.test
	$(PIP) install -q --no-deps --upgrade --target $(AXOLOTL) -r $<
	touch $@

clean:
	rm -rf $(VENV) $(TRL024) $(AXOLOTL) build runs *.egg-info dpo_fast/_C.*
