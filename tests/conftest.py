"""Fixtures for all tests."""

from collections.abc import Iterator

import pytest
from hypothesis import settings
from stub_process import Stub, running_stub

pytest_plugins = ["mcp_peers"]

settings.register_profile("fanmark", deadline=None)  # no test is a matter of time
settings.load_profile("fanmark")


@pytest.fixture(scope="session")
def stub() -> Iterator[Stub]:
    """A stub five times as fast as its profile that all tests share: count differences, not totals."""
    with running_stub("--time-scale", "0.2") as server:
        yield server


@pytest.fixture(scope="session")
def stub_url(stub: Stub) -> str:
    """Its address, without /v1."""
    return stub.url
