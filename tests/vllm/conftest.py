"""A real vLLM for the tests marked `vllm`: started once, with what `make test-vllm` has installed and built."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fanmark.servers.vllm import VllmServer, running_vllm

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv-vllm"
MODEL = ROOT / ".vllm" / "model"
LOG = ROOT / ".vllm" / "server.log"
CONTEXT_TOKENS = 16_384

FLAGS = [
    "--served-model-name=tiny",
    "--enforce-eager",
    f"--max-model-len={CONTEXT_TOKENS}",
    "--max-num-seqs=64",
    "--block-size=32",  # finer than the CPU default of 128: more of a shared prefix is found
    "--enable-prompt-tokens-details",
    "--enable-auto-tool-choice",
    "--tool-call-parser=hermes",
    "--tool-strict-level=parameter",
    "--enable-request-id-headers",
]
# Offline: the model is a folder. One GiB of KV cache holds 524,288 tokens of it.
ENV = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


@pytest.fixture(scope="session")
def vllm_server() -> Iterator[VllmServer]:
    """The running server: url (ends in /v1), pid, log, ready_after_s, rss_bytes()."""
    if not MODEL.exists():
        pytest.fail("no vLLM model: run `make test-vllm`, which installs vLLM and builds it")
    with running_vllm(str(MODEL), venv=VENV, flags=FLAGS, env=ENV, log=LOG) as server:
        yield server


@pytest.fixture(scope="session")
def vllm_url(request: pytest.FixtureRequest) -> str:
    """http://127.0.0.1:PORT/v1, whose model is `tiny`. The variable FANMARK_VLLM_URL names a server that runs already."""
    running = os.environ.get("FANMARK_VLLM_URL")
    if running:
        return running
    server: VllmServer = request.getfixturevalue("vllm_server")
    return server.url
