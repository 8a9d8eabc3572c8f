"""Fixtures for all tests."""

pytest_plugins = ["mcp_peers"]
