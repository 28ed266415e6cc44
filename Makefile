# Everything runs in a virtual environment of its own; `make demo` and `make test` build it first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test bench replays observatory soak lint format docs clean

demo: $(READY)  ## the main job, on a throwaway PostgreSQL
	@$(BIN)/poolkit demo

test: $(READY)  ## all tests, on throwaway servers
	$(BIN)/python -m pytest -n auto

bench: $(READY)  ## side by side with what people use today; writes docs/benchmarks
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint requirements-dev.txt --group bench
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	  --target $(VENV)/sqlalchemy-2.0 'sqlalchemy==2.0.*'
	@$(BIN)/python -m benchmarks

replays: $(READY)  ## outages, replayed side by side; writes docs/replays
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint requirements-dev.txt --group bench
	@$(BIN)/python -m replays

observatory: $(READY)  ## faults under a real Prometheus; writes docs/telemetry
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint requirements-dev.txt --group bench
	@$(BIN)/python -m observatory

MINUTES ?= 30
soak: $(READY)  ## everything at random for MINUTES
	@$(BIN)/python -m replays.soak --minutes $(MINUTES)

lint: $(READY)  ## the linter, the formatter and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## let the formatter and the linter mend what they can
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

docs: $(READY)  ## write the generated pages anew
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) dist

$(READY): pyproject.toml requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "poolkit needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Setting up $(VENV) (once) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint requirements-dev.txt --editable ".[all]" --group dev --group recipes
	@touch $@
