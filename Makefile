PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# An extra is installed once, and again when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

.PHONY: finetune finetune-text federated test check format docs bench bench-field clean

finetune: $(VENV)/.installed-benchmarks
	$(BIN)/python -m benchmarks.finetune $(ARGS)

finetune-text: $(VENV)/.installed-finetuning
	$(BIN)/python examples/finetune_text.py $(ARGS)

federated: $(VENV)/.installed-federated
	PYTHONPATH=examples/federated $(BIN)/python -m fedrac $(ARGS)

test: $(VENV)/.installed-tests
	$(BIN)/python -m pytest -n 2 $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html $(ARGS)

bench: $(VENV)/.installed-benchmarks
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

# ARGS="--data-dir DIR", and --quick for a look.
bench-field: $(VENV)/.installed-benchmarks
	$(BIN)/python -m benchmarks.field $(ARGS)

clean:
	rm -rf $(VENV) out dist build docs/_build
