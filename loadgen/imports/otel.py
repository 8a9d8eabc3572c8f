"""OpenTelemetry spans of generative AI: an OTLP JSON export, or the rows of Exgentic's agent traces.

    {"resourceSpans": [{"scopeSpans": [{"spans": [{"traceId": "..", "startTimeUnixNano": "..", "attributes": [..]}]}]}]}
    {"session_id": "..", "spans": [{"span_id": "..", "type": "llm_call", "start_time": "2026-05-18T09:27:45Z", "attributes": {..}}]}

(opentelemetry.io, semantic conventions for generative AI: gen_ai.operation.name, gen_ai.usage.input_tokens, output_tokens and
cache_read.input_tokens, and, where content is kept, gen_ai.input.messages and gen_ai.tool.definitions; huggingface.co, Exgentic/agent-
llm-traces-v2.) A trace or session is a query, and a span of a model a call; a span of a tool (`execute_tool`) is a tool call. Others and
failed ones are left out. A call whose messages begin with all of an earlier one's goes on there: the assistant's message behind them is
that call's reply, and the result of a tool call is its span's. Who waited for whom is told by times (trace.Agents). Tokens are known of
the whole prompt: messages share them by their length, those that were read before have what they had. Without content a prompt is one
text of its own: what it shares is not known.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec

from fanmark.agents.runtime import Author
from fanmark.loadgen.imports.trace import Agents, Trace, author_of, made, share_out
from fanmark.loadgen.recording import RecordedCall, Said, text_id

INFERS = ("chat", "text_completion", "generate_content", "llm_call", "call_llm")
CALLS_A_TOOL = ("execute_tool", "tool_call")
_RESULTS = ("tool_call_response", "tool_result")  # parts, as by the conventions and as others write them
_RESULT_KEYS = ("response", "result", "content")


@dataclass
class Span:
    """What is of use of a span."""

    trace: str
    what: str
    start_at: float
    end_at: float
    attributes: Mapping[str, Any]
    failed: bool


@dataclass
class Text:
    """A message by its text: what it says of itself, and how long it is."""

    id: str
    author: Author
    chars: int
    answers: str | None = None  # the id of the tool call whose result it is


def read(trace: Trace) -> Iterator[tuple[float, list[RecordedCall]]]:
    """Rows as they come; of an export, whose traces may lie anywhere, all at the end."""
    exported: dict[str, list[Span]] = {}
    for line in trace.lines():
        row = msgspec.json.decode(line)
        if not isinstance(row, dict):
            raise ValueError("holds no object")
        if "resourceSpans" in row:
            for span in _otlp(row):
                exported.setdefault(span.trace, []).append(span)
        elif isinstance(row.get("spans"), list):
            yield from _query(trace, [_row(str(row.get("session_id", "")), span) for span in row["spans"]])
        else:
            raise ValueError("has neither resourceSpans nor spans")
    for spans in exported.values():
        yield from _query(trace, spans)


def _otlp(export: Mapping[str, Any]) -> Iterator[Span]:
    for resource in export["resourceSpans"]:
        for scope in resource.get("scopeSpans", ()):
            for span in scope.get("spans", ()):
                attributes = {each["key"]: _plain(each.get("value", {})) for each in span.get("attributes", ())}
                times = [int(span[key]) / 1e9 for key in ("startTimeUnixNano", "endTimeUnixNano")]
                failed = span.get("status", {}).get("code") in (2, "STATUS_CODE_ERROR")
                what = str(attributes.get("gen_ai.operation.name", ""))
                yield Span(str(span.get("traceId", "")), what, times[0], times[1], attributes, failed)


def _row(session: str, span: Mapping[str, Any]) -> Span:
    attributes = span.get("attributes") or {}
    times = [_instant(str(span[key])) for key in ("start_time", "end_time")]
    what = str(span.get("type") or attributes.get("gen_ai.operation.name", ""))
    return Span(session, what, times[0], times[1], attributes, (span.get("status") or {}).get("code") in (2, "ERROR"))


def _instant(text: str) -> float:
    at = datetime.fromisoformat(text)
    return (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp()


def _plain(value: Mapping[str, Any]) -> Any:
    """An OTLP value."""
    if "intValue" in value:
        return int(value["intValue"])
    if "arrayValue" in value:
        return [_plain(each) for each in value["arrayValue"].get("values", ())]
    if "kvlistValue" in value:
        return {each["key"]: _plain(each["value"]) for each in value["kvlistValue"].get("values", ())}
    return next(iter(value.values()), None)


def _query(trace: Trace, spans: Iterable[Span]) -> Iterator[tuple[float, list[RecordedCall]]]:
    """The calls of one trace, if there are any."""
    kept = [s for s in spans if not s.failed and (_tokens(s) is not None or s.what in CALLS_A_TOOL)]
    kept.sort(key=lambda span: (span.start_at, span.end_at))
    reads = [_texts(span) for span in kept]
    if any(not texts for span, texts in zip(kept, reads, strict=True) if span.what not in CALLS_A_TOOL):
        trace.note("spans without gen_ai.input.messages: what their prompts share with others is not known")
    calls, agents, tools = list[RecordedCall](), Agents(), dict[str, int]()
    of: dict[int, int] = {}  # whose each call is
    for i, (span, texts) in enumerate(zip(kept, reads, strict=True)):
        tokens = _tokens(span)
        if tokens is None:
            tools[str(span.attributes.get("gen_ai.tool.call.id", ""))] = i + 1
            after = agents.after(span.start_at, None)
            calls.append(made(i + 1, after, span.start_at, span.end_at, kind="tool_call", role=_role(span)))
        else:
            parent = _parent(kept, reads, i)
            own = parent + 1 if parent is not None and kept[parent].end_at <= span.start_at else None
            messages = _messages(texts, tokens[0], calls, reads, parent, own, tools, f"{span.trace}/{i}")
            after = agents.after(span.start_at, own)
            calls.append(
                made(
                    i + 1,
                    after,
                    span.start_at,
                    span.end_at,
                    output_tokens=tokens[1],
                    cached_tokens=_cached(span, tokens[0]),
                    messages=messages,
                    role=_role(span),
                )
            )
            of[i + 1] = of.get(own or 0, i)
        agents.made(span.start_at, span.end_at, i + 1, of.get(i + 1, i))
    if any(call.kind == "call" for call in calls):
        yield calls[0].due_at, calls


def _tokens(span: Span) -> tuple[int, int] | None:
    """How many a model's span read and wrote; None of another's, and where it read or wrote none."""
    if span.what and span.what not in INFERS:
        return None
    read, wrote = (_count(span, f"{kind}_tokens") or 0 for kind in ("input", "output"))
    return (read, wrote) if read and wrote else None


def _cached(span: Span, read: int) -> int | None:
    """How much of a prompt the cache served; None where that is not told, or counts what the prompt's length leaves out."""
    cached = _count(span, "cache_read.input_tokens")
    return None if cached is None or cached > read else cached


