# `make demo` and `make test` set up all they need. An active virtual environment is used; otherwise
# one is made in .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := $(or $(VIRTUAL_ENV),.venv)
BIN := $(VENV)/bin
STAMP := $(VENV)/.aae-batch-installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow chaos test-gpu lint format bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## install the package and its tools

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install ## make a small dataset with the embedded model, and look at it
	$(BIN)/aae-batch demo

test: install ## everything but the slow tests and those that need a GPU
	$(BIN)/python -m pytest

test-slow: install ## the slow tests
	$(BIN)/python -m pytest -m slow

chaos: install ## kill actors and drivers 200 times (AAE_BATCH_KILLS, AAE_BATCH_SEED)
	$(BIN)/python -m pytest -m chaos -s

test-gpu: install ## the tests that need an accelerator
	$(BIN)/python -m pytest -m gpu

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## let ruff mend and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## this engine against diffusers' pipeline: FLOPs, then wall clock
	$(BIN)/python -m benchmarks.flops
	$(BIN)/python -m benchmarks.versus_diffusers

clean: ## remove the environment and the demo's output
	rm -rf .venv demo-output
