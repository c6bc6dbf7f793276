# `make help` lists the targets. Set-up is a dependency of everything, so a fresh clone needs no other step.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup run test test-fast lint types format wheel nusax toy-table clean

help:  ## list the targets
	@grep -hE '^[a-z][a-z-]*:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP)  ## make .venv and install flare_exp with the exact versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' || \
		{ echo "flare_exp needs Python 3.10 to 3.13; choose one with: make setup PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

run: setup  ## first look: FLARE on the embedded world, ends with a result table
	$(BIN)/python -m flare_exp

test: setup  ## all tests (what needs a GPU or ../shared is skipped with its reason)
	$(BIN)/python -m pytest

test-fast: setup  ## the tests that train nothing
	$(BIN)/python -m pytest -m "not slow"

lint: setup  ## ruff: style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## mypy
	$(BIN)/mypy

format: setup  ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: setup  ## build dist/*.whl (contains conf/)
	$(BIN)/python -m build --wheel

clean:  ## remove the virtual environment and build products (keeps outputs/ and the artefact cache)
	rm -rf $(VENV) dist build *.egg-info .pytest_cache .ruff_cache .mypy_cache