def _count(span: Span, name: str) -> int | None:
    count = span.attributes.get(f"gen_ai.usage.{name}")
    return int(count) if isinstance(count, int | float | str) and str(count).isdigit() else None


def _role(span: Span) -> str:
    named = "gen_ai.tool.name" if span.what in CALLS_A_TOOL else "gen_ai.agent.name"
    return str(span.attributes.get(named) or "agent")


def _texts(span: Span) -> list[Text]:
    """A prompt's messages, the tools' schemas first."""
    found = []
    for key, author in (("gen_ai.tool.definitions", "system"), ("gen_ai.system_instructions", "system")):
        if span.attributes.get(key):
            found.append(_text(author, span.attributes[key]))
    messages = span.attributes.get("gen_ai.input.messages") or []
    for message in msgspec.json.decode(messages) if isinstance(messages, str) else messages:
        author = message.get("role", "user")
        parts = message.get("parts") or [{"type": "text", "content": message.get("content", "")}]
        for part in [part for part in parts if part.get("type") in _RESULTS]:
            found.append(_text("tool", next((part[key] for key in _RESULT_KEYS if key in part), "")))
            found[-1].answers = str(part.get("id"))
        rest = [part for part in parts if part.get("type") not in _RESULTS]
        if rest:
            found.append(_text(author, rest))
    return found


def _text(author: str, said: Any) -> Text:
    text = said if isinstance(said, str) else msgspec.json.encode(said).decode()
    return Text(text_id(b"", f"{author} {text}"), author_of(author), max(1, len(text)))


def _parent(spans: Sequence[Span], reads: Sequence[Sequence[Text]], i: int) -> int | None:
    """The latest call before number i whose messages are the beginning of its own, of those the longest."""
    ids, best = [text.id for text in reads[i]], None
    for j in range(i):
        n = len(reads[j])
        if n and n < len(ids) and [text.id for text in reads[j]] == ids[:n] and (best is None or n >= len(reads[best])):
            best = j
    return best


def _messages(
    texts: Sequence[Text],
    tokens: int,
    calls: Sequence[RecordedCall],
    reads: Sequence[Sequence[Text]],
    parent: int | None,
    own: int | None,
    tools: Mapping[str, int],
    unique: str,
) -> list[Said]:
    """The prompt. What it shares with its parent is as long as it was there; what is new shares what is left of the tokens."""
    if not texts:
        return [Said(text_id(b"", unique), tokens)]
    found: list[Said] = list(calls[parent].messages or []) if parent is not None else []
    new = list(texts[len(reads[parent]) :] if parent is not None else texts)
    left = tokens - sum(said.tokens for said in found)
    if own is not None and new and new[0].author == "assistant" and left > (calls[own - 1].output_tokens or 0):
        found.append(Said("", calls[own - 1].output_tokens or 0, "assistant", own))
        left -= found[-1].tokens
        new = new[1:]
    if left < len(new):  # its tokens were counted otherwise, or its context was cut
        return (
            _messages(texts, tokens, calls, reads, None, None, {}, unique)
            if found
            else [Said(text_id(b"", unique), tokens)]
        )
    for text, share in zip(new, share_out(left, [text.chars for text in new]), strict=True):
        source = tools.get(text.answers) if text.answers is not None else None
        found.append(Said("" if source else text.id, share, text.author, source))
    if not new and left:
        found.append(Said(text_id(b"", f"{unique} rest"), left))
    return found
