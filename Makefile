# make setup   .venv with everything for development      make demo   caption a generated scene (offline, no torch)
# make test    lint, then all tests                       make bench  the benchmarks behind the README's figures
# make soak    kills, bad scenes and load, 15 minutes    make fuzz   mutated inputs, MINUTES=60
# make bench-gpu   checks, then pairs against torch, on a machine with an NVIDIA GPU
# make builtin-model EUROSAT=eurosat_rgb.zip   train, measure and pack the captioner that ships with rsedge
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_VENV := .venv-demo
EUROSAT ?= ../shared/data/eurosat/eurosat_rgb.zip
SCENES ?= ../shared/data/scenes
MINUTES ?= 60
# Python 3.10: make setup CONSTRAINTS=
CONSTRAINTS ?= -c constraints.txt
PIP_INSTALL := pip install --quiet --disable-pip-version-check $(CONSTRAINTS)

.PHONY: setup demo test lint format bench bench-gpu soak fuzz docs builtin-model clean

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

# Threads that wait do not spin: on a busy machine small models would spend minutes waiting for each other.
test: lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/python tools/cli_reference.py
	$(BIN)/python tools/architecture.py
	$(BIN)/python tools/layout.py
	$(BIN)/python tools/readme_figures.py
	$(BIN)/python tools/results.py
	$(BIN)/python tools/performance.py

# About an hour on two cores; goes on where it was interrupted.
builtin-model: setup
	$(BIN)/python -m tools.builtin_model --eurosat $(EUROSAT) $(if $(wildcard $(SCENES)),--scenes $(SCENES))

bench: setup
	$(BIN)/python bench/caption_cpu.py
	$(BIN)/python bench/profile_cpu.py
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/pipeline.py
	$(BIN)/python bench/pipeline.py --whole
	$(BIN)/python bench/read.py

bench-gpu: setup
	$(BIN)/python bench/gpu.py

soak: setup
	OMP_WAIT_POLICY=passive $(BIN)/python tools/soak.py

fuzz: setup
	$(BIN)/python -W ignore tools/fuzz.py --minutes $(MINUTES)

clean:
	rm -rf $(VENV) $(DEMO_VENV) demo-out build *.egg-info
