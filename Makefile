# Every target does its own set-up: Python 3.11 to 3.13 and make are all that is needed.

VENV ?= .venv
# The first interpreter that runs and is of a supported version.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& { echo $$p; break; }; done)
RUN = $(VENV)/bin/python
DEMO = runs/demo

.PHONY: venv demo test test-all test-slow lint docs static-costs

venv: $(VENV)/.installed

# The versions that the tests passed with; CONSTRAINTS= installs the newest ones instead.
CONSTRAINTS ?= constraints/$(shell $(PYTHON) -c 'import sys; \
	print("py311" if sys.version_info < (3, 12) else "py312")' 2>/dev/null).txt

INSTALL = $(RUN) -m pip install --quiet --disable-pip-version-check \
	$(addprefix --constraint ,$(CONSTRAINTS)) --editable

# What training and evaluation need.
$(VENV)/.runtime: pyproject.toml setup.py requirements.txt $(wildcard constraints/*.txt)
	@test -n "$(PYTHON)" || { echo "no Python 3.11 to 3.13 found: install one, or set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) .
	touch $@

# What tests and lint need besides.
$(VENV)/.installed: $(VENV)/.runtime
	$(INSTALL) ".[dev,tokenizer,eval]"
	touch $@

# Trains a small model through all stages, draws how often it finds one of 64 numbers with and
# without its attention, and asks it three questions. Memory in huge pages makes training steps 1.4
# times as fast under Linux (docs/training.md), and fewer compiler passes halve the compilation.
demo: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
demo: export XLA_FLAGS = --xla_backend_optimization_level=1
demo: $(VENV)/.runtime
	$(RUN) train.py --config configs/tiny_cpu.py --workdir $(DEMO)
	$(RUN) eval.py niah --checkpoint $(DEMO) --output $(DEMO)/eval --compare-without-attention \
		--tasks recall_64 --lengths 2048,8192 --depths 5 --trials 4 --answer-tokens 8
	$(RUN) -m tools.show_demo $(DEMO)

# The quick tests: every room, every op, every command.
test: venv
	$(RUN) -m pytest -n 2 --dist loadfile

# Everything but what takes minutes or needs a storage server.
test-all: venv
	$(RUN) -m pytest -n 2 --dist loadfile -m "not slow" --durations=20

test-slow: venv
	$(RUN) -m pytest -n 2 --dist loadfile -m slow

lint: venv
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# API reference from docstrings, in build/docs/. Warnings are errors; only annotations of tuples with
# names, which pdoc can't read under `from __future__ import annotations`, are let pass.
API = $(addprefix rwkvx_jax.,ops.recurrence ops.delta_rule ops.recurrences ops.wkv4 ops.block_sparse ops.selection ops.full_attention model \
	cache config checkpoint training.expand training.loop generate.engine)
docs: venv
	JAX_PLATFORMS=cpu $(RUN) -W error::UserWarning \
		-W "ignore:Error parsing type annotation:UserWarning" \
		-m pdoc --docformat google --output-directory build/docs $(API)

static-costs: venv
	$(RUN) -m rwkvx_jax.perf.static_costs
