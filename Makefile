PYTHON ?= python3
VENV ?= .venv
PINS ?=
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/installed  ## install into .venv and run examples/quickstart.py
	$(BIN)/python examples/quickstart.py

test: $(VENV)/installed-test  ## the whole CPU test suite, on every core
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/installed-lint  ## lint, format check, type check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed  # mypy resolves ao_act24.passes and ao_act24.kernels only where they are installed as such
	$(BIN)/pip install -q --no-deps --target build/typed .
	MYPYPATH=build/typed $(BIN)/mypy -p ao_act24

clean:
	rm -rf $(VENV) build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml
	$(BIN)/pip install -q -e '.[plot]' $(PINS)
	touch $@

$(VENV)/installed-%: $(VENV)/installed
	$(BIN)/pip install -q -e '.[plot,$*]' $(PINS)
	touch $@
