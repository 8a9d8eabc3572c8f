"""Which calls belong to one query. Pure: instants come in, nothing is read, sent or waited for.

Rules of the file:
1. A request belongs where the first of its names says (ids.py): to the query of that name, or to the query that its session is at. Only a
   request without any is told by content (content.py).
2. A session goes on to its next query with a user's next turn, and when its query has ended.
3. A query ends `idle_s` after its last call did; ten times as late while a tool call that a reply asked for is open; and when its session's
   next user turn begins. What comes for it later is a query of its own, and is counted (`reopened`).
4. By content a request joins the query of what it extends, of the open tool call that handed it over, or of a reply that it reads. If it
   reads replies of several queries known by content alone, they were one. What several queries hand over or say alike tells nothing. What
   joins nothing and is joined by nothing is not attributed.
5. A request that is another's next attempt takes its place: the same text, after one that failed.
6. What waited for what is told by content. Where that tells nothing, a call waited for the one at whose end nothing of the query was in
   flight (`by_time`), if there was such a moment.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from fanmark.agents.runtime import ToolAsk
from fanmark.loadgen.quoting import SHORT, depends_on
from fanmark.loadgen.quoting import Said as Replied
from fanmark.loadgen.tap.asked import Asked, Said
from fanmark.loadgen.tap.content import (
    HANDED,
    call_ids,
    chain,
    first_told,
    handed_over,
    new_turn,
    of_system,
    same_call,
    says,
    spoken,
    stands,
)
from fanmark.loadgen.tap.ids import Name, names, retries
from fanmark.loadgen.tap.seen import NOWHERE, Answer, Group, Seen

MOST_READ = 256  # replies of other queries that are looked for in a request without a name, the latest first
MOST_ALIKE = 16  # calls with the same messages
MOST_ENDED = 5_000  # sessions whose last query has ended are known so many at a time


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
        self._asks: OrderedDict[str, Seen] = OrderedDict()  # and by the ids of the tool calls that it asks for
        self._failed: OrderedDict[bytes, Seen] = OrderedDict()  # and those that failed, by their whole request
        self._numbers = 0

    def call(self, n: int, at: float, headers: Mapping[str, str], asked: Asked, digest: bytes = b"") -> Seen:
        """A call that begins."""
        said = spoken(asked.messages)
        seen = Seen(
            n, at, asked, NOWHERE, spoken=said, system=of_system(asked.messages), chain=chain(said), digest=digest
        )
        seen.extends = self._extended(seen)
        known = names(headers, asked.ids)
        self._join(seen, self._named(seen, known) if known else self._by_content(seen))
        self._attempt(seen, retries(headers))
        self._link(seen)
        if seen.chain:
            _keep(self._ends, seen.chain[-1], [*self._ends.get(seen.chain[-1], ())[-MOST_ALIKE:], seen])
        seen.length, seen.chain = len(seen.chain), []
        _share(seen)
        return seen

    def tool_call(self, n: int, at: float, headers: Mapping[str, str], tool: str, arguments: Mapping[str, Any]) -> Seen:
        """A tool call that begins."""
        seen = Seen(n, at, Asked(None, [], {}), NOWHERE, tool=tool)
        known = names(headers, {})
        query = self._named(seen, known) if known else None
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
        seen.asks, seen.open_asks, seen.says = said.asks, list(said.asks), says(seen.text, said.asks)
        for ask in said.asks:
            if ask.id:
                _keep(self._asks, ask.id, seen)
        if said.failed and seen.tool is None:
            _keep(self._failed, seen.digest, seen)
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

    def _named(self, seen: Seen, known: Sequence[Name]) -> Group:
        """By the first of its names; what else names a query is from now on a name of that one."""
        whole, session = [name for name in known if name.whole], known[0]
        if session.whole:
            query = next((self._whole[name] for name in whole if name in self._whole), None)
            if query is None or query.over:
                self.reopened += query is not None
                query = self._begin(session)
        else:
            query = self._sessions.get(session)
            if query is None:
                query = self._begin(session)
            elif query.over or self._is_next_turn(seen, query):
                query = self._begin(session, query)
            _keep(self._sessions, session, query)
        for name in whole:
            _keep(self._whole, name, query)
        return query

    def _is_next_turn(self, seen: Seen, query: Group) -> bool:
        before = seen.extends
        if before is None or before.query is not query or query.in_flight or before.asks:
            return False
        return new_turn(_added(seen, before), query.told())

    def _extended(self, seen: Seen) -> Seen | None:
        """The call that it goes on from: by the id of its reply, else the one whose messages stand first, the longest. Of several that
        asked the same the one whose reply comes next, or whose system does; where neither tells of one query alone, none."""
        if seen.asked.previous is not None and (before := self._by_reply.get(seen.asked.previous)) is not None:
            return before
        for place in range(len(seen.chain) - 1, 0, -1):
            alike = self._ends.get(seen.chain[place - 1])
            if alike:
                following = seen.spoken[place]
                found = [e for e in alike if e.ended_at is not None and _is_reply(following, e)] or alike
                found = [e for e in found if e.system == seen.system] or found
                return found[-1] if len({e.query for e in found}) == 1 else None
        return None

    def _by_content(self, seen: Seen) -> Group:
        attempt = self._failed.get(seen.digest)
        if attempt is not None and not attempt.query.over:
            return attempt.query
        before = seen.extends
        if before is not None:
            query = before.query
            if self._is_next_turn(seen, query):
                return self._begin(Name("content", str(seen.n), False), query)
            if not query.over:
                return query
            self.reopened += 1
            return self._begin(Name("content", str(seen.n), False), query)
        asked = [self._asks[id] for id in call_ids(seen.spoken) if id in self._asks]
        if asked and not asked[-1].query.over:
            return asked[-1].query
        told = first_told(seen.spoken)
        handed = [
            each
            for query in self.open
            for each in query.calls
            if any(handed_over(a, told) for a in each.open_asks)
            and (len(told) >= HANDED or each.system != seen.system)  # else it may be somebody's own short question
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
        """The open queries whose replies stand in it. What several of them say alike is of all of them if it stands there as often, else of
        none: whose it is cannot be told."""
        messages = [message.text.strip() for message in seen.spoken]
        latest = [
            each for query in self.open for each in query.calls if each.ended_at is not None and each.tool is None
        ]
        saying: dict[str, dict[Group, None]] = {}
        for each in sorted(latest, key=lambda each: each.n)[-MOST_READ:]:
            for text in (*each.says, *(ask.id for ask in each.asks if len(ask.id) >= SHORT)):
                saying.setdefault(text, {})[each.query] = None
        found = dict[Group, None]()
        for text, queries in saying.items():
            times = sum(max(1, message.count(text)) for message in messages if stands(text, message))
            if times >= len(queries):
                found |= queries
        return list(found)

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
        ids = call_ids(messages)
        ended = [e for e in seen.query.calls if e is not seen and e.ended_at is not None and not e.failed]
        whole, known = {message.text.strip() for message in seen.spoken}, set(ids)
        waited = {
            e.n for e in ended if (e.text and e.text in whole) or any(ask.id in known for ask in e.asks)
        }  # as nearly all are
        said = [Replied(e.n, e.says, [ask.id for ask in e.asks if ask.id]) for e in ended if e.n not in waited]
        waited |= set(depends_on(said, [*(message.text for message in seen.spoken), *ids])) if said else set()
        seen.after = [e for e in ended if e.n in waited]
        if seen.caller is not None and seen.caller not in seen.after:
            seen.after.insert(0, seen.caller)
        if seen.extends in ended and seen.extends not in seen.after:
            seen.after.append(seen.extends)
        by_text = {e.text: e for e in reversed(ended) if e.text}
        by_ask = {ask.id: e for e in ended for ask in e.asks if ask.id}
        seen.sources = [_source(message, by_text, by_ask) for message in messages]
        if not seen.after and seen.failed_before:
            seen.after, seen.by_time = seen.failed_before[-1].after, seen.failed_before[-1].by_time
        elif not seen.after:
            _after_the_pause(seen)
        _callers(seen)
        for e in ended:
            e.open_asks = [ask for ask in e.open_asks if not _answered(ask, seen, e)]


def _share(seen: Seen) -> None:
    """What it repeats of the call that it extends is held once: else a long conversation would be held as often as it has turns."""
    before, mine = seen.extends.asked.messages if seen.extends is not None else [], seen.asked.messages
    for place in range(min(len(before), len(mine))):
        if before[place] == mine[place]:
            mine[place] = before[place]
    seen.spoken = spoken(mine)


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


def _source(message: Said, by_text: Mapping[str, Seen], by_ask: Mapping[str, Seen]) -> Seen | None:
    """Whose reply or result a message is."""
    asker = next((by_ask[ask.id] for ask in message.asks if ask.id in by_ask), None)
    return asker if asker is not None else by_text.get(message.text.strip())


def _is_reply(message: Said, seen: Seen) -> bool:
    """Whether a message is the reply to a call, as it was or as a framework tells it."""
    text = message.text.strip()
    if seen.asks:
        return any(ask.id and (ask.id in text or ask.id in [told.id for told in message.asks]) for ask in seen.asks)
    return bool(text) and text == seen.text


def _answered(ask: ToolAsk, seen: Seen, asker: Seen) -> bool:
    """Whether a request tells a tool call's result: by its id, by a text with the id in it, or, where nothing has an id, by going on."""
    ids = [message.answers for message in seen.spoken if message.answers]
    if ids:
        return ask.id in ids
    return seen.extends is asker or (len(ask.id) >= SHORT and any(ask.id in message.text for message in seen.spoken))


def _added(seen: Seen, before: Seen) -> list[Said]:
    """What of its messages is new after those of the call that it extends, and that call's reply."""
    if seen.asked.previous is not None:
        return seen.spoken
    added = seen.spoken[before.length :]
    return added[1:] if added and added[0].role == "assistant" else added


def _keep(known: "OrderedDict[Any, Any]", key: Any, value: Any) -> None:
    known[key] = value
    known.move_to_end(key)
    if len(known) > MOST_ENDED:
        known.popitem(last=False)
