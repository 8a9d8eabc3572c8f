"""Which cached tokens a run's own traffic can explain: more than that, and somebody else's traffic warmed the cache."""

from collections.abc import Hashable, Sequence

_WITHIN_BLOCK_TOKENS = 15  # two texts may share the start of their wording, but not a block of 16 tokens


class Explained:
    """Remembers the prompts sent under each salt, message by message, as hashes of their prefixes. What belongs to one query alone is
    forgotten when it ends."""

    def __init__(self) -> None:
        self._shared: set[Hashable] = set()
        self._own: dict[Hashable, set[Hashable]] = {}

    def limit(
        self, salt: str, query: Hashable, prompt: Sequence[tuple[Hashable, int]], first_own: int
    ) -> tuple[int, Hashable]:
        """(the most tokens of `prompt` that earlier traffic under this salt can have left in the cache, the prompt's own hash).

        `prompt` lists (message, tokens); from message number `first_own` on, its prefixes belong to `query` alone. To be called when
        the prompt is sent; `replied` then adds what the server keeps of the reply.
        """
        own = self._own.setdefault(query, set())
        prefix: Hashable = salt
        tokens, matching = 0, True
        known = prefix in self._shared
        self._shared.add(prefix)
        for i, (message, size) in enumerate(prompt):
            prefix = hash((prefix, message))
            seen = own if i >= first_own else self._shared
            matching = matching and prefix in seen
            tokens += size if matching else 0
            seen.add(prefix)
        return tokens + (_WITHIN_BLOCK_TOKENS if known else 0), prefix

    def replied(self, query: Hashable, prompt: Hashable, reply: Hashable) -> None:
        """The reply stays in the cache behind its prompt (`limit` gave its hash)."""
        self._own.setdefault(query, set()).add(hash((prompt, reply)))

    def forget(self, query: Hashable) -> None:
        """Drops what belongs to one query."""
        self._own.pop(query, None)
