"""A router in front of stubs: `fanmark serve stub --replicas N --router POLICY`.

Rules of the file:
1. Generation goes to one replica, chosen by a policy (engine/routing.py) that knows what was sent and has not come back. What comes back is
   passed on as it comes, byte for byte; a replica that cuts its stream has the client's cut.
2. A client that goes away is gone for the replica too: its request is aborted there.
3. /metrics tells of all replicas, each series with the label `replica`. /health, and what changes something under /admin, goes to all,
   and the first that refuses is the answer. All else goes to the first.
4. Each replica is a process of its own that ends with the router.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any
from zlib import crc32

import aiohttp
from aiohttp import web

from fanmark.servers.body_fields import ApiError
from fanmark.servers.engine.routing import LEADING_TOKENS, Router
from fanmark.servers.prompts import message_texts
from fanmark.servers.stub import StubError, StubOptions, answer

_GENERATION = frozenset(("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"))
_OF_A_HOP = frozenset(("connection", "keep-alive", "transfer-encoding", "content-length", "host", "te", "upgrade"))
_OURS = ("Accept", "Accept-Encoding", "User-Agent", "Content-Type")  # what the client would add
_LEADING_CHARS = 4 * LEADING_TOKENS
_START_S = 30.0
Starting = Callable[[Sequence[str], AsyncExitStack], Awaitable[str]]  # of a stub with these flags: its address


class RouterApp:
    """Passes requests on to the replicas at `urls`."""

    def __init__(self, urls: Sequence[str], router: Router, client: aiohttp.ClientSession) -> None:
        self._urls, self._router, self._client = urls, router, client
        self._sent = [0] * len(urls)  # and not come back

    def __repr__(self) -> str:
        return f"<RouterApp {self._router.policy} {self._sent}>"

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The one entrance."""
        body = await request.content.read()
        if request.path in _GENERATION and request.method == "POST":
            return await self._generate(request, body)
        if request.path == "/metrics":
            return await self._metrics()
        every = request.path == "/health" or (request.path.startswith("/admin/") and request.method != "GET")
        if not every:
            return await self._pass_on(request, body, 0)
        replies = [await self._pass_on(request, body, place, write=False) for place in range(len(self._urls))]
        return next((reply for reply in replies if reply.status >= 400), replies[0])

    async def _generate(self, request: web.BaseRequest, body: bytes) -> web.StreamResponse:
        leading = leading_pieces(body) if self._router.policy == "prefix_affinity" else ()
        place = self._router.choose(self._sent, request.headers.get("X-Session-Id", ""), leading)
        self._sent[place] += 1
        try:
            return await self._pass_on(request, body, place)
        finally:
            self._sent[place] -= 1

    async def _pass_on(
        self, request: web.BaseRequest, body: bytes, place: int, *, write: bool = True
    ) -> web.StreamResponse:
        """One request to one replica, and its reply, written as it comes unless it is to be looked at first."""
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in _OF_A_HOP]
        url = self._urls[place] + request.path_qs
        begun = False
        try:
            async with self._client.request(
                request.method, url, data=body or None, headers=headers, skip_auto_headers=_OURS, allow_redirects=False
            ) as found:
                kept = [(name, value) for name, value in found.headers.items() if name.lower() not in _OF_A_HOP]
                if not write:
                    return _response(found.status, kept, await found.read())
                response = web.StreamResponse(status=found.status, reason=found.reason)
                response.headers.extend(kept)
                response.content_length = found.content_length
                if found.content_length is None:
                    response.enable_chunked_encoding()
                await response.prepare(request)
                begun = True
                async for data in found.content.iter_any():
                    await response.write(data)
                await response.write_eof()
                return response
        except aiohttp.ClientError as error:
            if begun and request.transport is not None:
                request.transport.abort()
                raise asyncio.CancelledError from None
            told = {
                "error": {"message": f"replica {place} does not answer: {error}", "type": "BadGateway", "code": 502}
            }
            return _response(502, [("Content-Type", "application/json")], json.dumps(told).encode())

    async def _metrics(self) -> web.StreamResponse:
        texts = []
        for url in self._urls:
            async with self._client.get(f"{url}/metrics") as found:
                texts.append(await found.text())
        headers = [("Content-Type", "text/plain; version=1.0.0; charset=utf-8")]
        return _response(200, headers, joined(texts).encode())


