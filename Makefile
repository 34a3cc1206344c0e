# Everything happens in .venv; the stamps in it say what is installed, so that nothing is installed twice.
SHELL := /bin/bash
PYTHON ?= python3
# A CPU build is enough for export, verification and the tests. Any torch the project accepts may be named here.
TORCH ?= torch==2.13.0
# Two processes: torch and ONNX Runtime keep the cores busy by themselves. A file's tests stay together.
WORKERS := -n 2 --dist loadfile
EXAMPLE := examples/mamba1-tiny
DEMO := out/mamba1-tiny

BIN := .venv/bin
RUN := $(BIN)/mamba-export
PACKAGES := mamba_export $(wildcard kernels plugins calibration)

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast gpu-test lint format bench docs clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.venv/python: # a venv that can install packages
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
	  { echo "error: $(PYTHON) is not Python 3.10 to 3.13; try: make PYTHON=python3.11 …" >&2; exit 5; }
	@$(PYTHON) -m venv .venv || \
	  { echo "error: $(PYTHON) can't make a venv; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 5; }
	@touch $@

.venv/run: .venv/python pyproject.toml setup.py # the package with all that the main job needs
	@echo "installing into .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check "$(TORCH)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable ".[export,cpu]"
	@touch $@

.venv/dev: .venv/run # and with the tools of a developer
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable ".[dev]"
	@touch $@

demo: .venv/run ## Export the checkpoint in examples/, verify it, and write text with it.
	$(RUN) onnx --ckpt $(EXAMPLE) -o $(DEMO) --target ort --force
	$(RUN) generate $(DEMO) --prompt "def read_file(path):" --echo -n 64

test: .venv/dev ## All tests that need no GPU; lint is one of them.
	$(BIN)/python -m pytest -m "not gpu" $(WORKERS) $(ARGS)

test-fast: .venv/dev ## The tests that take less than ten seconds each.
	$(BIN)/python -m pytest -m "not gpu and not slow" $(WORKERS) $(ARGS)

gpu-test: .venv/dev ## The tests that need an NVIDIA GPU.
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: .venv/dev ## ruff (lint and format) and mypy --strict.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES)

format: .venv/dev ## Let ruff format and fix what it can.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/dev ## Run the benchmarks; see benchmarks/.
	$(BIN)/python benchmarks/results.py $(ARGS)

docs: .venv/dev ## Write docs/commands.md anew from the command line's help.
	$(BIN)/python docs/make_commands.py

clean: ## Remove .venv, caches and what the demo wrote.
	rm -rf .venv out .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
