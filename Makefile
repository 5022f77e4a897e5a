# Everything runs in .venv, which `make install` makes; the other targets see to it themselves.
#   PYTHON=...    the Python (3.10 or newer) that makes .venv; the first that fits on PATH
#   PIP_ARGS=...  more arguments for pip, e.g. an index with CPU builds of torch
#   ARGS=...      more arguments for the program that a target runs, e.g. make test ARGS="-k teacher"; one process,
#                 as a debugger needs it: make test ARGS="-n 0"

export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1

# Three test files at a time, since most tests wait for processes that they have started; in the order of their names,
# which has the long ones first.
THREE := -n 3 --dist loadfile --no-loadscope-reorder

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
FITS := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))
CANDIDATES := python3 python python3.14 python3.13 python3.12 python3.11 python3.10
PYTHON ?= $(shell for python in $(CANDIDATES); do \
	if "$$python" -c "$(FITS)" 2>/dev/null; then command -v "$$python"; break; fi; done)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test coverage check bench bench-full methods full models docs clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*  ## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

install: $(STAMP)  ## make .venv with the package (editable) and all it needs

# pip is the mark of a complete environment: it is the last thing that venv puts there.
$(VENV)/bin/pip:
	@"$(PYTHON)" -c "$(FITS)" 2>/dev/null || { \
	  echo "PYTHON='$(PYTHON)' does not do: Python 3.10 or newer with venv and ensurepip is needed (on Debian and" >&2; \
	  echo "Ubuntu: apt install python3-venv). Install one, or name one: make install PYTHON=/path/to/python3" >&2; \
	  exit 1; }
	"$(PYTHON)" -m venv $(VENV)

# One pip command for all dependencies, so that torch and torchvision are resolved as a pair; pip leaves alone what is
# there already and fits. The import fails where the two were built for different releases.
$(STAMP): pyproject.toml | $(VENV)/bin/pip
	$(PY) -m pip install --disable-pip-version-check $(PIP_ARGS) --editable '.[dev]'
	$(PY) -c "import torch, torchvision; print('torch', torch.__version__, 'torchvision', torchvision.__version__)"
	@touch $@

demo: install  ## distil a network on handwritten digits over two processes
	$(PY) examples/demo.py $(ARGS)

test: install  ## run the tests
	$(PY) -m pytest $(THREE) $(ARGS)

# COVERAGE_FILE: a child that multiprocessing starts in another folder would leave its data there.
coverage: install  ## run the tests, child processes measured too; fails under the bound in setup.cfg
	COVERAGE_FILE=$(CURDIR)/.coverage $(PY) -m pytest $(THREE) --cov --cov-report=term-missing $(ARGS)

check: install  ## lint, format, types and import rules
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest tests/test_import_rules.py

bench: install  ## measure against the rivals
	$(PY) -m tests.benchmarks --again $(ARGS)

bench-full: install  ## the same with more problems and every rival, about two hours; goes on if stopped
	$(PY) -m tests.benchmarks --full bench-full.json $(ARGS)

methods: install  ## train every example in several ways and print the tables of docs/methods.md; goes on if stopped
	$(PY) -m tests.benchmarks.methods $(ARGS)

full: install  ## take a step of each full-size configuration on random numbers, which takes memory and minutes
	TSPIPE_FULL=1 $(PY) -m pytest -n 0 --durations=0 -rP -o faulthandler_timeout=620 tests/test_full.py $(ARGS)

models: install  ## cut known networks at P=2, 3 and 4 and print the table of docs/models.md
	$(PY) -m tests.zoo $(ARGS)

docs: install  ## run the examples in the docstrings and in the Markdown pages
	$(PY) -m pytest --doctest-modules --doctest-glob='*.md' lightning_tspipe $(wildcard README.md docs tests/test_docs.py)

clean:  ## remove builds, caches and reports, but not .venv
	rm -rf build dist *.egg-info .coverage .coverage.* htmlcov .hypothesis
	rm -rf .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
