# Two commands do everything on a fresh machine with Python >= 3.11: `make run` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
TEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup run smoke params test test-slow check format speed prepare doctor campaign clean distclean

help: ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo '  ARGS="..." adds overrides: make run ARGS="method=lora seed=1"'

setup: $(VENV)/installed ## make .venv with the tested versions of everything
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "gain_cl needs Python >= 3.11, $(PYTHON) is $$($(PYTHON) -V 2>&1): make setup PYTHON=python3.11" >&2; exit 64; }
	@echo "setting up $(VENV) (about 2 GB, a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check torch==2.13.0 # first: later steps then keep this build
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

run: setup ## the main job: SmolLM2-135M, gain_ffn, eight offline domains (about 15 minutes on 2 cores)
	@$(BIN)/python -m gain_cl run $(ARGS)

smoke: setup ## the whole procedure on a tiny random model, in seconds
	@$(BIN)/python -m gain_cl run debug=smoke $(ARGS)

params: setup ## trainable parameters of every model and method
	@$(BIN)/python -m gain_cl params $(ARGS)

test: setup ## the tests (under 15 minutes on 2 cores)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(TEST_ARGS)

test-slow: setup ## the tests left out of make test: those that take long
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow $(TEST_ARGS)

check: setup ## lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup ## apply the formatter and the linter's fixes
	@$(BIN)/ruff check -q --fix . && $(BIN)/ruff format -q .

speed: setup ## tokens per second and memory of each method against a bare forward pass
	@$(BIN)/python scripts/speed.py $(ARGS)

prepare: setup ## fetch, tokenise and check the data of a run, before it starts
	@$(BIN)/python -m gain_cl prepare $(ARGS)

doctor: setup ## what this machine has, lacks, and what to do
	@$(BIN)/python -m gain_cl doctor $(ARGS)

campaign: setup ## every fault of docs/reliability.md at its full count (hours)
	@$(BIN)/python scripts/campaign.py $(ARGS)

clean: setup ## show what abandoned runs leave (ARGS=--cache: caches too), then ask
	@$(BIN)/python -m gain_cl clean $(ARGS)

distclean: ## remove the environment and what tools cached (runs/ and results/ stay)
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
