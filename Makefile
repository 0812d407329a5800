# `make demo` and `make test` do all set-up themselves. PYTHON: an interpreter >= 3.11.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-extras test-gpu test-slow lint docs site clean

demo: $(STAMP)
	$(BIN)/autoseg demo

# By file, in the order of tests/conftest.py: the longest first.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow and not gpu" -n auto --maxprocesses 4 --dist loadfile \
		--no-loadscope-reorder

# What `make test` skips where a package is missing; here a missing one is a failure.
test-extras: $(VENV)/.extras
	AUTOSEG_TEST_EXTRAS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "extra"

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -q -m "gpu"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m "slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -c "from autoseg.config.docs import settings_manual; print(settings_manual(), end='')" > docs/settings.md
	$(BIN)/autoseg schema --output docs/input.schema.json

site: $(STAMP)
	$(PIP) -e '.[docs]'
	$(BIN)/zensical build -f mkdocs.yml --strict

# torch goes first and alone, so that its pinned version is chosen before anything else asks for one.
$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (once; some minutes)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[test]'
	touch $(STAMP)

$(VENV)/.extras: $(STAMP)
	$(PIP) -e '.[ci]'
	touch $@

clean:
	rm -rf $(VENV) autoseg_demo .mypy_cache .pytest_cache .ruff_cache
