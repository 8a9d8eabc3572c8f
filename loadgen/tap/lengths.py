"""How long the messages of a query were, counted by the target's own tokenizer once the query has ended: nobody waits for it. Where the
target has no /tokenize, or wants a key for it, lengths are shared out by the size of texts."""

import asyncio
from collections.abc import Iterable

from msgspec.structs import replace

from fanmark.loadgen.errors import CallError
from fanmark.loadgen.tap.record import Sizes
from fanmark.loadgen.tap.seen import Group
from fanmark.loadgen.target import HttpEndpoint
from fanmark.loadgen.tokenizers import RemoteTokenizer

_AT_ONCE = 4


class Lengths:
    """Counts texts. `counted`: whether the target has counted one; it is not asked again once it did not."""

    def __init__(self, endpoint: HttpEndpoint) -> None:
        self.counted = False
        self._endpoint = endpoint
        self._silent = False
        self._slots = asyncio.Semaphore(_AT_ONCE)

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
        found = await asyncio.gather(*(self._count(tokenizer, text) for text in wanted.values()))
        counts = {id: count for id, count in zip(wanted, found, strict=True) if count is not None}
        for seen in [seen for group in groups for seen in group.calls if counts]:
            if seen.record.messages is not None:
                seen.record.messages = [replace(m, tokens=counts.get(m.id, m.tokens)) for m in seen.record.messages]

    async def _count(self, tokenizer: RemoteTokenizer, text: str) -> int | None:
        async with self._slots:
            if self._silent:
                return None
            try:
                count = len(await tokenizer.encode(text))
            except (CallError, ValueError, KeyError, TypeError):
                self._silent = True
                return None
            self.counted = True
            return count
