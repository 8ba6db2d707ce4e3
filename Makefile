# Everything runs in .venv, which is made the first time it is needed: Python 3.11 or newer, pip and make will do.
#
#   make quickstart                              fine-tune the nano model, look at the report
#   make test PYTHON=/opt/python3.12/bin/python  with a Python of your choice
#   make quickstart TORCH=/wheels/torch-2.13.0+cu130-cp311-cp311-linux_x86_64.whl
#
# TORCH is what pip is asked to install first. The default takes PyPI's wheel, on Linux the CUDA build, which is
# what a machine with an NVIDIA GPU wants; for another CUDA release or a CPU-only build give a wheel, or a version
# and pip's options for another index. `make clean` before changing it.

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
TORCH ?= torch==2.13.0
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUN := $(BIN)/python -m finetune run
# A thread each (tests/conftest.py); tests that share what is costly to make stand in one file.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all lint format clean

help:  ## what there is
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' Makefile | while IFS='|' read -r target what; do \
		printf '  make %-12s %s\n' "$$target" "$$what"; done

quickstart: $(READY)  ## fine-tune the nano model on medical conversations and show the result (no GPU needed)
	$(RUN) recipes/qlora_medical.yaml model.base=baichuan2-nano output_dir=runs/quickstart \
		$(if $(findstring --resume,$(ARGS)),,--overwrite) $(ARGS)

test: $(READY)  ## unit and integration tests
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

test-all: $(READY)  ## the slow tests too, and the GPU ones where there is a GPU
	$(BIN)/python -m pytest -m 'gpu or not gpu' $(ARGS)

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## have ruff format and mend what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove .venv and what tools leave; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first: so that no other requirement decides which build of it comes.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { \
		echo "error: no Python 3.11 or newer found; name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is no Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@echo "setting up $(VENV) (once; several minutes, PyTorch is large)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	$(PIP) install --quiet --editable '.[dev]' --constraint constraints.txt
	@touch $@
