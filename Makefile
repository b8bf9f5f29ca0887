# Every command of the project. All paths are relative, so the checkout may lie on a path with spaces.
#
#   PYTHON=python3.12                                     the interpreter that .venv is made with (3.11 or newer)
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu      where torch comes from; unset: the way pip is configured
#   ARGS="-k shards -x"                                   passed on to pytest, the demo or the benchmarks

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install check format test demo demo-full bench docs clean

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=

# the tests need all of them
EXTRAS := dev,index,mteb,onnx,dashboard,tensorboard,docs
PIP := .venv/bin/python -m pip install --disable-pip-version-check
# deepspeed, quintet and ninja are looked up on PATH
RUN := PATH="$$PWD/.venv/bin:$$PATH"

define NEEDS
if ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	echo "quintet needs Python 3.11 or newer; '$(PYTHON)' is older or does not start; name another: make PYTHON=python3.12" >&2; exit 2; \
elif ! "$(PYTHON)" -c 'import ensurepip' 2>/dev/null; then \
	echo "quintet needs Python's venv module; on Debian and Ubuntu: sudo apt-get install -y python3-venv" >&2; exit 2; \
fi
endef

help:  ## show this list
	@echo "make TARGET [PYTHON=python3] [TORCH_INDEX=URL] [ARGS=...]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' Makefile

install: .venv/installed  ## make .venv with the tested versions

check: install  ## lint, format and types
	@.venv/bin/python -m ruff check .
	@.venv/bin/python -m ruff format --check .
	@.venv/bin/python -m mypy

format: install  ## put the sources in the common format
	@.venv/bin/python -m ruff check --fix .
	@.venv/bin/python -m ruff format .

test: install  ## run the tests
	@$(RUN) bash tests/run.sh $(ARGS)

demo: install  ## collect, pack, pretrain, evaluate, export and search, on real text
	@$(RUN) bash demo.sh $(ARGS)

demo-full: install  ## the whole recipe on real text: filter, mine, teacher, distill, finetune; a table after each
	@$(RUN) bash demo-full.sh

bench: install  ## measure against the named peers
	@$(RUN) .venv/bin/python -m benchmarks $(ARGS)

docs: install  ## build the documentation as a site, into site/
	@$(RUN) NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
	@echo "site/index.html"

clean:  ## remove what the other targets made, but not your runs
	@rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build site demo demo-full quickstart *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first: DeepSpeed's set-up imports it. Nothing is compiled, here or later (docs/decisions.md).
.venv/installed: setup.cfg pyproject.toml constraints.txt
	@$(NEEDS)
	@test -x .venv/bin/python || "$(PYTHON)" -m venv .venv
	@$(PIP) --constraint constraints.txt --upgrade pip setuptools wheel ninja
	@$(PIP) $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)",--constraint constraints.txt) "$$(grep '^torch==' constraints.txt)"
	@DS_BUILD_OPS=0 $(PIP) --constraint constraints.txt --no-build-isolation deepspeed
	@$(PIP) --constraint constraints.txt --config-settings editable_mode=compat --editable '.[$(EXTRAS)]'
# DeepSpeed's script names its interpreter in a way that breaks on a path with a space.
	@case "$$PWD" in *" "*) printf '#!/bin/sh\nexec "%s" -m deepspeed.launcher.runner "$$@"\n' \
		"$$PWD/.venv/bin/python" >.venv/bin/deepspeed;; esac
	@touch $@
