"""Which cached tokens a run's own traffic can explain: more than that, and somebody else's traffic warmed the cache."""

from collections import Counter
from collections.abc import Container, Hashable, Sequence
from dataclasses import dataclass

from fanmark.agents.runtime import Author, Key, Message
from fanmark.loadgen.prompts import Part

_PIECE_BYTES, _PIECE_IDS = 32, 16
ANYONE = "anyone"
_WITHIN_BLOCK_TOKENS = 15  # two texts may share the start of their wording, but not a block of 16 tokens


def pieces(content: str | Sequence[int]) -> list[tuple[Hashable, int]]:
    """A text that is not ours, with a bound of the tokens of each piece: such texts may begin alike, and then as many pieces are."""
    if isinstance(content, str):
        data = content.encode()
        cut: list[Hashable] = [data[i : i + _PIECE_BYTES] for i in range(0, len(data), _PIECE_BYTES)]
    else:
        cut = [tuple(content[i : i + _PIECE_IDS]) for i in range(0, len(content), _PIECE_IDS)]
    return [(piece, len(piece)) for piece in cut]  # type: ignore[arg-type]


def listed(
    prompt: Sequence[tuple[Key, Author, Part]], messages: Sequence[Message], tools: Part | None, given: Container[Key]
) -> tuple[list[tuple[Hashable, int]], int]:
    """A prompt as the cache sees it, and from which of its messages on it is the query's own: what comes before, other queries send too. In
    a chat prompt the tools' schemas are no message, but they lead the prompt. Who said a text does not tell: without a template it is the
    same tokens. `given` is asked word for word as a file has it."""
    own = {m.key for m in messages if (m.per_query or m.source is not None) and m.key not in given}
    found: list[tuple[Hashable, int]] = []
    if tools is not None and not any(key == ("tools",) for key, _, _ in prompt):
        found.append(("tools", tools.size or 0))
    first_own = None
    for key, _, part in prompt:
        first_own = len(found) if first_own is None and key in own else first_own
        found += pieces(part.content) if key in given else [(part.seen, part.most)]
    return found, len(found) if first_own is None else first_own


class Crowd:
    """Counts of more things than can be remembered, in 16 MB. What falls on one place is counted together: then too much counts as
    explained, never too little."""

    def __init__(self) -> None:
        self._counts = bytearray(1 << 24)

    def __getitem__(self, thing: Hashable) -> int:
        return self._counts[hash(thing) % len(self._counts)]

    def __setitem__(self, thing: Hashable, count: int) -> None:
        self._counts[hash(thing) % len(self._counts)] = min(count, 255)


Counts = Counter[Hashable] | Crowd


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that was sent: where its salt is counted, and for each of its prefixes that end with a message, where that is counted,
    its hash and the message's tokens."""

    query: Hashable
    salt: Hashable
    salts: Counts
    prefixes: Sequence[tuple[Counts, Hashable, int]]


class Explained:
    """Counts the prompts sent under each salt, prefix by prefix. What belongs to one query alone is forgotten when it ends. `elsewhere`:
    other workers of the run send what queries share as well, at any time before. What is ANYONE's any other query may send as well."""

    def __init__(self, *, elsewhere: bool = False) -> None:
        self._elsewhere = elsewhere
        self._shared: Counter[Hashable] = Counter()
        self._own: dict[Hashable, Counter[Hashable]] = {}
        self._crowd: Crowd | None = None

    def sent(self, salt: Hashable, query: Hashable, messages: Sequence[tuple[Hashable, int]], first_own: int) -> Prompt:
        """Registers a prompt, a list of (message, tokens); from message number `first_own` on its prefixes belong to `query` alone."""
        own, shared = self._counts(query)
        prefix: Hashable = salt
        salts = shared if first_own > 0 else own
        salts[salt] += 1 + (self._elsewhere and salts is shared)
        prefixes = []
        for i, (message, tokens) in enumerate(messages):
            prefix = hash((prefix, message))
            seen = own if i >= first_own else shared
            seen[prefix] += 1 + (self._elsewhere and seen is shared)
            prefixes.append((seen, prefix, tokens))
        return Prompt(query, salt, salts, prefixes)

    def _counts(self, query: Hashable) -> tuple[Counts, Counts]:
        """Where it is counted what is the query's own, and what is not."""
        if query == ANYONE:
            self._crowd = self._crowd or Crowd()
            return self._crowd, self._crowd
        return self._own.setdefault(query, Counter()), self._shared

    def limit(self, prompt: Prompt) -> int:
        """The most tokens that other prompts sent until now can have left in the cache. To be asked when the reply is there: siblings that
        were sent a moment later may have been computed first."""
        if prompt.salts[prompt.salt] < 2:
            return 0
        tokens = 0
        for seen, prefix, size in prompt.prefixes:
            if seen[prefix] < 2:
                break
            tokens += size
        return tokens + _WITHIN_BLOCK_TOKENS

    def replied(self, prompt: Prompt, reply: str, content: str | Sequence[int] = "") -> None:
        """The reply stays in the cache behind its prompt. What anyone may have asked is answered alike, but not equally long: then it is
        the pieces of its `content` that stay."""
        last = prompt.prefixes[-1][1] if prompt.prefixes else prompt.salt
        own, _ = self._counts(prompt.query)
        for part in [piece for piece, _ in pieces(content)] if prompt.query == ANYONE else [reply]:
            last = hash((last, part))
            own[last] += 1

    def forget(self, query: Hashable, keep: int = 0) -> None:
        """Drops what belongs to one query, unless there is so little of it."""
        if not keep or len(self._own.get(query, ())) > keep:
            self._own.pop(query, None)
