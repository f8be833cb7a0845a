# `make help` lists targets and variables. Everything runs in .venv, which is made on demand.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PHASES      ?= IPR
COUNT       ?= 5000
CONFIG      ?= demo
NAME        ?=
CHECKPOINT  ?=
REAL        ?=
OUT         ?= .
ENGINE      ?= auto
ARGS        ?=
TORCH_INDEX ?=
PYTHON      ?= python3

VENV  := .venv
READY := $(VENV)/.ready
RUN   := $(VENV)/bin

.PHONY: shards filter verify sheet test chaos gpu lint bench clean help venv

shards: $(READY)  ## make COUNT synthetic crops of PHASES: generate, score, write shards (again: continues)
	$(RUN)/builder shards --phases "$(PHASES)" --count $(COUNT) --config $(CONFIG) --out $(OUT) --engine $(ENGINE) \
	  $(if $(NAME),--name $(NAME)) $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT)) $(if $(REAL),--real $(REAL)) $(ARGS)

filter: $(READY)  ## keep what passes the gates and ARGS, e.g. ARGS="--min-ssim 0.7"
	$(RUN)/builder filter $(NAME) --out $(OUT) $(ARGS)

verify: $(READY)  ## check every shard against its manifest
	$(RUN)/builder verify $(NAME) --out $(OUT) $(ARGS)

sheet: $(READY)  ## draw a contact sheet
	$(RUN)/builder sheet $(NAME) --out $(OUT) $(ARGS)

test: $(READY)  ## run the test suite and print its coverage
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term $(ARGS)

chaos: $(READY)  ## kill the job at random moments and at every step of the commit; the shards must not differ
	$(RUN)/python -m tests.acceptance.chaos $(ARGS)

gpu: $(READY)  ## measure one GPU in ten minutes, into OUT/gpu (ARGS="--minutes 5 --parts a,b")
	$(RUN)/python -m tests.acceptance.gpu --out $(OUT)/gpu $(ARGS)

lint: $(READY)  ## ruff and mypy
	$(RUN)/ruff check builder tests
	$(RUN)/ruff format --check builder tests
	$(RUN)/mypy

bench: $(READY)  ## measure: SSIM against the plain loop, images/s of the job
	OMP_NUM_THREADS=1 $(RUN)/python -m tests.acceptance.bench $(ARGS)

clean:  ## remove the environment and caches; datasets and checkpoints stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*
	find builder tests -name __pycache__ -type d -exec rm -rf {} +

venv: $(READY)  ## make the environment, or bring it up to date

$(READY): constraints.txt setup.cfg
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; say make PYTHON=python3.11 ..."; exit 2; }
	test -x $(RUN)/pip || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[dev]'
	touch $(READY)

help:  ## this list
	@echo 'targets:'
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/  \1\t\2/p' Makefile | expand -t 12
	@echo 'variables (make TARGET VARIABLE=value):'
	@echo '  PHASES      which phases                                [$(PHASES)]'
	@echo '  COUNT       images in all                               [$(COUNT)]'
	@echo '  CONFIG      a YAML file, or the name of one in configs/ [$(CONFIG)]'
	@echo '  NAME        name of the dataset                         [<config>-<PHASES>; others: the newest]'
	@echo '  CHECKPOINT  checkpoint to draw from                     [the config says: demo]'
	@echo '  REAL        real dataset for panel and gates            [the config says: phantom]'
	@echo '  OUT         output root                                 [$(OUT)]'
	@echo '  ENGINE      who runs the units                          [$(ENGINE)]'
	@echo '  ARGS        further arguments of the command            [$(ARGS)]'
	@echo '  TORCH_INDEX extra package index for torch               [$(TORCH_INDEX)]'
	@echo '  PYTHON      python that makes the environment           [$(PYTHON)]'
