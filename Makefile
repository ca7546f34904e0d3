# make demo   pretrain a small Memory Mosaic on Python's own library, evaluate it, hear from it (at most 10 minutes on 2 cores)
# make claims   the paper's claims at the size of a laptop: trains some sixty small models (under 2 hours on 2 cores), writes docs/claims
# make test   every test
# make test-quick   the tests of the inner loop (about 2 minutes)

VENV ?= .venv
TORCH_VERSION ?= 2.13.0

# The first Python that runs and is 3.11 or 3.12.
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)

# Where torch comes from. On Linux PyPI's torch is a CUDA build of several gigabytes, so a Linux machine without an
# NVIDIA GPU takes the CPU build from PyTorch's own index; set TORCH_INDEX to another one, or to nothing for PyPI's.
ifeq ($(shell uname -s),Linux)
ifeq ($(shell command -v nvidia-smi),)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif
endif
TORCH_INDEX ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_TEST := $(VENV)/.ready-test

.PHONY: help demo claims test test-quick lint clean
help:
	@sed -n 's/^# make/make/p' Makefile

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "mm needs Python 3.11 or 3.12: install one, or name it with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and by itself: its other needs come from PyPI with everything else.
$(VENV)/.torch: $(VENV)/.python
	$(BIN)/pip install -q --no-deps "torch==$(TORCH_VERSION)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX) --retries 2)
	@touch $@

$(READY): pyproject.toml $(VENV)/.torch
	$(BIN)/pip install -q -e .
	@touch $@

$(READY_TEST): pyproject.toml $(READY)
	$(BIN)/pip install -q -e '.[test]'
	@touch $@

demo: $(READY)
	$(BIN)/mm pretrain recipes/quickstart.yaml --resume
	$(BIN)/mm eval runs/quickstart --compressors
	@echo
	$(BIN)/mm chat runs/quickstart --prompt "def read" --max-new-tokens 120 --temperature 1.0 --top-p 0.95
	@echo
	@echo "Talk to it:  $(BIN)/mm chat runs/quickstart"

claims: $(READY)
	$(BIN)/python -m mmcore.claims $(CLAIMS_ARGS)

# One process a core, at most four, of one thread each: threads of several processes would wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test: $(READY_TEST)
	$(PYTEST) $(PYTEST_ARGS)

test-quick: $(READY_TEST)
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

lint: $(READY_TEST)
	$(BIN)/python -m pip install -q ruff && $(BIN)/ruff check .

clean:
	rm -rf $(VENV) build *.egg-info