def _response(status: int, headers: Sequence[tuple[str, str]], body: bytes) -> web.Response:
    response = web.Response(status=status, body=body)
    response.headers.extend(headers)
    return response


def leading_pieces(body: bytes) -> list[int]:
    """Hashes of a prompt's leading pieces, each over all before it: of 64 token ids, or of as many characters as they take."""
    try:
        asked = json.loads(body)
        opening = str(asked.get("cache_salt", ""))
        opening += "".join(json.dumps(asked.get(key, "")) for key in ("instructions", "system"))
        if "prompt" in asked:
            tokens = asked["prompt"]
            text, size = (tokens, _LEADING_CHARS) if isinstance(tokens, str) else (tokens, LEADING_TOKENS)
        elif "input" in asked:
            opening += json.dumps(asked.get("tools", ""))
            text, size = json.dumps(asked["input"]).rstrip('"]}'), _LEADING_CHARS
        else:
            opening += json.dumps(asked.get("tools", ""))
            text = "\n".join(part for message in asked["messages"] for part in message_texts(message))
            size = _LEADING_CHARS
        found, crc = [], crc32(opening.encode())
        for at in range(0, len(text) - size + 1, size):
            piece = text[at : at + size]
            crc = crc32((piece if isinstance(piece, str) else repr(piece)).encode(), crc)
            found.append(crc)
        return found
    except (ApiError, ValueError, KeyError, TypeError, AttributeError):
        return []  # for the replica to refuse


def joined(texts: Sequence[str]) -> str:
    """What several servers tell as one exposition: family by family, each series with its server's number as `replica`."""
    heads: dict[str, list[str]] = {}
    series: dict[str, list[str]] = {}
    for place, text in enumerate(texts):
        family = ""
        for line in text.splitlines():
            if line.startswith("#"):
                family = line.split()[2]
                known = heads.setdefault(family, [])
                if line not in known:
                    known.append(line)
            elif line:
                name, _, value = line.rpartition(" ")
                plain, brace, labels = name.partition("{")
                series.setdefault(family, []).append(
                    f'{plain}{{replica="{place}"{"," + labels if brace and labels != "}" else "}"} {value}'
                )
    return "\n".join(line for family, head in heads.items() for line in (*head, *series.get(family, ()))) + "\n"


async def serve(options: StubOptions, argv: Sequence[str], start: Starting | None = None) -> None:
    """Has the replicas started, here or as `start` does it, and routes to them until a signal. Raises StubError."""
    own = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("--replicas", "--router", "--host", "--port"):
        own.add_argument(flag)
    own.add_argument("--parent-pipe", action="store_true")
    flags = own.parse_known_args(argv)[1]
    async with AsyncExitStack() as stack:
        urls = await asyncio.gather(*((start or _replica)(flags, stack) for _ in range(options.replicas)))
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
        client = await stack.enter_async_context(
            aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False)
        )
        told: Mapping[str, Any] = {"replicas": urls, "router": options.router}
        await answer(RouterApp(urls, Router(options.router, len(urls)), client).handle, options, told)


async def _replica(flags: Sequence[str], stack: AsyncExitStack) -> str:
    """The address of a stub that is started here; it ends with `stack`, and with this process."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fanmark.servers.stub", *flags, "--parent-pipe",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip

    async def end() -> None:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()

    stack.push_async_callback(end)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_START_S):
            return str(json.loads(await process.stdout.readline())["url"])
    except (TimeoutError, ValueError, KeyError):
        raise StubError("a replica did not start: its own line says why") from None
