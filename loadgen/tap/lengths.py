"""How long the messages of a query were, counted by the target's own tokenizer once the query has ended: nobody waits for it. Where the
target has no /tokenize, or wants a key for it, lengths are shared out by the size of texts."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress

from msgspec.structs import replace

from fanmark.loadgen.errors import CallError
from fanmark.loadgen.tap.record import Sizes
from fanmark.loadgen.tap.seen import Group
from fanmark.loadgen.target import HttpEndpoint
from fanmark.loadgen.tokenizers import RemoteTokenizer

_AT_ONCE = 4
_ATTEMPTS = 2


class Lengths:
    """Counts texts. `counted` and `by_size`: how many messages' lengths the target counted, and did not; it is not asked again once it
    refused. `wait_s` is the longest that the queries which have ended wait for it, for their texts wait in memory."""

    def __init__(self, endpoint: HttpEndpoint, wait_s: float = 10.0) -> None:
        self.counted = self.by_size = 0
        self._endpoint = endpoint
        self._wait_s = wait_s
        self._silent = False
        self._slots = asyncio.Semaphore(_AT_ONCE)

    @property
    def known(self) -> str:
        """How lengths are known."""
        return "by size" if not self.counted else "counted in part" if self.by_size else "counted"

    async def count(self, groups: Iterable[Group], sizes: Sizes) -> None:
        """Puts counted lengths in place of near ones, in messages that are neither known nor replies."""
        wanted: dict[str, str] = {}
        model = self._endpoint.model
        for seen in [seen for group in groups for seen in group.calls if seen.tool is None]:
            model = model or seen.asked.model or ""
            for told, said, source in zip(seen.record.messages or (), seen.asked.messages, seen.sources, strict=True):
                if told.id not in sizes and (source is None or source.tool is not None) and told.tokens:
                    wanted[told.id] = said.content
        tokenizer = RemoteTokenizer(self._endpoint.lane, self._endpoint.root, model, self._endpoint.headers)
        counts: dict[str, int] = {}

        async def one(id: str, text: str) -> None:
            count = await self._count(tokenizer, text)
            if count is not None:
                counts[id] = count

        with suppress(TimeoutError):
            async with asyncio.timeout(self._wait_s):
                await asyncio.gather(*(one(id, text) for id, text in wanted.items()))
        self.counted, self.by_size = self.counted + len(counts), self.by_size + len(wanted) - len(counts)
        for seen in [seen for group in groups for seen in group.calls if counts]:
            if seen.record.messages is not None:
                seen.record.messages = [replace(m, tokens=counts.get(m.id, m.tokens)) for m in seen.record.messages]

    async def _count(self, tokenizer: RemoteTokenizer, text: str) -> int | None:
        async with self._slots:
            for _ in range(_ATTEMPTS if not self._silent else 0):
                try:
                    return len(await tokenizer.encode(text))
                except (ValueError, KeyError, TypeError):
                    self._silent = True
                except CallError as e:
                    self._silent = e.kind == "bad_reply"  # the others are of a connection that was let go
                if self._silent:
                    break
            return None
