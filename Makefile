# What a person or a CI run does here. Only Python (3.11 or newer) and make are assumed.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# An isolated build for what has no wheel (seqeval): an old pip would run its setup.py here, and miss what that needs.
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --use-pep517 --constraint constraints.txt
QUICKSTART_ARGS ?=
PYTEST_ARGS ?=
# One BLAS thread for each test process: two processes with two threads each spin on two cores.
TEST_ENV = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Two processes, each with whole files and these in order: what a file makes once is made once, and the long ones begin.
IN_TWO = -n 2 --dist loadfile --no-loadscope-reorder
# Kernels without vectors and, for products, of AVX2: as if the processor were ten years older.
OLD_CPU = ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2
OLD_CPU_TESTS = tests/laws tests/functional tests/students/test_inherit_architectures.py tests/trainer/test_alpha_zero.py \
	tests/trainer/test_resume.py tests/trainer/test_accumulation.py tests/trainer/test_without_logits_small_chunks.py \
	tests/trainer/test_without_logits_trials.py tests/teachers/cache/test_laws.py

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-old-cpu test-slow lint format clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

quickstart: $(VENV)/.installed-report ## install into .venv and run the quickstart, offline, on real text
	$(BIN)/hf-distill quickstart $(QUICKSTART_ARGS)

test: $(VENV)/.installed-dev ## install into .venv and run the test suite
	$(TEST_ENV) $(BIN)/python -m pytest $(IN_TWO) $(PYTEST_ARGS)

test-old-cpu: $(VENV)/.installed-dev ## run the part that rounding touches as an old processor would
	$(TEST_ENV) $(OLD_CPU) $(BIN)/python -m pytest $(IN_TWO) $(OLD_CPU_TESTS) $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-dev ## run the tests that take minutes
	$(TEST_ENV) $(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, caches and build results
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find hf_distill tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else "hf-distill needs Python 3.11 or newer; $(PYTHON) is %d.%d. Try: make PYTHON=python3.12 $(MAKECMDGOALS)" % v[:2])'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment (on Debian: apt install python3-venv)"; exit 1; }

.PRECIOUS: $(VENV)/.installed-%

# A stamp for each set of extras; a change of either file installs again.
$(VENV)/.installed-%: $(BIN)/python pyproject.toml constraints.txt
	$(PIP_INSTALL) --quiet --editable ".[$*]"
	@touch $@
