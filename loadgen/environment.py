"""`environment` of summary.json: on what a run stood, as far as its ends tell it. Labels are the user's own words about the rest."""

import asyncio
import ipaddress
import os
import platform
import re
import socket
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import urlsplit

from fanmark.loadgen.endpoint import Endpoint
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.server_side import Readings

_PACKAGES = ("aiohttp", "mcp", "msgspec", "openai", "uvloop")  # what carries the calls


def labels_of(given: Sequence[str]) -> dict[str, str]:
    """`--label KEY=VALUE`, as often as wanted. Raises ScenarioError."""
    labels: dict[str, str] = {}
    for label in given:
        key, sign, value = label.partition("=")
        if not sign or not re.fullmatch(r"[A-Za-z_]\w*", key, re.ASCII):
            raise ScenarioError(
                f"--label {label}: must be KEY=VALUE, with a KEY of letters, digits and _, such as gpu=h100"
            )
        if key in labels:
            raise ScenarioError(f"--label {label}: {key} is given twice")
        labels[key] = value
    return labels


def client_host() -> dict[str, Any]:
    """The machine and the software that the calls come from."""
    packages: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "cpus": os.cpu_count(),
        "cpus_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "machine": platform.machine(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": packages,
    }


def environment(
    labels: Mapping[str, str],
    client: Mapping[str, Any] | None,
    endpoints: Mapping[str, Endpoint],
    readings: Readings,
    same_host: Mapping[str, bool | None],
) -> dict[str, Any]:
    """The whole part; `client` None: virtual time has none. `metrics` is whose counters speak; settings that the server names None are left
    out of `cache`."""
    servers = {}
    for name, endpoint in endpoints.items():
        reading = readings.get(name)
        values = reading.values if reading is not None else {}
        servers[name] = {
            "server": endpoint.server,
            "model": endpoint.model,
            "max_model_len": endpoint.max_model_len,
            "metrics": reading.server if reading is not None else None,
            "kv_capacity_tokens": values.get("kv_capacity_tokens"),
            "cache": {k: v for k, v in reading.cache.items() if v != "None"} if reading is not None else {},
            "same_host": same_host.get(name),
        }
    return {"labels": dict(labels), "client": client, "servers": servers}


async def on_this_host(urls: Sequence[str]) -> bool | None:
    """Whether one of the addresses is this machine's own; None where no name says so and one of them is unknown."""
    found = [await _is_own(urlsplit(url).hostname or "") for url in urls]
    return True if True in found else None if None in found else False


async def _is_own(host: str) -> bool | None:
    try:
        addresses = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return None
    return any(_own(family, address) for family, _, _, _, address in addresses)


def _own(family: int, address: tuple[Any, ...]) -> bool:
    """Only to an address of its own can a machine bind."""
    if ipaddress.ip_address(address[0]).is_loopback:
        return True
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind((address[0], 0, *address[2:]))
    except OSError:
        return False
    return True
