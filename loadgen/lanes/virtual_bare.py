"""The virtual lane without words: messages and answers are token ids that stand for nothing, of the lengths that are asked for.

An engine sees lengths, and which prompts begin alike; both are those of the lane with words (virtual.py), so every stamp is the same, and a
third of the work is left out. For searches that simulate much and keep sums alone: no token gaps, no text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from fanmark.agents.runtime import Author
from fanmark.loadgen.lanes.sse import Reply, Usage
from fanmark.loadgen.lanes.virtual import Service, VirtualEndpoint
from fanmark.loadgen.prompts import Part, Text
from fanmark.loadgen.scenario import Scenario, Target
from fanmark.servers.answers import Answer
from fanmark.servers.engine.events import Event
from fanmark.servers.engine.prompt import Prompt
from fanmark.servers.openai_api import Ask


def has_no_words(scenario: Scenario) -> bool:
    """Whether nothing in a scenario depends on what is said: lengths are forced, no model decides, no file asks."""
    return scenario.workload.lengths == "forced" and scenario.tools.decide == "script" and not scenario.questions


class _Ids:
    """Token ids of which the first is nobody else's, so that no two messages begin alike."""

    def __init__(self) -> None:
        self._given = 10_000_000
        self._tail: list[int] = []

    def fresh(self, tokens: int) -> list[int]:
        self._given += 1
        if len(self._tail) < tokens:
            self._tail = list(range(2 * tokens))
        return [self._given, *self._tail[: tokens - 1]]


class Marks:
    """What a tool says, in place of a result of so many tokens."""

    def text(self, tokens: int, seed: str) -> str:
        return f"{tokens} tokens of {seed}"


class BarePrompts:
    """Makes each message once; a query's own are dropped with it."""

    exact = True

    def __init__(self, ids: _Ids) -> None:
        self._ids = ids
        self._of: dict[str, dict[tuple[str, int], Part]] = {}
        self._results: dict[str, list[int]] = {}

    async def part(self, text: Text) -> Part:
        parts = self._of.setdefault("/".join(text.seed.split("/", 2)[:2]), {})
        part = parts.get((text.seed, text.tokens))
        if part is None:
            begun = [i for each in text.begins for i in self._begun(parts, *each)][: text.tokens]
            rest = text.tokens - len(begun)
            part = parts[text.seed, text.tokens] = Part([*begun, *(self._ids.fresh(rest) if rest else ())], text.tokens)
        return part

    def _begun(self, parts: dict[tuple[str, int], Part], seed: str, tokens: int) -> Sequence[int]:
        """The ids of a beginning; no message is named as it is."""
        key = f"{seed}/begins", tokens
        if key not in parts:
            parts[key] = Part(self._ids.fresh(tokens), tokens)
        return parts[key].content  # type: ignore[return-value]  # all are ids

    def forget(self, seed: str) -> None:
        self._of.pop(seed, None)

    async def reply_part(self, author: Author, text: str, ids: list[int] | None) -> Part:
        """A reply's own ids; the same mark of a tool the same ids."""
        if ids is None:
            ids = self._results.get(text)
            if ids is None:
                if len(self._results) > 10_000:
                    self._results.clear()
                ids = self._results[text] = self._ids.fresh(int(text.partition(" ")[0]))
        return Part(ids, len(ids))

    async def reply_size(self, author: Author, text: str) -> None:
        return None

    def minimum(self, author: Author, first: bool) -> int:
        return 1


class BareEndpoint(VirtualEndpoint):
    """Of a scenario that has no words."""

    def __init__(self, name: str, config: Target, service: Service, tool_calls: int = 1) -> None:
        super().__init__(name, config, service, tool_calls)
        self._ids = _Ids()
        self.prompts = BarePrompts(self._ids)

    def _parts(self, body: Mapping[str, Any]) -> list[tuple[list[int], bytes]]:
        if "prompt" in body:
            return [(ids, b"") for ids in body["prompt"]]
        parts = [self._schemas()] if "tools" in body else []
        return parts + [(message["content"], b"") for message in body["messages"]]

    def _answers(self, ask: Ask, prompt: Prompt, parts: Sequence[tuple[list[int], bytes]]) -> list[Answer]:
        room = self._limits.max_model_len - len(prompt)
        tokens = room if ask.max_tokens is None else min(ask.max_tokens, room)
        thought = 0 if ask.thinking is None or ask.thinking.tokens is None else min(ask.thinking.tokens, tokens)
        return [Answer(self._ids.fresh(tokens), [], "length", "", None, thought) for _ in range(ask.n)]

    def _reply(self, ask: Ask, prompt_tokens: int, answers: Sequence[Answer], events: Sequence[Event]) -> Reply:
        """Stamps and counts. Ids are given back as one list that stays the same object, by which the engine knows them again."""
        ids = answers[0].ids if len(answers) == 1 else [i for answer in answers for i in answer.ids]
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": len(ids),
            "prompt_tokens_details": {"cached_tokens": events[0].cached_tokens},
        }
        return Reply(
            text="",
            token_ids=ids,
            first_at=min(event.first_at for event in events),
            answer_at=None,
            done_at=max(event.at for event in events),
            usage=msgspec.convert(usage, Usage),
            finish="length",
            gaps={},
            coalesced=0,
        )
