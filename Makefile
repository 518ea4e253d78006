# make demo          set up, and continue a story with the bundled model
# make test          set up, and run every test
# make test-compat   the same on the oldest supported transformers, and with the packages of the extra [clients]
# make style         ruff
# make demo-model CORPUS=DIR    trains the bundled model anew and puts it in place: hours; goes on where it was stopped
# make experiments CORPUS=DIR   the paper's tables in miniature: hours; goes on where it was stopped
PYTHON ?= python3
BIN := .venv/bin
COMPAT := .venv-compat/bin
SOURCES := setup.cfg pyproject.toml

.PHONY: demo test test-compat style figures demo-model experiments clean

demo: .venv/.base
	$(BIN)/python demo.py

test: .venv/.full
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered

test-compat: .venv-compat/.full
	$(COMPAT)/python -m pytest

style: .venv/.full
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

figures: .venv/.full
	$(BIN)/python docs/draw_architecture.py

demo-model: .venv/.full
	$(BIN)/python -m calm.training.demo_model --corpus "$(CORPUS)" --output .

experiments: .venv/.full
	$(BIN)/python -m calm.experiments --corpus "$(CORPUS)" --document docs/experiments.md

clean:
	rm -rf .venv .venv-compat *.egg-info

.venv/.base: $(SOURCES) constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

.venv/.full: .venv/.base
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]"
	touch $@

.venv-compat/.full: $(SOURCES) constraints-compat.txt
	$(PYTHON) -m venv .venv-compat
	$(COMPAT)/python -m pip install -q -c constraints-compat.txt -e ".[test,clients]"
	touch $@
