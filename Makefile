# Two commands do everything, set-up included: make demo, make test.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
WORKERS ?= 2
# Which tests make test runs; long trainings are left to make test-all.
MARKS ?= not slow
# A second supported interpreter, for make test-all: python3.12, wherever it is.
PYTHON312 ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3) python3.12)

export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export MPLBACKEND = agg
DATA ?= $(NUMPYRO_MAF_DATA)

.PHONY: demo test test-brief test-all lint types package docs notebooks benchmark fits clean

demo: $(VENV)/ready
	$(BIN)/python -m numpyro_maf.examples.smart_home --out out/smart_home

test: $(VENV)/ready
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --durations=15 -m "$(MARKS)" $(TESTS)

# One member of each kind, and what touches versions, on a second supported interpreter.
test-brief:
	$(MAKE) test VENV=.venv312 PYTHON=$(PYTHON312) TESTS=--brief

test-all:
	$(MAKE) test MARKS=
	$(MAKE) test-brief

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

types: $(VENV)/ready
	bash tests/typing/check.sh $(BIN)/python

# Wheel and sdist, checked, and the wheel in an empty environment: PYTHONS="python3.12 python3.13" for more.
package: $(VENV)/ready
	bash tests/package/check.sh $(BIN)/python $(PYTHONS)

docs: export JAX_DISABLE_MOST_OPTIMIZATIONS = 1
docs: $(VENV)/ready
	$(BIN)/python -m pytest -q -n $(WORKERS) docs
	$(BIN)/sphinx-build -W -q -b html docs build/docs
	$(BIN)/python docs/check.py build/docs

notebooks: $(VENV)/ready
	$(BIN)/python notebooks/run.py --jobs $(WORKERS)

benchmark: $(VENV)/bench
	$(BIN)/python benchmarks/speed.py

# Fit, rather than speed; most need DATA=folder of real data. Hours on a laptop, all in all.
fits: $(VENV)/bench
	$(BIN)/python benchmarks/mnist.py --data $(DATA)
	$(BIN)/python benchmarks/density.py --data $(DATA)
	$(BIN)/python benchmarks/two_moons.py
	$(BIN)/python benchmarks/digits.py
	$(BIN)/python benchmarks/posteriors.py $(DATA)/posteriordb
	$(BIN)/python benchmarks/sbibm.py $(DATA)/sbibm --methods npe nle nre truncated snle
	$(BIN)/python benchmarks/sbibm.py $(DATA)/sbibm --speed --tasks two_moons slcp
	$(BIN)/python benchmarks/sbi_memory.py

$(VENV)/bench: $(VENV)/ready
	$(BIN)/python -m pip install -q -e ".[bench]"
	touch $@

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e ".[dev]"
	touch $@

clean:
	rm -rf .venv .venv312 .cache build out
