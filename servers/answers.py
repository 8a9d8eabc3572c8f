"""What the stub's model says: token ids known ahead, and the pieces in which a stream shows them.

Rules of the file:
1. Equal requests get equal answers: everything is drawn from the seed, the prompt's ids and the choice's number; a server's tool calls
   have ids of their own all the same.
2. Plain text is words of the vocabulary, so `encode(text) == ids`; texts of another kind are cut into as many pieces as tokens.
3. An answer that ends by itself ends with an end-of-sequence token, which counts as output and has no text, as on vLLM.
4. Reasoning comes first and has no closing token: `reasoning_tokens` + tokens of content = output tokens.
"""

import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from zlib import crc32

from fanmark.servers.body_fields import bad_value
from fanmark.servers.json_schema import SchemaError, draw_matching, draw_value
from fanmark.servers.openai_api import Ask, Form
from fanmark.servers.prompts import call_texts
from fanmark.servers.tokenizer import Tokenizer
from fanmark.servers.tool_choice import Tooling

_HASHED_IDS = 1 << 20


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long an answer is that is not forced: log-normal with this mean and coefficient of variation; None: `max_tokens`."""

    mean: float | None = None
    cv: float = 0.0
    unlimited: int = 256

    def draw(self, rng: Random, max_tokens: int | None) -> int | None:
        """Tokens after which the model ends by itself, or None: it goes on to `max_tokens`."""
        if self.mean is None:
            return self.unlimited if max_tokens is None else None
        if self.cv == 0:
            return max(1, round(self.mean))
        sigma = math.sqrt(math.log1p(self.cv**2))
        return max(1, round(self.mean * math.exp(rng.gauss(0, 1) * sigma - sigma * sigma / 2)))


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call of an answer; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice of a reply.

    `deltas[k]` is what a stream shows when token k is done, as JSON bytes: chat's delta object, or the text of a completion;
    b"" means nothing. The last one is never b"".
    """

    ids: list[int]
    deltas: list[bytes]
    finish: str
    content: str | None
    reasoning: str | None = None
    reasoning_tokens: int = 0
    calls: Sequence[Call] = ()
    stop_reason: str | int | None = None


