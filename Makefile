# make demo       see USMoE at work on real text
# make test       all tests             make test-fast  without the slow ones
# make check      format, lint, types, tests: what a change must pass

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-fast check clean

demo: $(VENV)/installed-demo
	$(BIN)/usmoe demo --output usmoe-demo.png --force

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

test-fast: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "not slow"

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest

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
