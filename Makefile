PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help finetune finetune-text federated test check format docs bench bench-field clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# An extra is installed once, and again when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

finetune: $(VENV)/.installed-benchmarks ## pre-train on digits 0-4, fine-tune on 5-9 by every method, draw, save
	$(BIN)/python -m benchmarks.finetune $(ARGS)

finetune-text: $(VENV)/.installed-finetuning ## make a small decoder and fine-tune it on texts that come with Python
	$(BIN)/python examples/finetune_text.py $(ARGS)

federated: $(VENV)/.installed-federated ## one server and three nodes on Flower, on this machine
	PYTHONPATH=examples/federated $(BIN)/python -m fedrac $(ARGS)

test: $(VENV)/.installed-tests ## the test suite
	$(BIN)/python -m pytest -n 2 $(ARGS)

check: $(VENV)/.installed-dev ## format, lint, types and spelling, as they are
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell

format: $(VENV)/.installed-dev ## format, and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed-docs ## the site with its guides run, into docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html $(ARGS)

bench: $(VENV)/.installed-benchmarks ## rates against their bounds, then step time, memory and trace time
	$(BIN)/python -m benchmarks.rates.counterexample
	$(BIN)/python -m benchmarks.rates.linear_regression
	$(BIN)/python -m benchmarks.rates
	$(BIN)/python -m benchmarks.rates.ntk
	$(BIN)/python -m benchmarks.speed.step_time
	$(BIN)/python -m benchmarks.speed.laws
	$(BIN)/python -m benchmarks.speed.sides
	$(BIN)/python -m benchmarks.speed.memory
	$(BIN)/python -m benchmarks.speed.growth
	$(BIN)/python -m benchmarks.speed.trace_time
	$(BIN)/python -m benchmarks.speed.inner_loop

bench-field: $(VENV)/.installed-benchmarks ## all methods on seven tasks: ARGS="--data-dir DIR", --quick for a look
	$(BIN)/python -m benchmarks.field $(ARGS)

clean: ## remove .venv and what was built
	rm -rf $(VENV) out dist build docs/_build
