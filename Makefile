# TriServe's commands; `make help` lists them.
SHELL := /bin/sh
PYTHON ?= python3
PORT ?= 8000
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup serve test test-long chaos lint

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv and install TriServe with its development tools

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "TriServe needs Python 3.11 or newer; name one with: make setup PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -c 'import ensurepip, venv' \
		|| { echo "Python's venv module is missing; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo "Installing into .venv; the first time this takes some minutes."
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

serve: $(STAMP)  ## serve the bundled demo model: make serve [PORT=8000]
	@exec $(BIN)/triserve serve --port $(PORT)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## lint, then every test that takes seconds
	OMP_NUM_THREADS=1 $(BIN)/pytest --durations=10 --durations-min=1

test-long: $(STAMP)  ## the tests that take minutes or need a GPU
	OMP_NUM_THREADS=1 $(BIN)/pytest -m long --timeout=1800 --durations=10 --durations-min=1

chaos: $(STAMP)  ## kill, stop and end every kind of process under load, and count what clients lost
	PYTHONPATH=. OMP_NUM_THREADS=1 $(BIN)/python tests/chaos.py --output perf/results/chaos.json
