# demo · test · test-cpus · check · docs · bench · native · sanitize. The first target that needs .venv makes it, later ones reuse it; there is no other set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-cpus check docs bench native sanitize clean

demo: $(STAMP)
	@OMP_WAIT_POLICY=passive $(BIN)/throughtime demo # waiting threads sleep: on a busy machine, several times faster

test: $(STAMP)
	$(BIN)/python -m pytest -q --numprocesses auto --dist worksteal --cov --cov-report=term:skip-covered

test-cpus: $(STAMP)
	$(BIN)/python tests/every_cpu.py $(CPUS) # an hour; make test-cpus CPUS="avx2/avx2 no-kernels" takes ten minutes

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet # site/index.html, to be read without a network

bench: $(STAMP)-bench
	$(BIN)/python -m benchmarks.speed $(BENCH) # a quarter of an hour; make bench BENCH=--quick takes a minute

# Compiles what has changed in csrc/ since the last time, and puts the module where .venv has it: the stamp is then as good as new.
native:
	@test -e $(STAMP) || $(MAKE) $(STAMP)
	@$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt cmake ninja nanobind
	@PATH="$(abspath $(BIN)):$$PATH" cmake -G Ninja -S . -B build/native -DPython_EXECUTABLE=$(abspath $(BIN)/python) --log-level=WARNING
	@PATH="$(abspath $(BIN)):$$PATH" cmake --build build/native
	@built=$$(ls build/native/_native*.so) && to=$$(echo $(VENV)/lib/python*/site-packages/throughtime/kernels) && mkdir -p $$to \
	  && cp $$built $$to/new && mv $$to/new $$to/$$(basename $$built)
	@touch $(STAMP)

# The kernels' tests on a build with GCC's AddressSanitizer and UBSan, once for each instruction set.
SANITIZED := build/sanitize
PRELOAD = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)

sanitize: $(STAMP)
	@$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt cmake nanobind
	@PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B $(SANITIZED) -DCMAKE_CXX_COMPILER=$(CXX) \
	  -DTHROUGHTIME_SANITIZE=address,undefined -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	@PATH="$(abspath $(BIN)):$$PATH" cmake --build $(SANITIZED) --parallel $$(nproc)
	@for set in $$($(BIN)/python -c 'from throughtime.kernels import native; print(*native.instruction_sets())'); do \
	  echo "$$set:" && THROUGHTIME_NATIVE=$$(ls $(abspath $(SANITIZED))/_native*.so) THROUGHTIME_INSTRUCTION_SET=$$set \
	  LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(BIN)/python -m pytest -q -p no:cacheprovider tests/kernels tests/streaming || exit 1; done

clean:
	rm -rf $(VENV) demo-run site

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/* csrc/cells/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "throughtime needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(STAMP)-bench: $(STAMP)
	@echo "installing the peers into $(VENV)"
	@$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt --editable '.[bench]'
	@touch $@
