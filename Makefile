# Needs Python 3.11 or newer and make. `make train` shows what rlmeta does, `make test` proves it; `make slow` has the long
# proofs, `make lowest` runs the suite on the lowest versions that pyproject.toml allows.
PYTHON ?= python3
BIN := .venv/bin
SEEDS ?= 8
STEPS ?= 100k

.PHONY: train test slow backends lowest check clean

train: .venv/.train
	$(BIN)/rlmeta train ppo CartPole-v1 --seeds $(SEEDS) --steps $(STEPS)

test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-new-skips

slow: .venv/.test backends
	$(BIN)/python -m pytest -n 2 -m slow --timeout 1800 -rA > runs/slow.txt 2>&1; code=$$?; tail -n 40 runs/slow.txt; exit $$code

# nothing but speed may depend on what plays recordings: the parts that record, without torch.jit, and in Python alone
RECORDING := tests/engine tests/agents tests/learning tests/meta tests/lifelong tests/runs
backends: .venv/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile --without-jit $(RECORDING)
	RLMETA_BACKEND=python $(BIN)/python -m pytest -n 2 --dist loadfile $(RECORDING)

lowest: .venv/.lowest
	.venv/lowest/bin/python -m pytest -n 2 --dist loadfile

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

.venv/.lowest: pyproject.toml constraints-lowest.txt .venv/.train
	$(PYTHON) -m venv .venv/lowest
	.venv/lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable ".[all,bench]" pytest pytest-xdist pytest-timeout hypothesis scipy
	touch $@
