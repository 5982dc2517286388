# Everything a fresh machine needs: Python >= 3.11, a C++ compiler and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test test-gpu lint format wheel clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "medfm needs Python 3.11 or newer; run: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(INSTALLED)  ## the whole job, small, on phantoms: under 6 minutes on 2 cores
	$(BIN)/medfm quickstart --out quickstart

test: $(INSTALLED)  ## every test; those that need real scans, a GPU or Slurm skip, saying so
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

test-gpu: $(INSTALLED)  ## those that need a GPU, on a machine that has one
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(INSTALLED)
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf build dist quickstart *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
