# make demo [DEMO=quick]   installs into .venv, then trains the toy world end to end and prints the table
# make test                installs into .venv, then runs every test
# make lint                runs ruff, and mypy where it is installed
# VENV=/some/folder puts the virtual environment elsewhere.

PYTHON ?= python3
VENV ?= .venv
DEMO ?=
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/.run
	$(BIN)/python demo.py $(if $(filter quick,$(DEMO)),--quick)

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	[ ! -x $(BIN)/mypy ] || $(BIN)/mypy

$(VENV)/.run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
