"""What becomes of what passes: each exchange a call or a tool call, calls together queries, queries records.

It stands beside the way of the bytes: it is handed copies, and what fails here fails no request.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any

from fanmark.loadgen.call_record import take
from fanmark.loadgen.costs import resources
from fanmark.loadgen.errors import CallError
from fanmark.loadgen.lanes.http import HttpError
from fanmark.loadgen.lanes.mcp_model import ToolProtocolError
from fanmark.loadgen.lanes.mcp_session import result_of
from fanmark.loadgen.lanes.sse import Reply, parse_body, reply_of
from fanmark.loadgen.recording import text_id
from fanmark.loadgen.records import Journal
from fanmark.loadgen.tally import Tally
from fanmark.loadgen.tap.asked import Asked, asked_of, ids_text
from fanmark.loadgen.tap.grouping import Grouping
from fanmark.loadgen.tap.ids import METHODS
from fanmark.loadgen.tap.record import Sizes, TappedCall, blocks, of_query, settle, told_of
from fanmark.loadgen.tap.replies import parser_of, whole_reply
from fanmark.loadgen.tap.seen import Answer, Group, Seen
from fanmark.loadgen.tap.wire import Exchange
from fanmark.servers import mcp_codec as codec

TAPPED, UNATTRIBUTED = "tapped", "unattributed"
TARGET, LANE = "default", "tap"
_MOST_ROLES = 64  # system prompts that are told apart


class _Under:
    """A call under way: who it is, and what reads its reply."""

    __slots__ = ("body", "parser", "reader", "seen", "stream")

    def __init__(self, seen: Seen, api: str) -> None:
        self.seen = seen
        self.parser, self.reader = parser_of(api)
        self.body: list[tuple[float, bytes]] = []
        self.stream = False


class Recorder:
    """Takes in exchanges, and writes each query down as it ends. `models` counts what models were asked for, `unread` requests that could
    not be read, `others` MCP messages that are no tool calls."""

    def __init__(
        self,
        grouping: Grouping,
        tally: Tally,
        journal: Journal,
        now: Callable[[], float],
        salt: bytes,
        *,
        keep_text: bool = False,
    ) -> None:
        self.grouping = grouping
        self.models: Counter[str] = Counter()
        self.attributed: Counter[tuple[str, str]] = Counter()  # calls, by kind and method
        self.unread = self.others = self.by_time = 0
        self.written: Counter[str] = Counter()  # queries, by arm
        self.sizes = Sizes()
        self._tally = tally
        self._journal = journal
        self._now = now
        self._salt = salt
        self._keep_text = keep_text
        self._n = 0
        self._roles: dict[str, str] = {}
        self._told: dict[Group, None] = {}  # queries that the tally knows of

    def began(self, exchange: Exchange) -> None:
        """A request is on its way."""
        self._n += 1
        if exchange.api == "mcp":
            self._tool_call(exchange)
            return
        asked = asked_of(exchange.api, exchange.body)
        if asked is None:
            self.unread += 1
            return
        digest = blake2b(exchange.body, digest_size=16).digest()
        seen = self.grouping.call(self._n, exchange.came_at, exchange.headers, asked, digest)
        self.models[asked.model or "?"] += 1
        seen.record = self._call(exchange, "call", self._role(asked))
        seen.record.api, seen.record.samples = exchange.api, asked.samples
        seen.record.messages = told_of(self._salt, asked.messages)
        seen.record.blocks = blocks(self._salt, asked.messages)
        if self._keep_text:
            seen.record.prompt = [(m.role, m.content) for m in asked.messages]
        self._under_way(exchange, seen)

    def _tool_call(self, exchange: Exchange) -> None:
        try:
            message = codec.decode(exchange.body)
        except codec.ProtocolError:
            self.unread += 1
            return
        if not isinstance(message, codec.Request) or message.method != "tools/call":
            self.others += 1
            return
        name, arguments, meta = (message.params.get(key) for key in ("name", "arguments", "_meta"))
        told = (
            {k: v for k, v in meta.items() if k in ("traceparent", "baggage") and isinstance(v, str)}
            if isinstance(meta, dict)
            else {}
        )
        tool = name if isinstance(name, str) else "?"
        given = arguments if isinstance(arguments, dict) else {}
        seen = self.grouping.tool_call(self._n, exchange.came_at, {**told, **exchange.headers}, tool, given)
        role = (
            seen.caller.record.role if seen.caller is not None else seen.after[0].record.role if seen.after else "agent"
        )
        seen.record = self._call(exchange, "tool_call", role)
        seen.record.api, seen.record.tool = "mcp", tool
        self._under_way(exchange, seen)

    def _call(self, exchange: Exchange, kind: Any, role: str) -> TappedCall:
        target = TARGET if kind == "call" else None
        return TappedCall(
            query=0, arm=TAPPED, call=0, after=[], kind=kind, role=role, round=1, target=target, due_at=exchange.came_at,
            lane=LANE if kind == "call" else None,
        )  # fmt: skip

    def _under_way(self, exchange: Exchange, seen: Seen) -> None:
        exchange.seen = _Under(seen, exchange.api)
        self._tally.call_started(seen.record)
        self._count_queries()

    def _role(self, asked: Asked) -> str:
        """Agents are told apart by their system prompts."""
        system = next((text_id(self._salt, m.content) for m in asked.messages if m.role == "system"), "")
        if system not in self._roles and len(self._roles) >= _MOST_ROLES:
            return "agent-other"
        return self._roles.setdefault(system, f"agent-{len(self._roles) + 1}")

    def read(self, exchange: Exchange) -> None:
        """More of a reply."""
        under: _Under | None = exchange.seen
        if under is not None:
            under.stream = exchange.status < 300 and "event-stream" in exchange.reply.get("content-type", "")
            if under.stream and exchange.api != "mcp":
                under.parser.feed(exchange.reads)
            else:
                under.body += exchange.reads
        exchange.reads.clear()

    def ended(self, exchange: Exchange) -> None:
        """It has ended, one way or another."""
        self.read(exchange)
        under: _Under | None = exchange.seen
        if under is None:
            return
        call: TappedCall = under.seen.record
        call.sent_at, call.connect_s = exchange.sent_at, exchange.connect_s
        call.done_at = exchange.done_at
        said = Answer(failed=True)
        try:
            if exchange.error is not None and not (
                exchange.error == "cancelled" and under.stream and under.parser.is_whole
            ):
                raise CallError(exchange.error, "")
            if exchange.status >= 400:
                raise HttpError(exchange.status, "")
            if call.kind == "tool_call":
                said = Answer(_result(call, exchange, under))
            else:
                reply, id = _reply(exchange, under)
                take(call, reply)
                said = Answer(ids_text(reply.token_ids) if reply.token_ids else reply.text, reply.asks, id=id)
        except CallError as e:
            call.error = _tool_error(e, exchange) if call.kind == "tool_call" else e.kind
            call.message = f"HTTP {exchange.status}" if exchange.status >= 400 else None
        if self._keep_text:
            call.reply = said.text
        self.grouping.end(under.seen, call.done_at or self._now(), said)
        exchange.seen = None
        self._tally.call_landed(call)
        self._count_queries()

    def _count_queries(self) -> None:
        """Tells the tally of queries as soon as they are known to be some; of two that were one, one is taken back."""
        for group in [group for group in self._told if not group.over and group not in self.grouping.open]:
            del self._told[group]
            self._tally.arms[TAPPED].started -= 1
        for group in self.grouping.open:
            if group not in self._told and group.attributed != "none":
                self._told[group] = None
                self._tally.query_started(TAPPED)

    def look(self) -> None:
        """Writes down the queries that have ended by now."""
        self.grouping.idle(self._now())
        self.write_closed()

    def write_closed(self) -> None:
        """Writes down the queries that have ended."""
        closed, self.grouping.closed = self.grouping.closed, []
        for group in closed:
            self._write(group)

    def _write(self, group: Group) -> None:
        method = group.attributed
        arm = TAPPED if method != "none" else UNATTRIBUTED
        if group not in self._told:
            self._tally.query_started(arm)
        self._told.pop(group, None)
        number = self.written[arm]
        self.written[arm] += 1
        calls = settle(group, number, arm, self.sizes)
        query = of_query(group, number, arm, self._salt, calls)
        query.resources = resources(query.needed, query.due_at, query.done_at, {}, query.retried)
        for call in query.calls:
            self.attributed[call.kind, method] += 1
            self._tally.call_told(call)
        for call in query.retried:
            self._tally.call_retried(call)
        self._tally.query_finished(query)
        self._journal.write(query)

    def shares(self) -> Mapping[str, Any]:
        """How calls and tool calls were attributed, by method."""
        return {
            kind: {method: self.attributed[kind, method] for method in METHODS if self.attributed[kind, method]}
            for kind in ("call", "tool_call")
        }


def _reply(exchange: Exchange, under: _Under) -> tuple[Reply, str | None]:
    """The reply, and its id where it is told again. Raises CallError."""
    try:
        if under.stream:
            return under.parser.reply(), under.reader.id if under.reader is not None else None
        body, done_at = b"".join([data for _, data in under.body]), under.body[-1][0] if under.body else 0.0
        if exchange.api in ("chat", "completions"):
            return parse_body(body, done_at), None
        chunk, id = whole_reply(exchange.api, body)
        return reply_of(chunk, done_at), id
    except (TypeError, AttributeError, ValueError) as e:
        raise CallError("bad_reply", str(e)) from None


def _result(call: TappedCall, exchange: Exchange, under: _Under) -> str:
    """What a tool said. Raises CallError."""
    try:
        reader = codec.ReplyReader(exchange.reply.get("content-type", ""))
        messages = reader.feed(b"".join([data for _, data in under.body])) + reader.end()
    except codec.ProtocolError as e:
        raise ToolProtocolError(str(e)) from None
    answer = next((m for m in messages if isinstance(m, codec.Result | codec.Failure)), None)
    if not isinstance(answer, codec.Result):
        raise ToolProtocolError("no result")
    result = result_of(answer.result, "")
    call.tool_error, call.bytes, call.queued_s = result.is_error, result.bytes, result.queued_s
    return result.text


def _tool_error(error: CallError, exchange: Exchange) -> str:
    if isinstance(error, ToolProtocolError) or error.kind == "cancelled":
        return error.kind
    return "tool_transport"
