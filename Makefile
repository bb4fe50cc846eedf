# Each target makes what it needs: a fresh machine with Python 3.11+ is enough.
PYTHON ?= python3
BIN := .venv/bin
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1

.PHONY: venv simulate test browser clean

venv: .venv/.installed

# torch first and by its exact version: a range would fetch a newer build with gigabytes of CUDA libraries.
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "torch==2.13.0"
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

simulate: venv
	$(BIN)/fedcmr-simulate

test: venv browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

# The report is opened in a real browser, printed, and the print read.
browser:
	@command -v chromium >/dev/null && command -v pdftotext >/dev/null || \
	{ apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium poppler-utils >/dev/null; }

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache dist build
