# The one entry. Needs python3 (>= 3.10) and nothing else; every target but `gpu` makes .venv when it
# is missing.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := tiue tiue_kernels tests benchmarks setup.py
PROMPTS := "red apple" "rocket" "cat face" "sun" "birthday cake" \
           "evergreen tree" "house" "pizza" "red heart" "octopus"

# What a CPU times too; the operators' own benchmarks are part of `gpu`.
BENCHES := benchmarks/bench_one_pass.py

.PHONY: demo test lint bench gpu clean

demo: $(VENV)/.installed-base
	$(BIN)/tiue generate $(PROMPTS) --seed 0 --output out

# One thread a worker: two workers of one thread beat one worker of two on the suite's small shapes.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8

lint: $(VENV)/.installed-test
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/clang-format --dry-run --Werror csrc/*.* csrc/*/*.*
	$(BIN)/mypy

# A result replaces the last one only when its whole file has run and passed.
bench: $(VENV)/.installed-test
	@set -e; mkdir -p out; results=benchmarks/results/$$($(BIN)/python -m benchmarks.machine); \
	mkdir -p "$$results"; \
	for file in $(BENCHES); do \
	    json=$$(basename "$$file" .py).json; \
	    $(BIN)/python -m pytest "$$file" --timeout=0 --benchmark-json="out/$$json"; \
	    mv "out/$$json" "$$results/$$json"; \
	done
	$(BIN)/python -m benchmarks.report

# Installs nothing and needs no network: .venv where it is, else $(PYTHON) with the torch that it has.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu \
	    $(if $(OUTPUT),--output $(OUTPUT))

# The stamp is newer than what it was installed from, so a second run installs nothing.
$(VENV)/.installed-%: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	    "TiUE needs Python 3.10 or newer: make PYTHON=/path/to/python3.x")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --constraint constraints.txt --editable "$(if $(filter base,$*),.,.[$*])"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
