PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types wheel check
demo: $(VENV)/installed
	$(BIN)/snntorch-lr reproduce --dataset digits --out runs/digits

test: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

wheel: $(VENV)/installed
	$(BIN)/python -m build

check: lint types test wheel

# The stamp is written last, so that an interrupted installation is started again.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[attacks,experiments,dev]"
	touch $@
