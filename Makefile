# Each target sets up what it needs in .venv and is quick when that is already there.
#   make demo   harden, attack, measure and report on the embedded model organism
#   make real   the same on a real chat model with real prompts; an hour or two on two cores
#   make test   the whole test suite
#   make lint   style and types
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo real test lint clean

VENV ?= .venv
OUT ?= runs/demo
BIN := $(VENV)/bin
DEMO := $(VENV)/.installed-demo
REAL := $(VENV)/.installed-real
DEV := $(VENV)/.installed-dev

# Rows of `make real`: public sets of the Hub, or files of your own.
#   make real REFUSALS=mine/refusals.jsonl HELPFUL=mine/helpful.jsonl LOOKALIKES='a.jsonl b.jsonl' TASKS='maths=m.jsonl'
REFUSALS ?= data/beavertails.jsonl
HELPFUL ?= data/alpaca.jsonl
LOOKALIKES ?= data/orbench.jsonl data/xstest.jsonl
TASKS ?=

# Compiling every file of every package takes longer than installing them. Python compiles what is really imported,
# once, as long as it may write what it compiled.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip install -qq --no-compile -c constraints.txt

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

help:
	@sed -n 's/^#   //p' $(firstword $(MAKEFILE_LIST))

demo: $(DEMO)
	$(BIN)/casehard demo --out $(OUT)

# Each command goes on where an earlier one was interrupted.
real: $(REAL) models/smollm2/manifest.json data/real/manifest.json
	$(BIN)/casehard bench plans/real.yaml --out runs/real

models/smollm2/manifest.json: | $(REAL)
	$(BIN)/casehard model fetch smollm2 --out models/smollm2

data/real/manifest.json: | $(REAL) $(REFUSALS) $(HELPFUL) $(LOOKALIKES)
	$(BIN)/casehard data divide --out data/real $(addprefix --refusals ,$(REFUSALS)) $(addprefix --helpful ,$(HELPFUL)) \
	  $(addprefix --lookalikes ,$(LOOKALIKES)) $(addprefix --task ,$(TASKS))

data/%.jsonl: | $(REAL)
	$(BIN)/casehard data fetch $* --out $@

# One torch thread a worker, which small models use best; three workers on two cores, since many tests wait for others.
test: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@python=""; \
	for candidate in $${PYTHON:-} python3.11 python3 python3.12 python3.13; do \
	  if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "error: no Python >= 3.11 found; name one with PYTHON=/path/to/python" >&2; exit 2; fi; \
	echo "creating $(VENV) with $$($$python --version)"; \
	$$python -m venv $(VENV)

# The demo needs the report extra only, which keeps a first run short.
$(DEMO): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing casehard and what the demo needs into $(VENV): a minute or more the first time"
	@$(INSTALL) -e '.[report]'
	@touch $@

# Reading the Hub and GGUF files takes an extra each.
$(REAL): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing casehard and what a real model needs into $(VENV): a minute or more the first time"
	@$(INSTALL) -e '.[report,data,gguf]'
	@touch $(DEMO) $@

# trl, datasets, gguf and optuna come along so that the tests of those optional parts run instead of being skipped.
$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing casehard and what the tests need into $(VENV): a minute or more the first time"
	@$(INSTALL) -e '.[dev,data,trl,gguf,search]'
	@touch $(DEMO) $(REAL) $@
