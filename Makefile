# `make demo` and `make test` set up all they need. An active virtual environment is used; otherwise
# one is made in .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := $(or $(VIRTUAL_ENV),.venv)
BIN := $(VENV)/bin
STAMP := $(VENV)/.aae-batch-installed

.DEFAULT_GOAL := help
.PHONY: help install demo browser test test-slow chaos test-gpu lint format reference bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## install the package and its tools

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@# for CLIP's vocabulary, which tests read; what it depends on (torchvision) is not wanted
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps open_clip_torch
	@touch $@

demo: install ## generate a small dataset with the embedded model, and a page to view it
	$(BIN)/aae-batch demo

browser: ## install Chromium for the page's tests, where there is none and apt-get may
	@for name in "$$AAE_BATCH_CHROMIUM" chromium chromium-browser google-chrome google-chrome-stable; do \
	  command -v "$$name" >/dev/null && exit 0; \
	done; \
	if test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
	  echo "Installing Chromium, for the page's tests"; \
	  apt-get update >/dev/null 2>&1; \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium \
	    >/dev/null 2>&1 && exit 0; \
	fi; \
	echo "There is no Chromium: the page's tests will be skipped"

test: install browser ## everything but the slow tests and those that need a GPU
	@# three, since they wait for Ray half of their time
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

test-slow: install ## the slow tests
	$(BIN)/python -m pytest -m slow

chaos: install ## kill 1,000 processes, with store faults (AAE_BATCH_KILLS, _SEED, _ENGINE=fake|real)
	$(BIN)/python -m pytest -m chaos -s tests/chaos

test-gpu: install ## the tests that need an accelerator
	$(BIN)/python -m pytest -m gpu

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## let ruff fix and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference: install ## write docs/reference.md: every option and column, from the code
	$(BIN)/python -m docs.reference

bench: install ## this engine against diffusers' pipeline: FLOPs, then wall clock
	$(BIN)/python -m benchmarks.flops
	$(BIN)/python -m benchmarks.versus_diffusers

clean: ## remove the environment and the demo's output
	rm -rf .venv demo-output
