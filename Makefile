# Every target works alone: it first makes what it needs. `make` prints the list.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The first Python that is new enough; `make quickstart PYTHON=/path/to/python` chooses another.
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
# What is handed to pip for PyTorch, before everything else: a looser requirement may fetch gigabytes of GPU libraries.
TORCH ?= $(shell grep '^torch==' constraints.txt)

VENV := .venv
BIN := $(VENV)/bin
DEMO := .cache/demo
QUICKSTART := .cache/quickstart/activations

.PHONY: help setup demo quickstart format check test test-long test-browser bench bench-peers clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.installed-dev ## make the environment in .venv, with everything that tests need

demo: $(VENV)/.installed-gguf ## fetch the quick start's model and text into .cache/demo
	@$(BIN)/python -m lm_saes.demo --cache $(DEMO)

quickstart: $(QUICKSTART)/index.json ## train a sparse autoencoder on a small language model and write a report
	$(BIN)/lm-saes train examples/quickstart.toml

$(QUICKSTART)/index.json: examples/quickstart-activations.toml | demo
	rm -rf $(QUICKSTART)
	$(BIN)/lm-saes generate $<

format: $(VENV)/.installed-dev ## sort imports, fix what can be fixed, format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

check: $(VENV)/.installed-dev ## lint, formatting, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

test: $(VENV)/.installed-dev ## all tests but the long ones and the browser's
	@$(BIN)/python -m lm_saes.demo --cache $(DEMO)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_FLAGS)

test-long: $(VENV)/.installed-dev ## the tests that take minutes each
	@$(BIN)/python -m lm_saes.demo --cache $(DEMO)
	$(BIN)/python -m pytest -m long --timeout 3600 $(PYTEST_FLAGS)

test-browser: $(VENV)/.installed-dev ## open a report in headless Chromium (needs chromium and chromedriver)
	$(BIN)/python -m pytest -m browser tests/browser $(PYTEST_FLAGS)

bench: $(VENV)/.installed-dev ## time a training step on this machine
	$(BIN)/python benchmarks/step.py $(BENCH_FLAGS)

bench-peers: $(VENV)/.installed-dev ## time it beside other tools, each installed in an environment of its own (8 GB)
	$(BIN)/python benchmarks/peers/run.py --torch '$(TORCH)' $(BENCH_FLAGS)

clean: ## remove the environment and everything that was fetched, generated or cached (not results/)
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis

# One stamp a flavour of the package: `gguf` is what the quick start needs, `dev` has all of that too.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install -qq $(TORCH)
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[$*]'
	touch $(VENV)/.installed-gguf $@

# Where Python comes without its venv module, virtualenv stands in.
$(BIN)/pip:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; install one, or name it with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: PYTHON=$(PYTHON) does not run or is older than 3.11; name another one" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV) \
		&& $(PYTHON) -m pip install -qq --target .cache/virtualenv virtualenv \
		&& PYTHONPATH=.cache/virtualenv $(PYTHON) -m virtualenv $(VENV); }
