"""What the files of a tapped run hold beside those of any run: of each call enough to re-enact it, and nothing that was said. Pure.

Texts are known by salted hashes: equal texts of one recording have equal hashes, those of two have not, for each has a salt of its own,
which is kept nowhere.
"""

from collections.abc import Iterable, Sequence
from hashlib import blake2b

from fanmark.loadgen.records import Call, Query
from fanmark.loadgen.tap.asked import Said
from fanmark.loadgen.tap.grouping import Group, Seen

BYTES_A_TOKEN = 4
BLOCK_TOKENS = 64
_BLOCK_BYTES = BLOCK_TOKENS * BYTES_A_TOKEN
_ID_BYTES = 6

Read = tuple[
    str, int, int | None, str
]  # a message: its id, its tokens, the call or tool call of the query whose reply it is, its role


class TappedCall(Call, kw_only=True):
    """A line of calls.jsonl. `messages` are those of the prompt in order, the tools' schemas first, as of role "tools"; `blocks` are
    chained hashes of the prompt's blocks of 64 tokens (256 bytes): prompts share what their lists begin with. `prompt` and `reply` are
    there only where texts are kept. `by_time`: what it waited for is not told by its content."""

    api: str = "chat"
    messages: list[Read] = []
    blocks: list[int] = []
    by_time: bool = False
    prompt: list[tuple[str, str]] | None = None
    reply: str | None = None


class TappedQuery(Query, kw_only=True):
    """A line of queries.jsonl. `attributed` is the method by which its calls were found to be one query (ids.METHODS)."""

    attributed: str = "none"


def text_id(salt: bytes, message: Said) -> str:
    """The id of a message's text."""
    return _hash(salt, message.content.encode(errors="surrogatepass")).hex()


def key_id(salt: bytes, key: str) -> str:
    """The id of what groups calls."""
    return _hash(salt, key.encode(errors="surrogatepass")).hex()


def _hash(salt: bytes, data: bytes) -> bytes:
    return blake2b(data, digest_size=_ID_BYTES, key=salt).digest()


def near_tokens(message: Said) -> int:
    """How long a message is, near enough: a token is some four bytes."""
    return -(-len(message.content.encode(errors="surrogatepass")) // BYTES_A_TOKEN)


def blocks(salt: bytes, messages: Iterable[Said]) -> list[int]:
    """Each whole block of the prompt, hashed with all before it."""
    text = b"".join(f"{m.role}\0{m.content}\0".encode(errors="surrogatepass") for m in messages)
    found, before = [], b""
    for start in range(0, len(text) - _BLOCK_BYTES + 1, _BLOCK_BYTES):
        before = _hash(salt, before + text[start : start + _BLOCK_BYTES])
        found.append(int.from_bytes(before, "big"))
    return found


def numbered(group: Group) -> dict[Seen, int]:
    """The calls and tool calls of a query by number, in the order in which they began."""
    return {seen: number for number, seen in enumerate(sorted(group.calls, key=lambda seen: seen.n), start=1)}


def settle(group: Group, number: int, arm: str, tokens: dict[str, int]) -> list[Call]:
    """Fills in what only a whole query tells of its calls, attempts that failed before included: the last ones come last. `tokens` are the
    exact lengths that are known, by message id."""
    numbers = numbered(group)
    found: list[Call] = []
    for seen, place in numbers.items():
        after = sorted(numbers[each] for each in seen.after if each in numbers)
        again_at: float | None = None
        for attempt in [seen, *reversed(seen.failed_before)]:
            call: TappedCall = attempt.record
            call.query, call.arm, call.call, call.after = number, arm, place, after
            call.round, call.by_time, call.attempt = seen.round, seen.by_time, attempt.attempt
            sources = [numbers.get(source) if source is not None else None for source in seen.sources]
            call.messages = [
                (id, tokens.get(id, near), source, role)
                for (id, near, _, role), source in zip(
                    call.messages, sources or [None] * len(call.messages), strict=True
                )
            ]
            call.retry_at = again_at
            again_at = call.due_at
            found.append(call)
    return found


def of_query(group: Group, number: int, arm: str, salt: bytes, calls: Sequence[Call]) -> TappedQuery:
    """The query's own line, but for what it cost."""
    last = [call for call in calls if call.retry_at is None]
    final = max(last, key=lambda call: call.done_at or 0.0)
    started_at = min(call.due_at for call in calls)
    failed = final.error not in (None, "cancelled")
    return TappedQuery(
        query=number,
        arm=arm,
        warmup=False,
        due_at=started_at,
        started_at=started_at,
        done_at=max(call.done_at or call.due_at for call in calls),
        outcome="abandoned" if group.in_flight else "failed" if failed else "completed",
        resources={},
        expected={},
        mismatches=[],
        seed=key_id(salt, group.name.key),
        error=final.error if failed else None,
        calls=sorted(last, key=lambda call: call.call),
        retried=[call for call in calls if call.retry_at is not None],
        session=group.session,
        turn=group.turn,
        attributed=group.attributed,
    )
