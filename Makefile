# Everything from a fresh clone: each target sets up what it needs.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: run test lint test-vllm test-mcp test-ray test-frameworks compose-smoke constraints

run: .venv/ready
	$(BIN)/fanmark run

# Tests that open a browser or ask a Prometheus are skipped where there is none (Debian: apt-get install chromium prometheus).
test: .venv/dev
	$(BIN)/pytest -n 4 --dist loadfile -m 'not vllm and not mcp and not ray and not frameworks and not quiet'
	$(BIN)/pytest -m quiet

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A real vLLM on the CPU, in a virtual environment of its own (Python 3.11), with a tiny model of random weights; both are kept.
test-vllm: .venv/dev
	$(PYTHON) tests/vllm/setup_vllm.py
	$(BIN)/pytest -m vllm tests/vllm

# Eight MCP servers that others wrote, installed by npm and pip into a folder of their own, which is kept. Needs node 20.
test-mcp: .venv/dev
	$(PYTHON) tests/mcp/setup_mcp.py
	$(BIN)/pytest -m mcp tests/mcp

# A Ray cluster of two nodes on this machine, with Ray in a virtual environment of its own, which is kept.
test-ray: .venv/dev
	$(PYTHON) tests/cluster/setup_ray.py
	$(BIN)/pytest -m ray tests/cluster

# Agent frameworks through the tap, each installed by pip into a folder of its own outside the checkout, which is kept.
test-frameworks: .venv/dev
	$(PYTHON) tests/frameworks/setup_frameworks.py
	$(BIN)/pytest -m frameworks -rA --capture=no tests/frameworks

# The services of compose/ from locally built images, with a short run through them. Needs podman, runc and prometheus.
compose-smoke: .venv/dev
	$(BIN)/python compose/smoke.py

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) .
	touch $@

.venv/dev: .venv/ready
	$(PIP) '.[dev]'
	touch $@

# After a change of the dependencies: pins what is installed.
constraints: .venv/dev
	$(BIN)/pip freeze --exclude-editable > constraints.txt
