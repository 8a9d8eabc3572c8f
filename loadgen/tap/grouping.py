"""Which calls belong to one query. Pure: instants come in, nothing is read, sent or waited for.

Rules of the file:
1. A request belongs where the first of its names says (ids.py): to the query of that name, or to the query that its session is at. Only a
   request without any is told by content (content.py).
2. A session goes on to its next query with a user's next turn, and when its query has ended.
3. A query ends `idle_s` after its last call did; ten times as late while a tool call that a reply asked for is open; and when its session's
   next user turn begins. What comes for it later is a query of its own, and is counted (`reopened`).
4. By content a request joins the query of what it extends, of the open tool call that handed it over, or of a reply that it reads. If it
   reads replies of several queries known by content alone, they were one. What joins nothing and is joined by nothing is not attributed.
5. A request that is another's next attempt takes its place: the same text, after one that failed.
6. What waited for what is told by content. Where that tells nothing, a call waited for the one at whose end nothing of the query was in
   flight (`by_time`), if there was such a moment.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fanmark.agents.runtime import ToolAsk
from fanmark.loadgen.quoting import Said as Replied
from fanmark.loadgen.quoting import depends_on
from fanmark.loadgen.tap.asked import Asked, Said
from fanmark.loadgen.tap.content import chain, first_told, handed_over, new_turn, same_call, stands
from fanmark.loadgen.tap.ids import Name, names, retries

OPEN_ASKS_IDLE = 10  # so many times as long is waited while a tool call is open
MOST_READ = 256  # replies of other queries that are looked for in a request without a name, the latest first
MOST_ALIKE = 64  # calls with the same messages
MOST_ENDED = 10_000  # sessions whose last query has ended are known so many at a time


class Answer(NamedTuple):
    """How a call or tool call ended. `id` is the reply's, where it may be told again."""

    text: str = ""
    asks: tuple[ToolAsk, ...] = ()
    failed: bool = False
    id: str | None = None


@dataclass(eq=False)
class Seen:
    """A call or tool call as the tap saw it. `text` is its reply, or its result; `extends` the call whose messages its own begin with;
    `after` are those that it waited for, `sources` those whose replies its messages are, by their place. `tool`: None for a call."""

    n: int
    began_at: float
    asked: Asked
    query: "Group"
    tool: str | None = None
    chain: list[bytes] = field(default_factory=list)
    digest: bytes = b""
    attempt: int = 1
    failed_before: list["Seen"] = field(default_factory=list)
    extends: "Seen | None" = None
    caller: "Seen | None" = None  # whose tool call it is, or was handed over by
    after: list["Seen"] = field(default_factory=list)
    sources: list["Seen | None"] = field(default_factory=list)
    by_time: bool = False
    text: str = ""
    asks: tuple[ToolAsk, ...] = ()
    open_asks: list[ToolAsk] = field(default_factory=list)
    ended_at: float | None = None
    failed: bool = False
    record: Any = None  # the recorder's own

    @property
    def round(self) -> int:
        """Which call of its agent's it is, within the query."""
        before = self.extends
        return 1 if before is None or before.query is not self.query else before.round + 1


@dataclass(eq=False)
class Group:
    """A query as the tap sees it."""

    name: Name
    session: int
    turn: int
    calls: list[Seen] = field(default_factory=list)
    in_flight: int = 0
    ended_at: float = 0.0
    over: bool = False
    followed: bool = False  # the session's next query has begun
    paused_after: Seen | None = None  # the call at whose end nothing was in flight

    @property
    def attributed(self) -> str:
        """By which method; "none" where its one call shows no company."""
        lone = self.name.method == "content" and self.turn == 1 and len(self.calls) == 1 and not self.followed
        return "none" if lone else self.name.method

    def told(self) -> Iterator[str]:
        """All replies and results so far."""
        yield from (seen.text for seen in self.calls if seen.text)

    def ends_at(self, idle_s: float) -> float | None:
        """When it ends if nothing comes; None while something is in flight."""
        if self.in_flight:
            return None
        waits = any(seen.open_asks for seen in self.calls)
        return self.ended_at + idle_s * (OPEN_ASKS_IDLE if waits else 1)


