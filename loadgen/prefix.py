"""What a perfect prefix cache would leave to be computed: one without bounds, that keeps replies too and knows no blocks. Pure.

A real one serves whole blocks only, at most the prompt without its last token, and forgets: its misses lie above these, by less than a
block a call as long as nothing is forgotten. Where messages that differ begin with the same words they may lie below, by as much.
"""

from collections.abc import Hashable, Iterable, Sequence
from itertools import groupby
from typing import Any

from fanmark.agents.runtime import Message
from fanmark.loadgen.users import TOLD
from fanmark.loadgen.walk import Made


class PrefixCache:
    """All prompts and replies so far, message by message. Those of one query alone are told apart by its number."""

    def __init__(self) -> None:
        self._root: dict[Hashable, Any] = {}

    def fresh_tokens(self, calls: Iterable[Made], query: int, *, together: bool = False) -> int:
        """Input tokens of a query's calls that are not served. Calls of one depth are siblings: one after another, or, `together`, all of
        them before any has left anything in the cache, which is the worst that can be."""
        fresh = 0
        for _, group in groupby(sorted(calls, key=lambda made: made.depth), key=lambda made: made.depth):
            siblings = list(group)
            for at in [siblings] if together else [[made] for made in siblings]:
                fresh += sum(made.input_tokens - self._served(made.prompt, query) for made in at)
                for made in at:
                    self._keep([*made.prompt, made.reply], query)
        return fresh

    def _served(self, prompt: Sequence[Message], query: int) -> int:
        node, served = self._root, 0
        for message in prompt:
            if message.tokens > 0:
                found = node.get(_identity(message, query))
                if found is None:
                    break
                node, served = found, served + message.tokens
        return served

    def _keep(self, messages: Iterable[Message], query: int) -> None:
        node = self._root
        for message in messages:
            if message.tokens > 0:
                node = node.setdefault(_identity(message, query), {})


def _identity(message: Message, query: int) -> Hashable:
    if message.key[0] == TOLD:  # what a query before asked or answered
        return (message.key[2:], message.key[1])
    return (message.key, query) if message.per_query or message.source is not None else message.key