class Speaker:
    """Makes answers; holds the words' pieces ready as bytes. `call_ids` draws the ids of tool calls, where no two may be the same."""

    def __init__(
        self, tokenizer: Tokenizer, lengths: Lengths, max_model_len: int, call_ids: Random | None = None
    ) -> None:
        self._tokenizer, self._lengths, self._max_model_len = tokenizer, lengths, max_model_len
        self._call_ids = call_ids
        words = tokenizer.words
        self._numbers = range(len(words))
        self.eos_id = len(words) + _HASHED_IDS
        self._first = {kind: [_piece(kind, word) for word in words] for kind in ("text", "content", "reasoning")}
        self._later = {kind: [_piece(kind, " " + word) for word in words] for kind in ("text", "content", "reasoning")}

    def answer(self, ask: Ask, prompt: Sequence[int], index: int) -> Answer:
        """The answer of one choice. Raises ApiError where a schema of the request cannot be met."""
        return self.answer_to(ask, len(prompt), crc32(prompt_data(prompt)), index)

    def answer_to(self, ask: Ask, prompt_tokens: int, crc: int, index: int) -> Answer:
        """The answer to a prompt of which only the length and the checksum (crc32 of `prompt_data`) are at hand."""
        rng = Random(_seed(ask.seed, crc, index))
        room = self._max_model_len - prompt_tokens
        limit = room if ask.max_tokens is None else min(ask.max_tokens, room)
        try:
            if ask.tooling is not None:
                return self._calling(ask, ask.tooling, rng, limit)
            if ask.form is not None:
                return self._formed(ask, ask.form, rng, limit)
        except SchemaError as error:
            raise bad_value(f"Failed to transform json schema into a grammar: {error}") from None
        return self._plain(ask, rng, limit)

    def _plain(self, ask: Ask, rng: Random, limit: int) -> Answer:
        end = None if ask.ignore_eos else ask.answer_tokens or self._lengths.draw(rng, ask.max_tokens)
        if end is not None:
            end = max(end, ask.min_tokens)
        ends = end is not None and end <= limit
        count = end if end is not None and ends else limit
        ids = rng.choices(self._numbers, k=count - ends)
        reasoning = self._reasoning_tokens(ask, count)
        reasoning = min(reasoning, len(ids))
        if ask.stop or ask.stop_token_ids:
            return self._stopped(ask, ids, reasoning, ends)
        decode = self._tokenizer.decode
        if ask.api == "completions":
            deltas = self._pieces("text", ids)
            content: str | None = decode(ids)
        else:
            deltas = self._pieces("reasoning", ids[:reasoning]) + self._pieces("content", ids[reasoning:])
            content = decode(ids[reasoning:]) if reasoning < len(ids) or not reasoning else None
        if ends:
            ids.append(self.eos_id)
            deltas.append(_nothing(ask))
        return Answer(
            ids=ids,
            deltas=deltas,
            finish="stop" if ends else "length",
            content=content,
            reasoning=decode(ids[:reasoning]) if reasoning else None,
            reasoning_tokens=reasoning,
        )

    def _pieces(self, kind: str, ids: Sequence[int]) -> list[bytes]:
        later = self._later[kind]
        pieces = [later[i] for i in ids]
        if pieces:
            pieces[0] = self._first[kind][ids[0]]
        return pieces

    @staticmethod
    def _reasoning_tokens(ask: Ask, count: int) -> int:
        if ask.thinking is None:
            return 0
        return int(count * ask.thinking.share) if ask.thinking.tokens is None else min(ask.thinking.tokens, count)

    def _stopped(self, ask: Ask, ids: list[int], reasoning: int, ends: bool) -> Answer:
        """A plain answer cut by `stop` or `stop_token_ids`, which are looked for in the content, not in the reasoning."""
        words = self._tokenizer.words
        body = ids[reasoning:]
        texts = [words[i] if place == 0 else " " + words[i] for place, i in enumerate(body)]
        reason: str | int | None = next((i for i in body[ask.min_tokens :] if i in ask.stop_token_ids), None)
        if reason is not None:
            place = next(k for k, i in enumerate(body) if k >= ask.min_tokens and i == reason)
            texts[place:] = [texts[place] if ask.include_stop else ""]
        pieces, stop = cut_at_stop(texts, ask.stop, ask.min_tokens - reasoning, include=ask.include_stop)
        reason = reason if stop is None else stop
        ids = ids[: reasoning + len(pieces)]
        kind = "text" if ask.api == "completions" else "content"
        deltas = self._pieces("reasoning", ids[:reasoning]) + [_piece(kind, piece) for piece in pieces]
        if ends and reason is None:
            ids.append(self.eos_id)
            deltas.append(_nothing(ask))
        return Answer(
            ids=ids,
            deltas=deltas,
            finish="length" if reason is None and not ends else "stop",
            content="".join(pieces) if pieces or not reasoning else None,
            reasoning=self._tokenizer.decode(ids[:reasoning]) if reasoning else None,
            reasoning_tokens=reasoning,
            stop_reason=reason,
        )

    def _formed(self, ask: Ask, form: Form, rng: Random, limit: int) -> Answer:
        """An answer held to a form; it ends when the form is complete, whatever `ignore_eos` says."""
        if form.schema is not None:
            text = json.dumps(draw_value(form.schema, rng, self._tokenizer.words), ensure_ascii=False)
        elif form.regex is not None:
            text = draw_matching(form.regex, rng)
        else:
            text = rng.choice(form.choice)
        kind = "text" if ask.api == "completions" else "content"
        ids = self._tokenizer.encode(text)
        pieces = split_evenly(text, len(ids))
        deltas = [_piece(kind, piece) for piece in pieces]
        body = _Body([*ids, self.eos_id], [*deltas, _nothing(ask)], finish="stop")
        shown = min(limit - self._reasoning_ahead(ask, len(body.ids)), len(pieces))
        return self._after_reasoning(ask, rng, limit, body, "".join(pieces[: max(0, shown)]), ())

    def _calling(self, ask: Ask, tooling: Tooling, rng: Random, limit: int) -> Answer:
        """An answer that calls tools. Cut by `max_tokens` before a call is whole, the call reads as text, as on vLLM."""
        encode = self._tokenizer.encode
        body = _Body([], [], finish="stop" if tooling.named else "tool_calls")
        text, calls, ends = "", [], []
        for number in range(tooling.calls):
            name, schema = rng.choice(tooling.candidates)
            arguments = json.dumps(draw_value(schema, rng, self._tokenizer.words), ensure_ascii=False)
            own = rng.getrandbits(64)
            id = own if self._call_ids is None else self._call_ids.getrandbits(64)
            call = Call(f"chatcmpl-tool-{id:016x}", name, arguments)
            head, _, tail = call_texts(name, arguments)
            first, middle, last = encode(head), encode(arguments), encode(tail)
            body.ids += [*first, *middle, *last]
            body.deltas += [b""] * (len(first) - 1) + [_call_opened(call, number)]
            body.deltas += [_call_argument(piece, number) for piece in split_evenly(arguments, len(middle))]
            body.deltas += [b""] * len(last)
            text += head + arguments + tail
            calls.append(call)
            ends.append(len(body.ids))
        body.ids.append(self.eos_id)
        body.deltas.append(b"{}")
        room = limit - self._reasoning_ahead(ask, len(body.ids))
        whole = [call for call, end in zip(calls, ends, strict=True) if end <= room]
        shown = "" if whole else "".join(split_evenly(text, len(body.ids))[: max(0, room)])
        return self._after_reasoning(ask, rng, limit, body, shown, whole)

    def _reasoning_ahead(self, ask: Ask, body_tokens: int) -> int:
        """Reasoning tokens before a body of known length."""
        if ask.thinking is None:
            return 0
        share = ask.thinking.share
        return int(body_tokens * share / (1 - share)) if ask.thinking.tokens is None else ask.thinking.tokens

    def _after_reasoning(
        self, ask: Ask, rng: Random, limit: int, body: "_Body", content: str, calls: Sequence[Call]
    ) -> Answer:
        ahead = min(self._reasoning_ahead(ask, len(body.ids)), limit)
        thought = rng.choices(self._numbers, k=ahead)
        ids, deltas = thought + body.ids, self._pieces("reasoning", thought) + body.deltas
        cut = len(ids) > limit
        if cut:
            ids, deltas = ids[:limit], deltas[:limit]
            deltas[-1] = deltas[-1] or _nothing(ask)
        return Answer(
            ids=ids,
            deltas=deltas,
            finish="length" if cut else body.finish,
            content=None if ahead == limit else content,
            reasoning=self._tokenizer.decode(thought) if thought else None,
            reasoning_tokens=ahead,
            calls=calls,
        )