class Grouping:
    """All queries that are open, and what is needed of those that ended to know their session's next. `closed` collects those that end,
    until they are taken."""

    def __init__(self, idle_s: float) -> None:
        self.idle_s = idle_s
        self.open: dict[Group, None] = {}
        self.closed: list[Group] = []
        self.reopened = 0
        self._whole: OrderedDict[Name, Group] = OrderedDict()
        self._sessions: OrderedDict[Name, Group] = OrderedDict()
        self._ends: OrderedDict[bytes, list[Seen]] = OrderedDict()  # calls by the digest of all their messages
        self._by_reply: OrderedDict[str, Seen] = OrderedDict()  # and by their reply's id
        self._numbers = 0

    def call(self, n: int, at: float, headers: Mapping[str, str], asked: Asked, digest: bytes = b"") -> Seen:
        """A call that begins."""
        seen = Seen(n, at, asked, _NOWHERE, chain=chain(asked.messages), digest=digest)
        seen.extends = self._extended(seen)
        known = names(headers, asked.ids)
        self._join(seen, self._named(seen, known, at) if known else self._by_content(seen))
        self._attempt(seen, retries(headers))
        self._link(seen)
        if seen.chain:
            _keep(self._ends, seen.chain[-1], [*self._ends.get(seen.chain[-1], ())[-MOST_ALIKE:], seen])
        return seen

    def tool_call(self, n: int, at: float, headers: Mapping[str, str], tool: str, arguments: Mapping[str, Any]) -> Seen:
        """A tool call that begins."""
        seen = Seen(n, at, Asked(None, [], {}), _NOWHERE, tool=tool)
        known = names(headers, {})
        query = self._named(seen, known, at) if known else None
        among = [query] if query is not None else list(self.open)
        askers = [
            (each, ask) for q in among for each in q.calls for ask in each.open_asks if same_call(ask, tool, arguments)
        ]
        if askers and len({each.query for each, _ in askers}) == 1:
            seen.caller, ask = askers[0]
            seen.caller.open_asks.remove(ask)
            query = query or seen.caller.query
        self._join(seen, query or self._begin(Name("content", str(n), False)))
        if seen.caller is not None:
            seen.after = [seen.caller]
        else:
            _after_the_pause(seen)
        return seen

    def end(self, seen: Seen, at: float, said: Answer) -> None:
        """It ended."""
        seen.ended_at, seen.failed, seen.text = at, said.failed, said.text.strip()
        seen.asks, seen.open_asks = said.asks, list(said.asks)
        if said.id is not None:
            _keep(self._by_reply, said.id, seen)
        query = seen.query
        query.in_flight -= 1
        query.ended_at = max(query.ended_at, at)
        if not query.in_flight:
            query.paused_after = seen

    def idle(self, at: float) -> None:
        """Ends the queries that have ended by now."""
        for query in list(self.open):
            ends_at = query.ends_at(self.idle_s)
            if ends_at is not None and ends_at <= at:
                self._close(query)

    def close(self) -> None:
        """Ends all queries, and leaves those out that have calls in flight."""
        for query in list(self.open):
            self._close(query)

    def _close(self, query: Group) -> None:
        query.over = True
        del self.open[query]
        self.closed.append(query)

    def _begin(self, name: Name, before: Group | None = None) -> Group:
        """A new query, of the session of the one before."""
        if before is None:
            self._numbers += 1
            query = Group(name, self._numbers, 1)
        else:
            query = Group(name, before.session, before.turn + 1)
            before.followed = True
            if not before.over and not before.in_flight:
                self._close(before)
        self.open[query] = None
        return query

    def _join(self, seen: Seen, query: Group) -> None:
        seen.query = query
        query.calls.append(seen)
        query.in_flight += 1

    def _named(self, seen: Seen, known: Sequence[Name], at: float) -> Group:
        """By its names, the first that counts most."""
        whole = [name for name in known if name.whole]
        if whole:
            query = next((self._whole[name] for name in whole if name in self._whole), None)
            if query is None or query.over:
                self.reopened += query is not None
                query = self._begin(whole[0])
            for name in whole:
                _keep(self._whole, name, query)
            return query
        session = known[0]
        query = self._sessions.get(session)
        if query is None:
            query = self._begin(session)
        elif query.over or self._is_next_turn(seen, query):
            query = self._begin(session, query)
        _keep(self._sessions, session, query)
        return query

    def _is_next_turn(self, seen: Seen, query: Group) -> bool:
        before = seen.extends
        if before is None or before.query is not query or query.in_flight or before.asks:
            return False
        return new_turn(_added(seen, before), query.told())

    def _extended(self, seen: Seen) -> Seen | None:
        """The call whose messages stand first, the longest; of several that asked the same the one whose reply comes next, and where that
        does not tell either, none. The reply that it goes on from, where that is told."""
        if seen.asked.previous is not None and (before := self._by_reply.get(seen.asked.previous)) is not None:
            return before
        for place in range(len(seen.chain) - 1, 0, -1):
            alike = self._ends.get(seen.chain[place - 1], [])
            if alike:
                following = seen.asked.messages[place].text.strip()
                told = [each for each in alike if each.ended_at is not None and following and each.text == following]
                found = told or alike
                return found[-1] if told or len({each.query for each in found}) == 1 else None
        return None

    def _by_content(self, seen: Seen) -> Group:
        before = seen.extends
        if before is not None:
            query = before.query
            if self._is_next_turn(seen, query):
                return self._begin(Name("content", str(seen.n), False), query)
            if not query.over:
                return query
            self.reopened += 1
            return self._begin(Name("content", str(seen.n), False), query)
        told = first_told(seen.asked.messages)
        handed = [
            each for query in self.open for each in query.calls if any(handed_over(a, told) for a in each.open_asks)
        ]
        if handed and len({each.query for each in handed}) == 1:
            seen.caller = handed[0]
            return handed[0].query
        read = self._read(seen)
        if not read:
            return self._begin(Name("content", str(seen.n), False))
        into = next((query for query in read if query.name.method != "content"), read[0])
        for query in read:
            if query is not into and query.name.method == "content":
                self._merge(query, into)
        return into

    def _read(self, seen: Seen) -> list[Group]:
        """The open queries whose replies stand in it."""
        messages = [message.text.strip() for message in seen.asked.messages if message.role not in ("system", "tools")]
        latest = [each for query in self.open for each in query.calls if each.text and each.tool is None]
        found = [
            each.query
            for each in sorted(latest, key=lambda each: each.n)[-MOST_READ:]
            if any(stands(each.text, message) for message in messages)
        ]
        return list(dict.fromkeys(found))

    def _merge(self, query: Group, into: Group) -> None:
        for seen in query.calls:
            seen.query = into
        into.calls = sorted([*into.calls, *query.calls], key=lambda seen: seen.n)
        into.in_flight += query.in_flight
        into.ended_at = max(into.ended_at, query.ended_at)
        del self.open[query]

    def _attempt(self, seen: Seen, sent_before: int) -> None:
        """Takes the place of the attempt before it, which failed."""
        seen.attempt = sent_before + 1
        for each in reversed(seen.query.calls[:-1]):
            if each.failed and each.tool is None and each.digest == seen.digest and each.ended_at is not None:
                seen.failed_before = [*each.failed_before, each]
                seen.attempt = max(seen.attempt, each.attempt + 1)
                seen.query.calls.remove(each)
                return

    def _link(self, seen: Seen) -> None:
        """What it waited for, and whose replies its messages are."""
        messages = seen.asked.messages
        ended = [e for e in seen.query.calls if e is not seen and e.ended_at is not None and not e.failed]
        read = [message.text for message in messages if message.role not in ("system", "tools")]
        ids = [ask.id for message in messages for ask in message.asks if ask.id]
        ids += [message.answers for message in messages if message.answers]
        said = [Replied(e.n, [e.text] if e.text else [], [ask.id for ask in e.asks if ask.id]) for e in ended]
        waited = set(depends_on(said, [*read, *ids]))
        seen.after = [e for e in ended if e.n in waited]
        if seen.caller is not None and seen.caller not in seen.after:
            seen.after.insert(0, seen.caller)
        if seen.extends in ended and seen.extends not in seen.after:
            seen.after.append(seen.extends)
        by_text = {e.text: e for e in reversed(ended) if e.text}
        by_ask = {ask.id: e for e in ended for ask in e.asks if ask.id}
        seen.sources = [_source(message, by_text, by_ask) for message in messages]
        if not seen.after:
            _after_the_pause(seen)
        _callers(seen)
        for e in ended:
            e.open_asks = [ask for ask in e.open_asks if not _answered(ask, messages, told_again=e in seen.after)]


