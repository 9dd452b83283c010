PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes of one thread each: the tensors of the tests are too small for threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
# The oldest snnTorch that pyproject.toml allows, and the tests of what touches snnTorch.
OLDEST := $(shell sed -n 's/.*"snntorch>=\([0-9.]*\)".*/\1/p' pyproject.toml)
OLDEST_DIR := $(abspath $(VENV))/snntorch-$(OLDEST)
TOUCH_SNNTORCH := $(patsubst %,tests/test_%.py,neurons convert sampled_spikes attach first_call counterfactual vanilla approximate \
	every_estimator fused rollout state loops)

.PHONY: demo test test-newest test-oldest tutorials lint types docs compatibility wheel wheel-check check
demo: $(VENV)/installed
	$(BIN)/snntorch-lr reproduce --dataset digits --out runs/digits --resume

test: $(VENV)/installed
	$(PYTEST)

test-newest: $(VENV)/installed
	$(PYTEST) $(TOUCH_SNNTORCH)

test-oldest: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(OLDEST_DIR) snntorch==$(OLDEST)
	PYTHONPATH=$(OLDEST_DIR) $(BIN)/python -c \
		"import snntorch as s; assert s.__version__ == '$(OLDEST)', f'{s.__file__} is {s.__version__}'"
	PYTHONPATH=$(OLDEST_DIR) $(PYTEST) $(TOUCH_SNNTORCH)

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
	rm -rf dist
	$(BIN)/python -m build

wheel-check: wheel
	$(BIN)/python .ci/wheel_check.py

check: lint types test test-oldest docs wheel-check

# The stamp is written last, so that an interrupted installation is started again. __init__.py has the version.
$(VENV)/installed: pyproject.toml snntorch_lr/__init__.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[fast,attacks,experiments,events,docs,dev]"
	touch $@
