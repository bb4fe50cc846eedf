# Each target makes what it needs: a fresh machine with Python 3.11+ is enough.
PYTHON ?= python3
BIN := .venv/bin
TORCH := torch==2.13.0
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1

.PHONY: venv lock sbom simulate test tools proto clean

venv: .venv/.installed

# The links under fedcmr/ are for mypy, which does not run `fedcmr/__init__.py`. torch first and by its exact version: a range would fetch a newer build with gigabytes of CUDA libraries. Its hash is
# not locked, because an index for machines without a GPU has another build of the same version than PyPI.
.venv/.installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --require-hashes --no-deps --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/pip check
	$(foreach name,client server shared simulations,ln -sfn ../$(name) fedcmr/$(name);)
	touch $@

# The lock holds what `.[dev]` needs, for every Python version and system that the project runs on, except torch and what
# torch alone needs. mpmath: an older one than the newest, for the sympy that torch brings. Resolve anew with
# `make lock UPGRADE=--upgrade`.
lock:
	[ -x $(BIN)/uv ] || $(MAKE) venv
	printf 'torch ; sys_platform == "never"\n' > .venv/lock-without.txt
	printf 'mpmath<1.4\n' > .venv/lock-constraints.txt
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes --no-annotate \
		--quiet --no-config --override .venv/lock-without.txt --constraint .venv/lock-constraints.txt $(UPGRADE) \
		$(foreach name,torch sympy networkx fsspec,--no-emit-package $(name)) \
		--custom-compile-command "make lock" --output-file requirements.lock

# The bill of materials of what is installed, CycloneDX 1.6.
sbom: venv
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --mc-type application --output-reproducible \
		--output-file sbom.cdx.json .venv
	@echo "wrote sbom.cdx.json"

simulate: venv
	$(BIN)/fedcmr-simulate

# One process more than there are cores: the tests of Flower's engine wait for much of their time.
test: venv tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python .ci/vulnerabilities.py
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

# Python code of the delivery's wire contract; `tests/server/delivery` says where it is not that of the .proto.
proto: venv
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. fedcmr/shared/delivery/delivery.proto

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache dist build sbom.cdx.json
