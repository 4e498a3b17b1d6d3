# `make serve` and `make test` work on a fresh machine with nothing but Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help serve install test conformance check format bench clean

help: ## what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

# torch is pinned first and alone: that takes the CPU build wherever one is offered, instead of gigabytes of CUDA.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'torch==2.13.0'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable . --group dev
	$(BIN)/python -m serverlesslora_kernels.native
	@touch $@

install: $(STAMP) ## set up .venv

serve: $(STAMP) ## start the server with the embedded demo on 127.0.0.1:8000
	$(BIN)/serverlesslora serve

conformance: $(STAMP) ## foreign judges of the API, and the tally
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --group conformance
	$(BIN)/python bench/conformance.py $(CONFORMANCE)

test: $(STAMP) ## run all tests
	$(BIN)/python -m pytest -q

check: $(STAMP) ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy tests
	$(BIN)/mypy --explicit-package-bases bench/gpu bench/gpu_check.py

format: $(STAMP) ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove what make built
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
