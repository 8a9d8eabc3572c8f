"""New connections for the fast lane: names resolved once, the address that took a connection tried first from then on."""

import asyncio
import socket
from typing import Any

from fanmark.loadgen.errors import CallError
from fanmark.loadgen.lanes.http1 import Address


class Dialler:
    """Connects to addresses, and remembers what their names stand for."""

    def __init__(self) -> None:
        self._found: dict[Address, list[tuple[int, Any]]] = {}

    async def connect(self, address: Address) -> socket.socket:
        """A new connection, to the first of the name's addresses that takes one. Raises CallError."""
        loop = asyncio.get_running_loop()
        try:
            if address not in self._found:
                found = await loop.getaddrinfo(*address, type=socket.SOCK_STREAM)
                self._found[address] = [(family, where) for family, _, _, _, where in found]
            for family, where in self._found[address]:
                sock = socket.socket(family, socket.SOCK_STREAM)
                try:
                    sock.setblocking(False)
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    await loop.sock_connect(sock, where)
                except BaseException as e:
                    sock.close()
                    if not isinstance(e, OSError):
                        raise
                    reason = e
                else:
                    self._found[address] = [(family, where)]
                    return sock
            raise reason
        except (OSError, UnicodeError) as e:
            self._found.pop(address, None)
            raise CallError("connect", f"cannot connect to {address[0]}:{address[1]}: {e}") from None
