# make demo, make test, make walkthrough, make train-smoke, make evaluate, make report, make lint, make audit,
# make modeling-common-tests.
# Python 3.11 or newer must be on the path.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TYPES := .mypy_cache/package
# Whole files per process, since the tests of a file share models; each process needs about 1 GiB.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile
# What `trust_remote_code` loads; the other files at the top are commands.
MODULES := $(filter-out app.py demo.py release.py repo_package.py serve.py train_hf.py validate_setup.py,$(wildcard *.py))
TRANSFORMERS = $$($(BIN)/python -c "import transformers; print(transformers.__version__)")

.PHONY: demo test test-all walkthrough train-smoke evaluate report lint types audit modeling-common-tests clean

# Runtime dependencies only, so that the first demo starts soon.
demo: $(VENV)/.runtime-stamp
	$(BIN)/python demo.py

test: $(VENV)/.dev-stamp
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-all: $(VENV)/.dev-stamp
	$(BIN)/python -m pytest $(PARALLEL)

# docs/walkthrough.md as it stands, in a copy of the repository: two minutes or three.
walkthrough: $(VENV)/.dev-stamp
	$(BIN)/python -m pytest tests/test_walkthrough.py

# About two minutes: trains head and decision on made-up calls and checks what must hold.
train-smoke: $(VENV)/.dev-stamp
	$(BIN)/python -m training.smoke

# Measures anew all that docs/evaluation.md shows of the shipped model, one after the other, and then makes the report;
# an hour or two on an idle core. `make evaluate LIMIT=50` takes as many requests of each set. Needs the data that
# training/README.md names. Only the comparison of training choices (eval.ablation), which trains many heads, is left out.
THREADS ?= 1
limit = --limit $(or $(LIMIT),$(1))
evaluate: $(VENV)/.evaluation-stamp
	$(BIN)/python -m training.audit overlap
	$(BIN)/python -m eval.compare $(call limit,50) --threads $(THREADS)
	$(BIN)/python -m eval.bfcl --checker-path $(VENV)/bfcl --decodings verified diffusion $(call limit,50) --threads $(THREADS)
	$(BIN)/python -m eval.held_out --sets seen unseen simple_python multiple irrelevance $(call limit,60) --threads $(THREADS)
	$(BIN)/python -m eval.bench_decoding $(call limit,100) --threads $(THREADS)
	$(BIN)/python -m eval.decision --models . $(call limit,100) --threads $(THREADS)
	$(BIN)/python -m eval.decoding_ablation $(call limit,50) --threads $(THREADS)
	$(BIN)/python -m eval.chat --threads $(THREADS)
	$(BIN)/python -m eval.latency --threads $(THREADS)
	$(BIN)/python -m eval.latency --shape smollm3-3b --threads $(THREADS) --out eval/results/latency_smollm3_3b.json
	$(BIN)/python -m eval.footprint $(call limit,24) --threads $(THREADS)
	$(BIN)/python -m eval.tool_retrieval --threads $(THREADS)
	$(BIN)/python -m eval.load_test
	$(BIN)/python -m eval.widget
	$(BIN)/python -m eval.animation
	$(BIN)/python -m eval.report

# Tables, plots and metadata of README.md and docs/evaluation.md out of eval/results.
report: $(VENV)/.dev-stamp
	$(BIN)/python -m eval.report

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
		$(filter-out $(MODULES),$(wildcard *.py)) $(wildcard training eval serving space examples tests)

# Known vulnerabilities of what is installed: a report.
audit: $(VENV)/.dev-stamp
	$(BIN)/python .ci/dependency_audit.py

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

# With the engines of others, and BFCL's checker in a folder of its own, since its package pins an old numpy.
$(VENV)/.evaluation-stamp: pyproject.toml constraints.txt eval/bfcl_checker.py | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,evaluation,rivals]"
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/bfcl \
		bfcl-eval==$$($(BIN)/python -c "from eval.bfcl_checker import TESTED_VERSION; print(TESTED_VERSION)")
	touch $@ $(VENV)/.dev-stamp $(VENV)/.runtime-stamp

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
