"""A router in front of stubs: `fanmark serve stub --replicas N --router POLICY`.

Rules of the file:
1. Generation goes to one replica, chosen by a policy (engine/routing.py) that knows what was sent and has not come back.
2. /metrics tells of all replicas, each series with the label `replica`. /health, and what changes something under /admin, goes to all,
   and the first that refuses is the answer. All else goes to the first.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

from aiohttp import web

from fanmark.servers.body_fields import ApiError
from fanmark.servers.engine.routing import LEADING_TOKENS, Router
from fanmark.servers.prompts import message_texts
from fanmark.servers.replicas import NotListening, ReplicaError, Replicas, Starting, own_flags, silent, started
from fanmark.servers.stub import StubError, StubOptions, answer

_GENERATION = frozenset(("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"))
_LEADING_CHARS = 4 * LEADING_TOKENS


class RouterApp:
    """Passes requests on to the replicas."""

    def __init__(self, replicas: Replicas, router: Router) -> None:
        self._replicas, self._router = replicas, router
        self._sent = [0] * len(replicas)  # and not come back

    def __repr__(self) -> str:
        return f"<RouterApp {self._router.policy} {self._sent}>"

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The one entrance."""
        body = await request.content.read()
        if request.path in _GENERATION and request.method == "POST":
            return await self._generate(request, body)
        if request.path == "/metrics":
            return await self._replicas.metrics()
        every = request.path == "/health" or (request.path.startswith("/admin/") and request.method != "GET")
        if not every:
            return await self._pass_on(request, body, 0)
        replies = [await self._pass_on(request, body, place, write=False) for place in range(len(self._replicas))]
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
        try:
            return await self._replicas.ask(place, request, body, write=write)
        except NotListening as error:
            return silent(place, error)


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


async def serve(options: StubOptions, argv: Sequence[str], start: Starting | None = None) -> None:
    """Has the replicas started, here or as `start` does it, and routes to them until a signal. Raises StubError."""
    flags = [own_flags(argv, ["--router"])] * options.replicas
    try:
        async with started("fanmark.servers.stub", flags, start) as replicas:
            told: Mapping[str, Any] = {"replicas": replicas.urls, "router": options.router}
            await answer(RouterApp(replicas, Router(options.router, len(replicas))).handle, options, told)
    except ReplicaError as error:
        raise StubError(str(error)) from None
