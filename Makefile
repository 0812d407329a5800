# `make demo` and `make test` do all set-up themselves. PYTHON: an interpreter >= 3.11.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-extras test-gpu test-slow test-lowest lint docs site package sbom release-check clean

demo: $(STAMP)
	$(BIN)/autoseg demo

# By file, in the order of tests/conftest.py: the longest first.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow and not gpu" -n auto --maxprocesses 4 --dist loadfile \
		--no-loadscope-reorder

# What `make test` skips where a package is missing; here a missing one is a failure.
test-extras: $(VENV)/.extras
	AUTOSEG_TEST_EXTRAS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "extra and not slow"

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -q -m "gpu"

# Some need extras, too, or build the wheel.
test-slow: $(VENV)/.extras $(VENV)/.release
	AUTOSEG_TEST_EXTRAS=1 $(BIN)/python -m pytest -q -m "slow"

# The oldest packages that pyproject.toml allows, in an environment of their own. The tools that test may be new ones. Old packages
# warn of what new Pythons deprecate, which is no fault of ours: warnings are not errors here.
test-lowest:
	test -x $(VENV)-lowest/bin/python || $(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install -qq --disable-pip-version-check -c constraints-lowest.txt -e '.[test]'
	OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest -q -W default -m "not slow and not gpu" -n auto --maxprocesses 4 \
		--dist loadfile --no-loadscope-reorder

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

# sdist and wheel in dist/: the wheel is built from the sdist, so that what the sdist lacks is seen.
package: $(VENV)/.release
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

# What a user's environment holds, as CycloneDX: the wheel in dist/ with the tested versions, and nothing that tests; made where
# there is none. The tool takes autoseg's own version from pyproject.toml alone, which has none: a copy has it.
sbom: $(VENV)/.release
	ls dist/*.whl || $(MAKE) package
	$(PYTHON) -m venv --clear $(VENV)-sbom
	$(VENV)-sbom/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt dist/*.whl
	sed "s/^dynamic = .*/version = \"$$($(BIN)/python -c 'import autoseg; print(autoseg.__version__)')\"/" pyproject.toml \
		> $(VENV)-sbom/pyproject.toml
	$(BIN)/cyclonedx-py environment --pyproject $(VENV)-sbom/pyproject.toml --output-reproducible --output-file sbom.json \
		$(VENV)-sbom/bin/python

# What has to hold before a tag is set; the script prints what people do besides.
release-check: $(VENV)/.release
	$(BIN)/python .ci/release_check.py
	$(MAKE) package
	$(BIN)/python -m pytest -q -m slow tests/test_package.py

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

$(VENV)/.release: $(STAMP)
	$(PIP) -e '.[release]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-sbom dist sbom.json autoseg_demo .mypy_cache .pytest_cache .ruff_cache