@dataclass(slots=True)
class _Body:
    ids: list[int]
    deltas: list[bytes]
    finish: str


def cut_at_stop(
    texts: Sequence[str], stops: Sequence[str], min_tokens: int, *, include: bool
) -> tuple[list[str], str | None]:
    """What a stream shows after each token, up to the first stop text, and that text (None: none came).

    A stop text is looked for after more than `min_tokens` tokens. Without `include` it is not shown, so the last
    len(longest stop) - 1 characters are held back until it is clear that they begin none.
    """
    held = 0 if include else max(map(len, stops), default=1) - 1
    pieces: list[str] = []
    full, shown = "", 0
    for place, text in enumerate(texts):
        before = len(full)
        full += text
        for stop in stops if place >= min_tokens else ():
            at = full.find(stop, max(0, before - len(stop) + 1))
            if at >= 0:
                return [*pieces, full[shown : at + len(stop) if include else at]], stop
        seen = max(shown, len(full) - held)
        pieces.append(full[shown:seen])
        shown = seen
    if pieces:
        pieces[-1] += full[shown:]
    return pieces, None


def split_evenly(text: str, parts: int) -> list[str]:
    """`text` in `parts` pieces whose lengths differ by one at most."""
    size = len(text)
    return [text[k * size // parts : (k + 1) * size // parts] for k in range(parts)]


def prompt_data(ids: Sequence[int]) -> bytes:
    """Token ids as 64-bit numbers: a prompt's answers are drawn from the crc32 of this, its parts end to end."""
    return array("q", ids).tobytes()


def _seed(seed: int | None, crc: int, index: int) -> int:
    return crc | (index << 32) | ((0 if seed is None else seed + (1 << 70)) << 64)


def _piece(kind: str, text: str) -> bytes:
    quoted = json.dumps(text, ensure_ascii=False).encode()
    return quoted if kind == "text" else b'{"%s":%s}' % (kind.encode(), quoted)


def _nothing(ask: Ask) -> bytes:
    return b'""' if ask.api == "completions" else b"{}"


def _call_opened(call: Call, number: int) -> bytes:
    opened = {"id": call.id, "type": "function", "index": number, "function": {"name": call.name}}
    return json.dumps({"content": None, "tool_calls": [opened]}, separators=(",", ":"), ensure_ascii=False).encode()


def _call_argument(piece: str, number: int) -> bytes:
    more = {"index": number, "function": {"arguments": piece}}
    return json.dumps({"content": None, "tool_calls": [more]}, separators=(",", ":"), ensure_ascii=False).encode()
