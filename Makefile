# The two commands of the README, and the checks. Everything runs in .venv, which the first command makes.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := .peers/.ready
WORKERS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart test test-slow lint bench bench-short setup clean

quickstart: $(READY)  ## raw text to a registered classifier, on the data in the repo
	$(BIN)/gristmill run configs/quickstart.yaml

test: $(READY) lint  ## set up, lint, and pass the suite
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

test-slow: $(READY)  ## whole runs: under Ray, killed and gone on with, on clusters of their own
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright --level error

bench: $(READY) $(PEERS)  ## race the rivals, and rewrite the tables of benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks.suite

bench-short: $(READY)  ## about two minutes; fails where a lead is smaller than its goal
	$(BIN)/python -m benchmarks.suite --short

setup: $(READY)

# torch first and by itself, so that the build already chosen for this machine (CPU or CUDA) stays
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $(READY)

$(PEERS): benchmarks/peers.txt $(READY)
	$(BIN)/python -m pip install -q --no-deps --upgrade --target .peers -r benchmarks/peers.txt
	@touch $@

clean:
	rm -rf runs .peers .pytest_cache .ruff_cache .import_linter_cache .hypothesis
