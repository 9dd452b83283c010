PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The oldest snnTorch that pyproject.toml allows, and the tests of what touches snnTorch.
OLDEST := $(shell sed -n 's/.*"snntorch>=\([0-9.]*\)".*/\1/p' pyproject.toml)
OLDEST_DIR := $(abspath $(VENV))/snntorch-$(OLDEST)
TOUCH_SNNTORCH := $(patsubst %,tests/test_%.py,neurons convert escape estimators approximate recording storing optim validate \
	memory ecosystem)

.PHONY: demo test test-oldest tutorials lint types docs compatibility wheel check
demo: $(VENV)/installed
	$(BIN)/snntorch-lr reproduce --dataset digits --out runs/digits

test: $(VENV)/installed
	$(BIN)/python -m pytest

test-oldest: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(OLDEST_DIR) snntorch==$(OLDEST)
	PYTHONPATH=$(OLDEST_DIR) $(BIN)/python -c \
		"import snntorch as s; assert s.__version__ == '$(OLDEST)', f'{s.__file__} is {s.__version__}'"
	PYTHONPATH=$(OLDEST_DIR) $(BIN)/python -m pytest $(TOUCH_SNNTORCH)

tutorials: $(VENV)/installed
	$(BIN)/python tutorials/execute.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

docs: $(VENV)/installed
	$(BIN)/mkdocs build --strict

# Tries every feature with every class of neurons, and writes the table of the documentation.
compatibility: $(VENV)/installed
	SNNTORCH_LR_REWRITE=1 $(BIN)/python -m pytest tests/test_compatibility.py

wheel: $(VENV)/installed
	$(BIN)/python -m build

check: lint types test test-oldest docs wheel

# The stamp is written last, so that an interrupted installation is started again.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[attacks,experiments,docs,dev]"
	touch $@
