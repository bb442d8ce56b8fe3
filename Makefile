# make demo       see USMoE at work on real text
# make test       all tests             make test-fast  without the slow ones
# make check      format, lint, types, tests: what a change must pass
# make test-portable  what bits could decide, as on other processors

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# As on other processors: a setting is a line. AMX (ONEDNN_MAX_CPU_ISA=AVX512_CORE_AMX) is no setting, since it cannot be
# switched on: it is what "make test" uses where the processor has it.
AVX2 := ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2
SSE4 := ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41
SUMS := PYTEST_ADDOPTS=--sums=by-shape
PORTABLE := AVX2 SSE4 SUMS

.PHONY: demo test test-fast test-portable $(PORTABLE) check clean

demo: $(VENV)/installed-demo
	$(BIN)/usmoe demo --output usmoe-demo.png --force

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

test-fast: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "not slow"

test-portable: $(PORTABLE)

$(PORTABLE): $(VENV)/installed-dev
	env $($@) $(BIN)/python -m pytest -q -m portable

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest
	$(MAKE) test-portable

# torch first and by itself: left to a resolver, a plain "torch" brings gigabytes of CUDA packages
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	touch $@

$(VENV)/installed-demo: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[hf,viz]' -c constraints.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@ $(VENV)/installed-demo

clean:
	rm -rf $(VENV)
