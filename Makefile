# Two entrances: `make quickstart` and `make test` (with SLOW=1 also the slow tests).
PYTHON ?= python3
BIN := .venv/bin
# Spinning OpenMP threads are many times slower on a shared machine; these are set before torch starts.
export OMP_WAIT_POLICY ?= PASSIVE
ifdef SLOW
MARKS :=
else
MARKS := -m "not slow"
endif

.PHONY: quickstart test

quickstart:
	@$(PYTHON) scripts/install.py peft
	@$(BIN)/lorica quickstart

test:
	@$(PYTHON) scripts/install.py dev
ifdef SLOW
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -r tests/requirements-slow.txt
endif
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal $(MARKS)
