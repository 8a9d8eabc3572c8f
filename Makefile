# Everything from a fresh clone: each target sets up what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test lint test-vllm test-mcp constraints

run: .venv/ready
	$(BIN)/fanmark run

test: .venv/ready
	$(BIN)/pytest -n 4 --dist loadfile -m 'not vllm and not quiet'
	$(BIN)/pytest -m quiet

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A real vLLM on the CPU, in a virtual environment of its own (Python 3.11), with a tiny model of random weights; both are kept.
test-vllm: .venv/ready
	$(PYTHON) tests/vllm/setup_vllm.py
	$(BIN)/pytest -m vllm tests/vllm

# Eight MCP servers that others wrote, installed by npm and pip into a folder of their own, which is kept. Needs node 20.
test-mcp: .venv/ready
	$(PYTHON) tests/mcp/setup_mcp.py
	$(BIN)/pytest -m mcp tests/mcp

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# After a change of the dependencies: pins what is installed.
constraints: .venv/ready
	$(BIN)/pip freeze --exclude-editable > constraints.txt
