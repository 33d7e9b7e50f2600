# Two commands do everything on a fresh machine: `make run` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: run test test-slow lint docs bench clean
.DEFAULT_GOAL := run

# torch first and by its pinned version: a range asked for first may pull a CUDA build.
$(READY): pyproject.toml constraints/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r constraints/cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/cpu.txt -e ".[dev]"
	touch $@

run: $(READY)  ## train the default GRPO task on this machine
	$(BIN)/python flows/grpo_flow.py run

test: $(READY)  ## lint, types and the tests that take minutes together
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: $(READY)  ## the tests that `make test` leaves out: more kills, more faults
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(READY)  ## regenerate docs/config.md, docs/config.schema.json and docs/data.md
	$(BIN)/python docs/generate_config.py
	$(BIN)/python docs/generate_data.py

bench: $(READY)  ## the learning claim of the README: three seeds beside a run that does not train
	$(BIN)/python benchmarks/grpo_learning.py

clean:
	rm -rf $(VENV) runs .metaflow
