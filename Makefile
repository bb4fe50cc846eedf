# Each target makes what it needs: a fresh machine with Python 3.11+ is enough.
PYTHON ?= python3
BIN := .venv/bin
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1

.PHONY: venv simulate test tools proto clean

venv: .venv/.installed

# torch first and by its exact version: a range would fetch a newer build with gigabytes of CUDA libraries.
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "torch==2.13.0"
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

simulate: venv
	$(BIN)/fedcmr-simulate

# One process more than there are cores: the tests of Flower's engine wait for much of their time.
test: venv tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $$($(PYTHON) -c 'import os; print(1 + os.cpu_count())') \
		--maxprocesses 4 --dist loadfile --no-loadscope-reorder

# What the tests use beside Python, by Debian's packages: a browser opens and prints the report, pdftotext reads the print,
# dciodvfy judges the DICOM export, nginx is the gateway of a deployment, systemd-analyze judges the units. Debian would
# start nginx as a service; policy-rc.d says no for the time of the installation.
tools:
	@missing=; \
	command -v chromium >/dev/null || missing="$$missing chromium"; \
	command -v pdftotext >/dev/null || missing="$$missing poppler-utils"; \
	command -v dciodvfy >/dev/null || missing="$$missing dicom3tools"; \
	PATH="$$PATH:/usr/sbin" command -v nginx >/dev/null || missing="$$missing nginx"; \
	command -v systemd-analyze >/dev/null || missing="$$missing systemd"; \
	[ -z "$$missing" ] || { \
		[ -e /usr/sbin/policy-rc.d ] || { trap 'rm -f /usr/sbin/policy-rc.d' EXIT; \
			printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d && chmod +x /usr/sbin/policy-rc.d; }; \
		apt-get update -qq && apt-get install -qq -y --no-install-recommends $$missing >/dev/null; }

# Python code of the delivery's wire contract; `tests/delivery` says where it is not that of the .proto.
proto: venv
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. shared/delivery/delivery.proto

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache dist build
