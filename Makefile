# Everything runs in .venv, made on first use. Nothing but Python 3.11+, make and a package index is needed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo demo-delta test test-slow lint docs env clean

demo: $(STAMP)  ## evaluate the embedded checkpoint: a table, and runs/demo with results and plots
	$(BIN)/rnn-longctx eval --config configs/eval/demo.yaml

demo-delta: $(STAMP)  ## what the checkpoint trained for recall finds, and what it gains from all of a text
	$(BIN)/rnn-longctx eval --config configs/eval/million.yaml

test: $(STAMP)  ## a process a core, of one thread each, which takes tests from the others once it has none
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-slow: $(VENV)/.docs
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs  ## build/docs/index.html: the pages of docs/, and a reference made from the code
	$(BIN)/sphinx-build -q -W --keep-going -E -b html -d build/doctrees docs build/docs
	@echo "open build/docs/index.html"

env: $(STAMP)

# Torch first and alone, at the version of constraints.txt.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
