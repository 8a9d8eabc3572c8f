"""What becomes of what passes: each exchange a call or a tool call, calls together queries, queries records.

It stands beside the way of the bytes: it is handed copies, and what fails here fails no request.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from fanmark.loadgen.call_record import take
from fanmark.loadgen.costs import resources
from fanmark.loadgen.errors import CallError
from fanmark.loadgen.health import ClientState
from fanmark.loadgen.lanes.http import HttpError
from fanmark.loadgen.lanes.mcp_model import ToolProtocolError
from fanmark.loadgen.lanes.mcp_session import result_of
from fanmark.loadgen.lanes.sse import Reply, parse_body, reply_of
from fanmark.loadgen.recording import text_id
from fanmark.loadgen.records import Journal
from fanmark.loadgen.run_clock import RunClock
from fanmark.loadgen.tally import Tally
from fanmark.loadgen.tap.asked import Asked, asked_of, ids_text
from fanmark.loadgen.tap.frames import UNTOLD, Beat, Began, Ended, Frame, More
from fanmark.loadgen.tap.grouping import Grouping
from fanmark.loadgen.tap.ids import METHODS
from fanmark.loadgen.tap.record import Sizes, TappedCall, blocks, of_query, settle, told_of
from fanmark.loadgen.tap.replies import parser_of, whole_reply
from fanmark.loadgen.tap.seen import Answer, Group, Seen
from fanmark.servers import mcp_codec as codec

TAPPED, UNATTRIBUTED = "tapped", "unattributed"
TARGET, LANE = "default", "tap"
_MOST_ROLES = 64  # system prompts that are told apart


class _Under:
    """A call under way: who it is, and what reads its reply."""

    __slots__ = ("api", "body", "parser", "reader", "seen", "stream")

    def __init__(self, seen: Seen, api: str) -> None:
        self.seen = seen
        self.api = api
        self.parser, self.reader = parser_of(api)
        self.body: list[tuple[float, bytes]] = []
        self.stream = False


class Recorder:
    """Takes in what the carrier tells, and writes each query down as it ends. `carrier` is how that last fared. `models` counts what models
    were asked for, `unread` requests that could not be read, `untold` those that the carrier did not tell all of, `others` MCP messages
    that are no tool calls."""

    def __init__(
        self,
        grouping: Grouping,
        tally: Tally,
        journal: Journal,
        clock: RunClock,
        salt: bytes,
        *,
        keep_text: bool = False,
    ) -> None:
        self.grouping = grouping
        self.models: Counter[str] = Counter()
        self.attributed: Counter[tuple[str, str]] = Counter()  # calls, by kind and method
        self.unread = self.others = self.passed = self.untold = self.by_time = 0
        self.written: Counter[str] = Counter()  # queries, by arm
        self.sizes = Sizes()
        self.carrier = ClientState()
        self._tally = tally
        self._journal = journal
        self._clock = clock
        self._salt = salt
        self._keep_text = keep_text
        self._under_way: dict[int, _Under] = {}
        self._roles: dict[str, str] = {}
        self._told: dict[Group, None] = {}  # queries that the tally knows of

    def take(self, frame: Frame) -> None:
        """What passed."""
        match frame:
            case Began():
                self._began(frame)
            case More():
                self._more(frame)
            case Ended():
                self._ended(frame)
            case Beat():
                self.carrier, self.passed, self.untold = frame.state, frame.passed, frame.untold
                self._tally.clients[0] = frame.state

    def _began(self, began: Began) -> None:
        began.came_at -= self._clock.origin_s
        seen = self._tool_call(began) if began.api == "mcp" else self._infer(began)
        if seen is not None:
            self._under_way[began.n] = _Under(seen, began.api)
            self._tally.call_started(seen.record)
            self._count_queries()

    def _infer(self, began: Began) -> Seen | None:
        asked = asked_of(began.api, began.body)
        if asked is None:
            self.unread += 1
            return None
        digest = blake2b(began.body, digest_size=16).digest()
        seen = self.grouping.call(began.n, began.came_at, began.headers, asked, digest)
        self.models[asked.model or "?"] += 1
        seen.record = self._call(began, "call", self._role(asked))
        seen.record.api, seen.record.samples = began.api, asked.samples
        before = seen.extends.record if seen.extends is not None else None
        seen.record.messages = told_of(self._salt, asked.messages, before.messages if before is not None else [])
        seen.record.blocks = blocks(self._salt, asked.messages)
        if self._keep_text:
            seen.record.prompt = [(m.role, m.content) for m in asked.messages]
        return seen

    def _tool_call(self, began: Began) -> Seen | None:
        try:
            message = codec.decode(began.body)
        except codec.ProtocolError:
            self.unread += 1
            return None
        if not isinstance(message, codec.Request) or message.method != "tools/call":
            self.others += 1
            return None
        name, arguments, meta = (message.params.get(key) for key in ("name", "arguments", "_meta"))
        inner = meta if isinstance(meta, dict) else {}
        told = {k: v for k, v in inner.items() if k in ("traceparent", "baggage") and isinstance(v, str)}
        tool = name if isinstance(name, str) else "?"
        given = arguments if isinstance(arguments, dict) else {}
        seen = self.grouping.tool_call(began.n, began.came_at, {**told, **began.headers}, tool, given)
        asker = seen.caller or next(iter(seen.after), None)
        seen.record = self._call(began, "tool_call", asker.record.role if asker is not None else "agent")
        seen.record.api, seen.record.tool = "mcp", tool
        return seen

    def _call(self, began: Began, kind: Any, role: str) -> TappedCall:
        target = TARGET if kind == "call" else None
        return TappedCall(
            query=0, arm=TAPPED, call=0, after=[], kind=kind, role=role, round=1, target=target, due_at=began.came_at,
            lane=LANE if kind == "call" else None,
        )  # fmt: skip

    def _role(self, asked: Asked) -> str:
        """Agents are told apart by their system prompts."""
        system = next((text_id(self._salt, m.content) for m in asked.messages if m.role == "system"), "")
        if system not in self._roles and len(self._roles) >= _MOST_ROLES:
            return "agent-other"
        return self._roles.setdefault(system, f"agent-{len(self._roles) + 1}")

    def _more(self, more: More | Ended) -> None:
        under = self._under_way.get(more.n)
        if under is not None and more.reads:
            under.stream = more.status < 300 and "event-stream" in more.content_type
            reads = [(at - self._clock.origin_s, data) for at, data in more.reads]
            if under.stream and under.api != "mcp":
                under.parser.feed(reads)
            else:
                under.body += reads

    def _ended(self, ended: Ended) -> None:
        self._more(ended)
        under = self._under_way.pop(ended.n, None)
        if under is None:
            return
        call: TappedCall = under.seen.record
        call.sent_at = None if ended.sent_at is None else ended.sent_at - self._clock.origin_s
        call.connect_s, call.done_at = ended.connect_s, ended.done_at - self._clock.origin_s
        said = Answer(failed=True)
        try:
            left = ended.error == "cancelled" and under.stream and under.parser.is_whole  # after it had had everything
            if ended.error is not None and not left:
                raise CallError(ended.error, "")
            if ended.status >= 400:
                raise HttpError(ended.status, "")
            if call.kind == "tool_call":
                said = Answer(_result(call, ended.content_type, under))
            else:
                reply, id = _reply(under, call.done_at)
                take(call, reply)
                said = Answer(ids_text(reply.token_ids) if reply.token_ids else reply.text, reply.asks, id=id)
        except CallError as e:
            call.error = _tool_error(e) if call.kind == "tool_call" else e.kind
            call.message = f"HTTP {ended.status}" if ended.status >= 400 else None
        if self._keep_text:
            call.reply = said.text
        self.grouping.end(under.seen, call.done_at, said)
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

    def write(self, groups: Sequence[Group]) -> None:
        """Writes down queries that have ended."""
        for group in groups:
            self.grouping.closed.remove(group)
            self._write(group)

    def _write(self, group: Group) -> None:
        method = group.attributed
        arm = TAPPED if method != "none" else UNATTRIBUTED
        if group not in self._told:
            self._tally.query_started(arm)
        self._told.pop(group, None)
        number = self.written[arm]
        self.written[arm] += 1
        calls = settle(group, number, arm, self.sizes, self._salt)
        query = of_query(group, number, arm, self._salt, calls)
        query.resources = resources(query.needed, query.due_at, query.done_at, {}, query.retried)
        for call in query.calls:
            self.attributed[call.kind, method] += 1
            self.by_time += isinstance(call, TappedCall) and call.by_time
            self._tally.call_told(call)
        for call in query.retried:
            self._tally.call_retried(call)
        self._tally.query_finished(query)
        self._journal.write(query)
        group.release()

    def shares(self) -> Mapping[str, Any]:
        """How calls and tool calls were attributed, by method."""
        return {
            kind: {method: self.attributed[kind, method] for method in METHODS if self.attributed[kind, method]}
            for kind in ("call", "tool_call")
        }


def _reply(under: _Under, done_at: float) -> tuple[Reply, str | None]:
    """The reply, and its id where it is told again. Raises CallError."""
    try:
        if under.stream:
            reply = under.parser.reply(done_at)
            if under.reader is None:
                return reply, None
            reply.finish = under.reader.finish or reply.finish
            return reply, under.reader.id
        body = b"".join([data for _, data in under.body])
        done_at = under.body[-1][0] if under.body else done_at
        if under.api in ("chat", "completions"):
            return parse_body(body, done_at), None
        chunk, id = whole_reply(under.api, body)
        return reply_of(chunk, done_at), id
    except (TypeError, AttributeError, ValueError) as e:
        raise CallError("bad_reply", str(e)) from None


def _result(call: TappedCall, content_type: str, under: _Under) -> str:
    """What a tool said. Raises CallError."""
    try:
        reader = codec.ReplyReader(content_type)
        messages = reader.feed(b"".join([data for _, data in under.body])) + reader.end()
    except codec.ProtocolError as e:
        raise ToolProtocolError(str(e)) from None
    answer = next((m for m in messages if isinstance(m, codec.Result | codec.Failure)), None)
    if not isinstance(answer, codec.Result):
        raise ToolProtocolError("no result")
    result = result_of(answer.result, "")
    call.tool_error, call.bytes, call.queued_s = result.is_error, result.bytes, result.queued_s
    return result.text


def _tool_error(error: CallError) -> str:
    if isinstance(error, ToolProtocolError) or error.kind in ("cancelled", UNTOLD):
        return error.kind
    return "tool_transport"
