# Two commands do everything on a fresh machine with Python >= 3.11: `make run` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
TEST_ARGS ?=
E ?= study

.DEFAULT_GOAL := help
.PHONY: help setup run smoke sweep status tables figures report paper params test test-slow check format bench prepare doctor campaign wandb-sync clean distclean

help: ## list these commands
	@grep -hE '^[a-z -]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo '  ARGS="..." adds overrides: make run ARGS="method=lora seed=1"; E=NAME is the experiment (experiments/NAME.yaml, default study)'

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

sweep: setup ## run what an experiment lacks: make sweep E=main ARGS="max_parallel=2 only=lora"
	@$(BIN)/python -m gain_cl sweep experiment=$(E) $(ARGS)

status: setup ## which runs of an experiment are done: make status E=main
	@$(BIN)/python -m gain_cl status experiment=$(E) $(ARGS)

tables figures report: setup ## of an experiment, from results/ alone: make tables E=main
	@$(BIN)/python -m gain_cl $@ experiment=$(E) $(ARGS)

paper: setup ## tables, figures and report of an experiment
	@$(BIN)/python -m gain_cl paper experiment=$(E) $(ARGS)

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

bench: setup ## speed and memory of a training step beside peers (6 minutes): make bench ARGS="device=cuda"
	@$(BIN)/python -m gain_cl bench $(ARGS)

prepare: setup ## fetch, tokenise and check the data of a run, before it starts
	@$(BIN)/python -m gain_cl prepare $(ARGS)

doctor: setup ## what this machine has, lacks, and what to do
	@$(BIN)/python -m gain_cl doctor $(ARGS)

campaign: setup ## every fault of docs/reliability.md at its full count (hours)
	@$(BIN)/python scripts/campaign.py $(ARGS)

OUT ?= runs
wandb-sync: setup ## upload runs that were recorded offline, each once (OUT=runs)
	@set --; for d in "$(OUT)"/*/wandb/offline-run-*; do \
	  if [ ! -d "$$d" ] || ls "$$d"/*.synced >/dev/null 2>&1; then continue; fi; \
	  if [ ! -e "$${d%/wandb/*}/LOCK" ]; then set -- "$$@" "$$d"; \
	  else echo "left out, for it is being written or its process was killed: $$d"; fi; done; \
	if [ $$# = 0 ]; then echo "no offline run to upload in $(OUT)"; else "$(BIN)/wandb" sync "$$@"; fi

clean: setup ## show what abandoned runs leave (ARGS=--cache: caches too; ARGS=--yes removes it)
	@$(BIN)/python -m gain_cl clean $(ARGS)

distclean: ## remove the environment and what tools cached (runs/ and results/ stay)
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
