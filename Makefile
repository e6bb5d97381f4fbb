# Two commands on a fresh machine: `make demo` and `make test`; `make check` while you work. They need only Python >= 3.11 and
# the package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PARALLEL ?= --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo demo-full check test lint docs bench gpu clean

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/cammask demo --out demo

demo-full: $(STAMP)
	$(BIN)/cammask demo --full --out demo-full

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Not --quiet: mkdocs counts only the warnings that it prints.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

check: lint
	$(BIN)/python -m pytest -m "not slow and not alone" $(PARALLEL)

test: lint docs
	$(BIN)/python -m pytest -m "not alone" $(PARALLEL)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m triton tests/kernels $(PARALLEL)
	$(BIN)/python -m pytest -m alone

bench: $(STAMP)
	$(BIN)/python -m pytest bench/kernels/bench_*.py --benchmark-only --benchmark-columns=min,median,max,rounds

gpu: $(STAMP)
	$(BIN)/python -m bench gpu --out gpu-records

clean:
	rm -rf $(VENV) demo demo-full site
