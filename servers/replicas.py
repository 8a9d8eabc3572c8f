"""Replicas of one of our servers behind one address: how they are started, and how a request is passed on to one of them.

Rules of the file:
1. What comes back is passed on as it comes, byte for byte; a replica that cuts its stream has the client's cut.
2. A client that goes away is gone for the replica too: its request is aborted there.
3. Each replica is a process of its own that ends with the one that has it started.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
from aiohttp import web
from yarl import URL

_OF_A_HOP = frozenset(("connection", "keep-alive", "transfer-encoding", "content-length", "host", "te", "upgrade"))
_OURS = ("Accept", "Accept-Encoding", "User-Agent", "Content-Type")  # what the client would add
_START_S = 30.0
Header = tuple[str, str]
Starting = Callable[[str, Sequence[str], AsyncExitStack], Awaitable[str]]  # of a module with these flags: its address


class ReplicaError(Exception):
    """A replica that does not start."""


class NotListening(Exception):
    """A replica to which nothing could be sent."""


def _same(header: Header) -> Header:
    return header


class Replicas:
    """Those at `urls`, asked by `client`."""

    def __init__(self, urls: Sequence[str], client: aiohttp.ClientSession) -> None:
        self.urls, self._client = urls, client
        self._origins = [str(URL(url).origin()) for url in urls]

    def __len__(self) -> int:
        return len(self.urls)

    async def ask(
        self,
        place: int,
        request: web.BaseRequest,
        body: bytes,
        *,
        there: Callable[[Header], Header] = _same,
        back: Callable[[Header], Header] = _same,
        write: bool = True,
    ) -> web.StreamResponse:
        """One request to one replica, and its reply, written as it comes unless it is to be looked at first. `there` and `back` make each
        header what it is on the other side. One that gives no reply is 502. Raises NotListening."""
        headers = [there(each) for each in _kept(request.headers.items())]
        begun = False
        try:
            async with self._client.request(
                request.method, self._origins[place] + request.path_qs, data=body or None, headers=headers,
                skip_auto_headers=_OURS, allow_redirects=False,
            ) as found:  # fmt: skip
                kept = [back(each) for each in _kept(found.headers.items())]
                if not write:
                    return reply(found.status, kept, await found.read())
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
        except aiohttp.ClientConnectorError as error:
            raise NotListening(str(error)) from None
        except aiohttp.ClientError as error:
            if begun and request.transport is not None:
                request.transport.abort()
                raise asyncio.CancelledError from None
            return silent(place, error)

    async def metrics(self) -> web.StreamResponse:
        """What all tell, each series with its replica's number; 502 while one does not tell."""
        texts = []
        for place, url in enumerate(self._origins):
            try:
                async with self._client.get(f"{url}/metrics") as found:
                    texts.append(await found.text())
            except aiohttp.ClientError as error:
                return silent(place, error)
        headers = [("Content-Type", "text/plain; version=1.0.0; charset=utf-8")]
        return reply(200, headers, joined(texts).encode())


def _kept(headers: Iterable[Header]) -> list[Header]:
    return [header for header in headers if header[0].lower() not in _OF_A_HOP]


def silent(place: int, error: Exception) -> web.Response:
    """The reply where a replica gave none."""
    told = {"error": {"message": f"replica {place} does not answer: {error}", "type": "BadGateway", "code": 502}}
    return reply(502, [("Content-Type", "application/json")], json.dumps(told).encode())


def reply(status: int, headers: Sequence[Header], body: bytes) -> web.Response:
    """A whole reply with these headers."""
    response = web.Response(status=status, body=body)
    response.headers.extend(headers)
    return response


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


def own_flags(argv: Sequence[str], routers: Sequence[str]) -> list[str]:
    """The flags that are a replica's: without `routers`, which take a value, and where to listen."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for flag in (*routers, "--replicas", "--host", "--port"):
        parser.add_argument(flag)
    parser.add_argument("--parent-pipe", action="store_true")
    return parser.parse_known_args(argv)[1]


@asynccontextmanager
async def started(
    module: str, flags: Sequence[Sequence[str]], start: Starting | None = None
) -> AsyncIterator[Replicas]:
    """A replica for each of these flags, started here or as `start` does it, for as long as the context lasts. Raises ReplicaError."""
    async with AsyncExitStack() as stack:
        urls = await asyncio.gather(*((start or _start)(module, each, stack) for each in flags))
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
        client = await stack.enter_async_context(
            aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False)
        )
        yield Replicas(urls, client)


async def _start(module: str, flags: Sequence[str], stack: AsyncExitStack) -> str:
    """The address of a server that is started here; it ends with `stack`, and with this process."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *flags, "--parent-pipe",
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
        raise ReplicaError("a replica did not start: its own line says why") from None
