# Every target does its own set-up: Python 3.11 to 3.13 and make are all that is needed.

VENV ?= .venv
# The first interpreter that runs and is of a supported version.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& { echo $$p; break; }; done)
RUN = $(VENV)/bin/python
DEMO = runs/demo

.PHONY: venv demo test test-all test-slow lint static-costs

venv: $(VENV)/.installed

# The versions that the tests passed with; CONSTRAINTS= installs the newest ones instead.
CONSTRAINTS ?= constraints/$(shell $(PYTHON) -c 'import sys; \
	print("py311" if sys.version_info < (3, 12) else "py312")' 2>/dev/null).txt

$(VENV)/.installed: pyproject.toml requirements.txt $(wildcard constraints/*.txt)
	@test -n "$(PYTHON)" || { echo "no Python 3.11 to 3.13 found: install one, or set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable ".[dev,tokenizer,eval]" \
		$(addprefix --constraint ,$(CONSTRAINTS))
	touch $@

# Trains the small model through all stages, then draws its passkey heat map. Memory in huge pages
# makes training steps 1.4 times as fast under Linux (docs/training.md); elsewhere nothing reads this.
demo: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
demo: venv
	$(RUN) train.py --config configs/tiny_cpu.py --workdir $(DEMO)
	$(RUN) eval.py passkey --checkpoint $(DEMO) --output $(DEMO)/eval --compare-without-attention \
		--lengths 512,1024,2048,4096,8192,16384 --depths 10 --trials 3

# The quick tests: every room, every op, every command.
test: venv
	$(RUN) -m pytest -n 2 --dist loadfile

# Everything but what takes minutes or needs a storage server.
test-all: venv
	$(RUN) -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: venv
	$(RUN) -m pytest -n 2 --dist loadfile -m slow

lint: venv
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

static-costs: venv
	$(RUN) -m rwkvx_jax.perf.static_costs