def _after_the_pause(seen: Seen) -> None:
    """It reads nothing of the query's: what began when nothing was in flight waited for what had ended last."""
    before = seen.query.paused_after
    if before is not None:
        seen.after, seen.by_time = [before], True


def _callers(seen: Seen) -> None:
    """A tool call whose result is read right after a reply was made by who wrote that."""
    reply: Seen | None = None
    for source in seen.sources:
        if source is not None and source.tool is None:
            reply = source
        elif source is not None and source.caller is None and reply is not None:
            source.caller, source.after, source.by_time = reply, [reply], False


_NOWHERE = Group(Name("none", "", False), 0, 0)


def _source(message: Said, by_text: Mapping[str, Seen], by_ask: Mapping[str, Seen]) -> Seen | None:
    """Whose reply or result a message is."""
    asker = next((by_ask[ask.id] for ask in message.asks if ask.id in by_ask), None)
    return asker if asker is not None else by_text.get(message.text.strip())


def _answered(ask: ToolAsk, messages: Sequence[Said], *, told_again: bool) -> bool:
    """Whether a tool call's result is told; where results bear no id, by the reply that asked for it being told again."""
    ids = [message.answers for message in messages if message.answers]
    return ask.id in ids if ids else told_again


def _added(seen: Seen, before: Seen) -> list[Said]:
    """What of its messages is new after those of the call that it extends, and that call's reply."""
    if seen.asked.previous is not None:
        return seen.asked.messages
    added = seen.asked.messages[len(before.chain) :]
    return added[1:] if added and added[0].role == "assistant" else added


def _keep(known: "OrderedDict[Any, Any]", key: Any, value: Any) -> None:
    known[key] = value
    known.move_to_end(key)
    if len(known) > MOST_ENDED:
        known.popitem(last=False)
