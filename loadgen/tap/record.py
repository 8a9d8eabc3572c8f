"""What the files of a tapped run hold beside those of any run: of each call enough to re-enact it (recording.py), and nothing that was
said. Pure.

A server tells how long a whole prompt is. What of it a message has: of a reply, what was written; of a message that was read before, what
it had then; the rest is shared out among those that are new, by their length. So messages add up to their prompts, and equal texts are
equally long.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import accumulate, zip_longest

from msgspec.structs import replace

from fanmark.agents.runtime import Author
from fanmark.loadgen.recording import RecordedCall, text_id
from fanmark.loadgen.recording import Said as Told
from fanmark.loadgen.records import Call, Query
from fanmark.loadgen.tap.asked import Said
from fanmark.loadgen.tap.frames import UNTOLD
from fanmark.loadgen.tap.pieces import beginnings, ending, pieces
from fanmark.loadgen.tap.seen import Group, Seen

BYTES_A_TOKEN = 4
BLOCK_TOKENS = 64
_BLOCK_BYTES = BLOCK_TOKENS * BYTES_A_TOKEN
_HASH_BYTES = 6
_MOST_SIZES = 200_000
_AUTHORS: dict[str, Author] = {"system": "system", "tools": "system", "assistant": "assistant", "tool": "tool"}


class TappedCall(RecordedCall, kw_only=True):
    """A line of calls.jsonl. `blocks` are chained hashes of the prompt's blocks of 64 tokens (256 bytes): prompts share what their lists
    begin with. `prompt` and `reply` are there only where texts are kept. `by_time`: what it waited for is not told by its content."""

    api: str = "chat"
    blocks: list[int] = []
    by_time: bool = False
    prompt: list[tuple[str, str]] | None = None
    reply: str | None = None


class TappedQuery(Query, kw_only=True):
    """A line of queries.jsonl. `attributed` is the method by which its calls were found to be one query (ids.METHODS)."""

    attributed: str = "none"


class Sizes(OrderedDict[str, int]):
    """Lengths of messages in tokens by their id, of those that were met last."""

    def settle(self, id: str, tokens: int) -> int:
        """The message's length from now on, unless it is known."""
        tokens = self.setdefault(id, tokens)
        self.move_to_end(id)
        if len(self) > _MOST_SIZES:
            self.popitem(last=False)
        return tokens


