# Needs Python 3.11 or newer and make. `make train` shows what rlmeta does, `make test` proves it.
PYTHON ?= python3
BIN := .venv/bin
SEEDS ?= 8
STEPS ?= 100k

.PHONY: train test check clean

train: .venv/.train
	$(BIN)/rlmeta train ppo CartPole-v1 --seeds $(SEEDS) --steps $(STEPS)

test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info

.venv/.train: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[plot]"
	touch $@

.venv/.test: .venv/.train
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@
