"""The target's tokenizer: asked over HTTP (`/tokenize`), or, for our own stub, the same code in process."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from fanmark.loadgen.errors import CallError
from fanmark.servers.tokenizer import Tokenizer as StubTokenizer

_WORDS_WANTED = 256
_AT_ONCE = 32


class Poster(Protocol):
    """What carries a request to the target: a lane."""

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]: ...


class RemoteTokenizer:
    """vLLM's /tokenize. Raises CallError where it is not there."""

    def __init__(self, lane: Poster, root: str, model: str, headers: Mapping[str, str]) -> None:
        self._lane = lane
        self._url = f"{root}/tokenize"
        self._model = model
        self._headers = {**headers, "Content-Type": "application/json"}
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def _ask(self, **fields: Any) -> dict[str, Any]:
        body = json.dumps({"model": self._model, **fields}).encode()
        async with self._slots:
            status, reply = await self._lane.post(self._url, body, self._headers)
        if status != 200:
            raise CallError("bad_reply", f"/tokenize: HTTP {status}: {reply[:200].decode(errors='replace')}")
        found: dict[str, Any] = msgspec.json.decode(reply)
        return found

    async def encode(self, text: str) -> list[int]:
        """Token ids of a bare text."""
        return list((await self._ask(prompt=text, add_special_tokens=False))["tokens"])

    async def count_chat(self, messages: Sequence[dict[str, str]], tools: Sequence[dict[str, Any]] = ()) -> int:
        """Tokens of a chat prompt as the target will count them."""
        fields: dict[str, Any] = {"messages": list(messages)} | ({"tools": list(tools)} if tools else {})
        return int((await self._ask(**fields))["count"])


class LocalTokenizer:
    """The stub's additive tokenizer, which needs no round trip."""

    def __init__(self, tokenizer: StubTokenizer) -> None:
        self._tokenizer = tokenizer

    def count(self, text: str) -> int:
        """Tokens of a bare text; the parts of a text have as many as the whole."""
        return self._tokenizer.count(text)

    async def encode(self, text: str) -> list[int]:
        """Token ids of a bare text."""
        return self._tokenizer.encode(text)

    async def count_chat(self, messages: Sequence[dict[str, str]], tools: Sequence[dict[str, Any]] = ()) -> int:
        """Tokens of the messages; tools are the JSON text of their list."""
        texts = [message["content"] for message in messages] + ([json.dumps(list(tools))] if tools else [])
        return sum(len(self._tokenizer.encode(text)) for text in texts)


async def one_token_words(tokenizer: RemoteTokenizer, words: Sequence[str]) -> dict[str, int]:
    """Words that, after a space, are one token each, with their ids; up to 256. Raises CallError if there are fewer than 16."""
    found: dict[str, int] = {}
    first = len(await tokenizer.encode("word"))
    for start in range(0, len(words), _AT_ONCE):
        batch = words[start : start + _AT_ONCE]
        for word, ids in zip(batch, await asyncio.gather(*(tokenizer.encode(f"word {w}") for w in batch)), strict=True):
            if len(ids) == first + 1:
                found[word] = ids[-1]
        if len(found) >= _WORDS_WANTED:
            break
    if len(found) < 16:
        raise CallError("bad_reply", f"only {len(found)} of {len(words)} common words are one token each")
    return found
