# make setup   .venv with everything for development      make demo   caption a generated scene (offline, no torch)
# make test    lint, then all tests                       make bench  the benchmarks behind the README's figures
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_VENV := .venv-demo
PIP_INSTALL := pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: setup demo test lint format bench docs demo-model clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m $(PIP_INSTALL) -e '.[dev]'
	touch $@

$(DEMO_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/python -m $(PIP_INSTALL) -e '.[cpu]'
	touch $@

demo: $(DEMO_VENV)/.installed
	$(DEMO_VENV)/bin/rsedge demo -o demo-out

test: lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/python tools/cli_reference.py
	$(BIN)/python tools/layout.py
	$(BIN)/python tools/readme_figures.py

demo-model: setup
	$(BIN)/python tools/demo_model.py

bench: setup
	$(BIN)/python bench/caption_cpu.py
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/pipeline.py

clean:
	rm -rf $(VENV) $(DEMO_VENV) demo-out build *.egg-info
