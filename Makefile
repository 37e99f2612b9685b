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

.PHONY: demo test test-faults test-integrations check check-triton36 check-floors test-gpu bench bench-quick bench-gpu bench-gpu-train gpu clean

demo: $(VENV)/.runtime  ## the main job: a small model, four reference strategies, a table and a picture
	$(BIN)/dpo-fast demo --output_dir runs/demo

test: $(VENV)/.test $(VENV)/.deepspeed  ## everything that needs no GPU
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile tests

test-faults: $(VENV)/.test  ## 50 random kills of a training (5 are in `make test`)
	DPO_FAST_KILLS=50 $(BIN)/python -m pytest -n $(JOBS) --dist load tests/faults/test_random_kills.py

check: $(VENV)/.test  ## lint, format, types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

# Where only CUDA builds of torch are to be had: TORCH36=torch==2.11.0, which wants this triton itself.
TORCH36 ?= torch==2.13.0
check-triton36: $(VENV)-triton36/.ready  ## every shipped kernel compiles within its limits, under triton 3.6
	PYTHONPATH=kernels $(VENV)-triton36/bin/python -m dpo_fast_kernels.aot --target sm_90 sm_80 --jobs $(JOBS)

$(VENV)-triton36/.ready:
	$(PYTHON) -m venv $(VENV)-triton36
	$(VENV)-triton36/bin/python -m pip --disable-pip-version-check install -q $(TORCH36) triton==3.6.0 numpy
	touch $@

# The oldest of everything that pyproject.toml allows; of torch only what constraints.txt pins.
FLOORS = tests/trainer tests/reference tests/losses tests/data tests/layouts
check-floors: $(VENV)-floors/.ready  ## trainer, references, losses, data, layouts on the oldest supported packages
	$(VENV)-floors/bin/python -m pytest -n $(JOBS) --dist loadfile $(FLOORS)

$(VENV)-floors/.ready: tests/floors.txt $(SOURCES)
	$(PYTHON) -m venv $(VENV)-floors
	$(VENV)-floors/bin/python -m pip --disable-pip-version-check install -q -c tests/floors.txt -e ".[test]"
	touch $@

test-gpu:  ## correctness at real sizes; needs a CUDA device and an environment with torch; PARTS="head bits"
	$(ONGPU) -m tests.gpu $(PARTS)

test-integrations: $(TRL024)/.ready $(AXOLOTL)/.ready  ## against the frameworks that pin an older TRL
	PYTHONPATH=.:kernels TORCHDYNAMO_DISABLE=1 $(TRL024)/bin/python -m pytest tests/integrations_trl024
	PYTHONPATH=$(AXOLOTL):.:kernels $(BIN)/python -m pytest tests/integrations_axolotl

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

# Ends within 9 minutes; what a part had no time for, the targets above go on with.
gpu:  ## everything that a GPU must show, in the order of its worth
	DPO_FAST_CUDA_ARCHS=90 $(ONGPU) setup.py -q build_ext --inplace > /dev/null & \
	$(ONGPU) -m benchmarks.head_gpu --models llama-3-8b qwen3-0.6b --rows 8192 --seconds 120; wait
	-$(ONGPU) -m tests.gpu together --seconds 130
	-$(ONGPU) -m benchmarks.ema --device cuda
	$(ONGPU) -m benchmarks.train_gpu --seconds 130

bench-gpu-train:  ## whole training steps and attention on a CUDA device, against TRL; resumes likewise
	$(ONGPU) -m benchmarks.train_gpu --seconds 350
	$(ONGPU) -m benchmarks.attention --device cuda

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

$(TRL024)/.ready: tests/integrations_trl024/requirements.txt tests/integrations_trl024/no_deps.txt
	$(PYTHON) -m venv $(TRL024)
	$(TRL024)/bin/python -m pip --disable-pip-version-check install -q -r $<
	$(TRL024)/bin/python -m pip --disable-pip-version-check install -q --no-deps -r $(word 2,$^)
	touch $@

$(AXOLOTL)/.ready: tests/integrations_axolotl/no_deps.txt | $(VENV)/.test
	$(PIP) install -q --no-deps --upgrade --target $(AXOLOTL) -r $<
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-triton36 $(VENV)-floors $(TRL024) $(AXOLOTL) build runs *.egg-info dpo_fast/_C.*
