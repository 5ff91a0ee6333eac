# Two commands: `make run` sets up and serves, `make test` sets up and tests. Both reuse .venv; nothing is installed twice.
# `make run ARGS="--port 8001 --device cpu"`: as `acestep serve`.
PYTHON ?= python3
CONFIG ?= serve_config.yaml
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

# All tests: a worker more than there are cores, since those with a server mostly wait. A part of them, named in PYTEST_ARGS, runs in one process.
WORKERS := $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n + 1 : 9)))
IN_PARALLEL := --numprocesses=$(WORKERS) --durations=15 --dist=loadscope --no-loadscope-reorder

# Python writes down the bytecode of what it imports, and of no more: compiling all that is installed takes longer than the first start.
unexport PYTHONDONTWRITEBYTECODE

# No usage report. Set it yourself to choose otherwise.
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: run test lint constraints clean
.DEFAULT_GOAL := run

run: $(VENV)/.run-installed
	@exec $(BIN)/acestep serve $(CONFIG) $(ARGS)

test: $(VENV)/.test-installed
	$(BIN)/python -m pytest $(if $(PYTEST_ARGS),$(PYTEST_ARGS),$(IN_PARALLEL))

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@if command -v npx >/dev/null; then npx --yes --package typescript@5.9.3 tsc --project deployments/ingress/studio; \
	else echo "no npx here: the types of the page's scripts are not checked"; fi

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run-installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV) (once; a few minutes) ..."
	$(PIP) --editable .
	@touch $@

$(VENV)/.test-installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV) with the test tools (once; a few minutes) ..."
	$(PIP) --editable '.[dev,s3]'
	@touch $(VENV)/.run-installed $@

constraints: # renews the pins from what .venv holds now
	@(echo "# Pinned versions of everything that \`make run\`, \`make test\` and the image install. Renew with \`make constraints\`."; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//') > constraints.txt

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
