# Each target makes what it needs: a fresh machine with Python 3.11+ is enough.
PYTHON ?= python3
BIN := .venv/bin
TORCH := torch==2.13.0
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1

# One process more than there are cores: many tests wait, for Flower's engine or for processes of their own.
PROCESSES = --numprocesses $$($(PYTHON) -c 'import os; print(1 + os.cpu_count())') --maxprocesses 4

.PHONY: venv lock sbom simulate quick test check tools proto clean

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

# Everybody's tests: no root, no network, no engine, nothing that takes more than seconds.
quick: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not engine" $(PROCESSES) --dist loadfile --no-loadscope-reorder

# All tests. Root has installed what the tests need, so that none may be skipped for want of it; others are told at the
# end what was skipped.
test: check tools
	$(BIN)/python .ci/vulnerabilities.py
	[ $$(id -u) != 0 ] || export FEDCMR_REQUIRE_TOOLS=1; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PROCESSES) --dist loadfile --no-loadscope-reorder

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The programs of tests/tools.py that are missing, by Debian's packages, which only root can install. Debian would start
# nginx as a service; policy-rc.d says no for the time of the installation.
tools:
	@missing=$$($(PYTHON) tests/tools.py) || exit; \
	if [ -z "$$missing" ]; then exit; fi; \
	if [ $$(id -u) != 0 ]; then echo "not installed, for want of root: $$missing; the tests that need them are skipped"; exit; fi; \
	{ \
		[ -e /usr/sbin/policy-rc.d ] || { trap 'rm -f /usr/sbin/policy-rc.d' EXIT; \
			printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d && chmod +x /usr/sbin/policy-rc.d; }; \
		apt-get update -qq && apt-get install -qq -y --no-install-recommends $$missing >/dev/null; }

# Python code of the delivery's wire contract; `tests/server/delivery` says where it is not that of the .proto.
proto: venv
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. fedcmr/shared/delivery/delivery.proto

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache dist build sbom.cdx.json
