# Each target does its own set-up. Needs Python 3.11 or later, pip, make and a C compiler; the rest is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Tests run in two processes, and in one with `make test TEST_WORKERS=1`; tests/sharing.py says what stays together.
TEST_WORKERS ?= 2
WORKERS := $(if $(filter-out 0 1,$(TEST_WORKERS)),-n $(TEST_WORKERS) --dist loadgroup)

.PHONY: help setup quickstart real test test-all test-cpus lint format schema pictures outcomes golden clean

help:
	@echo "make setup       install everything into $(VENV); every target below does so by itself"
	@echo "make quickstart  run the laptop sweep, show its law and frontier (minutes)"
	@echo "make real        fetch SmolLM2-135M once (93 MB), sweep it, show what compression costs (within half an hour on 2 cores)"
	@echo "make test        run the tests (minutes)"
	@echo "make test-all    the slow ones too: clusters, many kills, whole trainings"
	@echo "make test-cpus   those that touch a model, as if on every processor up to this one, with one thread and two (an hour or two)"
	@echo "make lint        ruff and mypy"
	@echo "make format      let ruff mend what it can"
	@echo "make schema      write sweeps/sweep.schema.json anew"
	@echo "make golden      write golden numbers of what is new, or has a new version, into tests/golden"
	@echo "make pictures    draw the README's pictures from the results of quickstart and real (needs Chromium and chromedriver)"
	@echo "make outcomes    run every method's sweep (hours), test its claims, write dashboards/outcomes anew"
	@echo "make clean       remove $(VENV) and what builds and tools left"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "isoflop needs Python 3.11 or later; '$(PYTHON)' is $$($(PYTHON) --version). Name another: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "cannot make a virtual environment: install the venv module of $(PYTHON) (Debian: apt-get install python3-venv)"; exit 1; }
	$(BIN)/pip install --quiet --upgrade pip
	@echo "installing into $(VENV): about 2 GB, a few minutes"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@# without what its own models need (torchvision, video readers …): ours need its tasks only
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps lmms-eval
	@touch $(READY)

quickstart: $(READY)
	$(BIN)/isoflop run sweeps/quickstart.yaml

real: $(READY)
	$(BIN)/isoflop fetch smollm2-135m-instruct all-minilm-l6-v2 documents
	$(BIN)/isoflop run sweeps/real-retrieval.yaml
	$(BIN)/isoflop run sweeps/real-prompts.yaml
	$(BIN)/isoflop run sweeps/real.yaml

test: $(READY)
	$(BIN)/python -m pytest -q -m "not slow" $(WORKERS) tests

test-all: $(READY)
	$(BIN)/python -m pytest -q tests

test-cpus: $(READY)
	$(BIN)/python tests/on_processors.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(READY)
	$(BIN)/python -m isoflop.sweep.schema > sweeps/sweep.schema.json

pictures: $(READY)
	$(BIN)/python -m isoflop.dashboards.pictures

outcomes: $(READY)
	$(BIN)/isoflop fetch smollm2-135m-instruct documents
	$(BIN)/python -m isoflop.dashboards.outcomes

golden: $(READY)
	$(BIN)/python -m isoflop.testing.golden --write

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