def told_of(salt: bytes, messages: Iterable[Said], before: Sequence[Told] | None = ()) -> list[Told]:
    """The messages of a prompt as they are kept; `tokens` are near enough for now: some four bytes each. Those that stood in the prompt
    `before` at the same place are the same."""
    found = [
        Told(text_id(salt, m.content), -(-len(_bytes(m.content)) // BYTES_A_TOKEN), _AUTHORS.get(m.role, "user"))
        for m in messages
    ]
    return [old if old == new else new for new, old in zip_longest(found, (before or ())[: len(found)])]


def shared_out(total: int, weights: Sequence[int]) -> list[int]:
    """A number of tokens in whole parts that are as the weights, and add up."""
    whole = sum(weights)
    if not whole:
        return [total, *([0] * (len(weights) - 1))] if weights else []
    ends = [total * upto // whole for upto in accumulate(weights)]
    return [end - before for before, end in zip([0, *ends], ends, strict=False)]


def _sized(call: TappedCall, sources: Sequence[Seen | None], numbers: dict[Seen, int], sizes: Sizes) -> list[Told]:
    """The messages with their lengths, and whose replies they are."""
    messages = call.messages or []
    known: list[int | None] = []
    for message, source in zip(messages, sources, strict=True):
        written = source.record.output_tokens if source is not None and source.tool is None and source.text else None
        known.append(sizes.settle(message.id, written) if written is not None else sizes.get(message.id))
    new = [message for message, tokens in zip(messages, known, strict=True) if tokens is None]
    rest = None if call.input_tokens is None else call.input_tokens - sum(tokens or 0 for tokens in known)
    weights = [message.tokens for message in new]
    parts = iter(weights if rest is None or rest < 0 else shared_out(rest, weights))
    found = []
    for message, tokens, source in zip(messages, known, sources, strict=True):
        length = tokens if tokens is not None else sizes.settle(message.id, next(parts))
        found.append(Told(message.id, length, message.author, numbers.get(source) if source is not None else None))
    return found


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _hash(salt: bytes, data: bytes) -> bytes:
    return blake2b(data, digest_size=_HASH_BYTES, key=salt).digest()


def blocks(salt: bytes, messages: Iterable[Said]) -> list[int]:
    """Each whole block of the prompt, hashed with all before it."""
    text = b"".join(_bytes(f"{m.role}\0{m.content}\0") for m in messages)
    found, before = [], b""
    for start in range(0, len(text) - _BLOCK_BYTES + 1, _BLOCK_BYTES):
        before = _hash(salt, before + text[start : start + _BLOCK_BYTES])
        found.append(int.from_bytes(before, "big"))
    return found


def numbered(group: Group) -> dict[Seen, int]:
    """The calls and tool calls of a query by number, in the order in which they began."""
    return {seen: number for number, seen in enumerate(sorted(group.calls, key=lambda seen: seen.n), start=1)}


def settle(group: Group, number: int, arm: str, sizes: Sizes, salt: bytes) -> list[Call]:
    """Fills in what only a whole query tells of its calls, attempts that failed before included."""
    numbers = numbered(group)
    found: list[Call] = []
    for seen, place in numbers.items():
        after = sorted(numbers[each] for each in seen.after if each in numbers)
        again_at: float | None = None
        cut = _cut(seen, salt)
        for attempt in [seen, *reversed(seen.failed_before)]:
            call: TappedCall = attempt.record
            call.query, call.arm, call.call, call.after = number, arm, place, after
            call.round, call.by_time, call.attempt, call.retry_at = seen.round, seen.by_time, attempt.attempt, again_at
            if call.messages is not None:
                if cut:
                    call.messages = [told for told, _ in cut]
                call.messages = _sized(call, [e for _, e in cut] if cut else seen.sources, numbers, sizes)
                if call.api != "completions":
                    call.messages = [
                        _begun(told, said.content, salt, sizes)
                        for told, said in zip(call.messages, seen.asked.messages, strict=True)
                    ]
                if call.messages and call.input_tokens is not None:
                    call.messages = ending(call.messages, call.input_tokens)
            again_at = call.due_at
            found.append(call)
    return found


def _begun(told: Told, text: str, salt: bytes, sizes: Sizes) -> Told:
    """The message with what it begins with, unless it is a reply or a result."""
    if told.source is not None:
        return told
    begins = [(id, sizes.settle(id, tokens)) for id, tokens in beginnings(salt, text, told.tokens)]
    return replace(told, begins=tuple(begins)) if begins else told


def _cut(seen: Seen, salt: bytes) -> list[tuple[Told, Seen | None]]:
    """A completion's prompt in pieces; nothing of what is whole."""
    call: TappedCall = seen.record
    if call.api != "completions" or not call.messages or len(call.messages) > 1 or seen.sources[0] is not None:
        return []
    earlier = [e for e in seen.query.calls if e.ended_at is not None and e.ended_at <= seen.began_at and not e.failed]
    return pieces(salt, seen.asked.messages[0].content, call.messages[0], earlier)


def of_query(group: Group, number: int, arm: str, salt: bytes, calls: Sequence[Call]) -> TappedQuery:
    """The query's own line, but for what it cost."""
    last = [call for call in calls if call.retry_at is None]
    final = max(last, key=lambda call: call.done_at or 0.0)
    started_at = min(call.due_at for call in calls)
    untold = any(call.error == UNTOLD for call in calls)  # what it took is not known
    last_error = UNTOLD if untold else final.error
    failed = last_error not in (None, "cancelled")
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
        seed=text_id(salt, group.name.key),
        error=last_error if failed else None,
        calls=sorted(last, key=lambda call: call.call),
        retried=[call for call in calls if call.retry_at is not None],
        session=group.session,
        turn=group.turn,
        attributed=group.attributed,
    )
