# make demo, make test, make train-smoke, make lint, make modeling-common-tests. Python 3.11 or newer must be on the path.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TYPES := .mypy_cache/package
# Whole files per process, since the tests of a file share models; each process needs about 1 GiB.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile
# What `trust_remote_code` loads; the other files at the top are commands.
MODULES := $(filter-out train_hf.py demo.py repo_package.py,$(wildcard *.py))
TRANSFORMERS = $$($(BIN)/python -c "import transformers; print(transformers.__version__)")

.PHONY: demo test test-all train-smoke lint types modeling-common-tests clean

# Runtime dependencies only, so that the first demo starts soon.
demo: $(VENV)/.runtime-stamp
	$(BIN)/python demo.py

test: $(VENV)/.dev-stamp
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-all: $(VENV)/.dev-stamp
	$(BIN)/python -m pytest $(PARALLEL)

# About two minutes: trains head and decision on made-up calls and checks what must hold.
train-smoke: $(VENV)/.dev-stamp
	$(BIN)/python -m training.smoke

lint: $(VENV)/.dev-stamp types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The modules import each other relatively, and the folder may have any name: mypy sees them as the package that
# repo_package.py makes of them.
types: $(VENV)/.dev-stamp
	rm -rf $(TYPES) && mkdir -p $(TYPES)/smollm_diffusion
	ln -s $(addprefix $(CURDIR)/,$(MODULES)) $(TYPES)/smollm_diffusion/
	touch $(TYPES)/smollm_diffusion/__init__.py
	MYPYPATH=$(TYPES) $(BIN)/mypy -p smollm_diffusion
	MYPYPATH=tests:tests/common $(BIN)/mypy --explicit-package-bases \
		$(filter-out $(MODULES),$(wildcard *.py)) $(wildcard training eval tests)

# transformers' own tests of a model class, from the source distribution of exactly the installed version.
modeling-common-tests: $(VENV)/.dev-stamp
	$(BIN)/python tests/common/fetch_transformers_tests.py
	$(BIN)/python -m pytest tests/common -m "slow or not slow"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# A stamp is older than what it depends on when dependencies changed; pip then brings the environment up to date.
$(VENV)/.runtime-stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev-stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@ $(VENV)/.runtime-stamp

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
