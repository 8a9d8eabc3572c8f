"""Keys and other secret values, kept out of every text that is shown or written. Pure, but for the lane that it stands before."""

import json
import re
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import quote, quote_plus

from fanmark.loadgen.errors import CallError
from fanmark.loadgen.lanes.http import HttpError, Sent
from fanmark.loadgen.lanes.sse import Reply

REDACTED = "[redacted]"
_WORD_BELOW = 8  # a shorter value is taken out as a word only: as a part of words it would tear up every text
_LEAST_PREFIX = 6  # characters of a value that was cut off by the end of its text
_SECRET_WORDS = frozenset(
    [
        "auth",
        "authorization",
        "apikey",
        "cookie",
        "credential",
        "credentials",
        "key",
        "password",
        "secret",
        "sig",
        "signature",
        "token",
    ]
)


def is_secret_name(name: str) -> bool:
    """Whether a header or query parameter of this name usually holds a secret."""
    return bool(_SECRET_WORDS & set(re.split(r"[-_. ]", name.lower())))


class Secrets:
    """Values that no text may show. A server that says one back does so as it stands, in JSON, in a URL, or cut short."""

    def __init__(self) -> None:
        self._values: set[str] = set()
        self._pattern: re.Pattern[str] | None = None

    def __bool__(self) -> bool:
        return bool(self._values)

    def add(self, value: str) -> None:
        """From now on `value` is redacted, also as it stands in JSON and in a URL."""
        if not value:
            return
        self._values |= {value, quote(value), quote(value, safe=""), quote_plus(value), json.dumps(value)[1:-1]}
        longest_first = sorted(self._values, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(_findable, longest_first)))

    def redact(self, text: str) -> str:
        """The text without any of the values."""
        if self._pattern is None:
            return text
        text = self._pattern.sub(REDACTED, text)
        bare = text.rstrip("'\". ")
        for value in self._values:
            for n in range(min(len(value) - 1, len(bare)), _LEAST_PREFIX - 1, -1):
                if bare.endswith(value[:n]):
                    return f"{bare[:-n]}{REDACTED}{text[len(bare) :]}"
        return text

    def clean(self, value: Any) -> Any:
        """A JSON value with every text in it redacted."""
        if isinstance(value, dict):
            return {k: self.clean(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.clean(v) for v in value]
        return self.redact(value) if isinstance(value, str) else value


def _findable(value: str) -> str:
    found = re.escape(value)
    return found if len(value) >= _WORD_BELOW else rf"(?<![A-Za-z0-9_]){found}(?![A-Za-z0-9_])"


class _Lane(Protocol):
    @property
    def name(self) -> str: ...

    async def send(
        self, url: str, body: bytes, headers: Mapping[str, str], *, stream: bool, timeout_s: float, sent: Sent
    ) -> Reply: ...

    async def get(self, url: str, headers: Mapping[str, str], *, timeout_s: float = ...) -> tuple[int, bytes]: ...

    async def post(
        self, url: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float = ...
    ) -> tuple[int, bytes]: ...

    async def close(self) -> None: ...


class RedactedLane:
    """A lane whose errors and refusals say no secret, whatever the server or the proxy said."""

    def __init__(self, lane: _Lane, secrets: Secrets) -> None:
        self._lane = lane
        self._secrets = secrets

    @property
    def name(self) -> str:
        return self._lane.name

    async def send(
        self, url: str, body: bytes, headers: Mapping[str, str], *, stream: bool, timeout_s: float, sent: Sent
    ) -> Reply:
        """As the lane does."""
        try:
            reply = await self._lane.send(url, body, headers, stream=stream, timeout_s=timeout_s, sent=sent)
        except CallError as e:
            self._redact(e)
            raise
        if reply.finish not in (None, "stop", "length"):
            reply.finish = self._secrets.redact(str(reply.finish))
        return reply

    async def get(self, url: str, headers: Mapping[str, str], *, timeout_s: float = 10.0) -> tuple[int, bytes]:
        """As the lane does; what a refusal says is redacted."""
        try:
            return self._refusal(await self._lane.get(url, headers, timeout_s=timeout_s))
        except CallError as e:
            self._redact(e)
            raise

    async def post(
        self, url: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float = 30.0
    ) -> tuple[int, bytes]:
        """As the lane does; what a refusal says is redacted."""
        try:
            return self._refusal(await self._lane.post(url, body, headers, timeout_s=timeout_s))
        except CallError as e:
            self._redact(e)
            raise

    async def close(self) -> None:
        """Closes the lane."""
        await self._lane.close()

    def _refusal(self, reply: tuple[int, bytes]) -> tuple[int, bytes]:
        status, body = reply
        return (status, self._secrets.redact(body.decode(errors="replace")).encode()) if status >= 300 else reply

    def _redact(self, error: CallError) -> None:
        """In place, as a class of error may hold more than this file knows of. A refusal's body stays whole: parameters are read from it,
        and nothing shows it."""
        text = str(error)
        if isinstance(error, HttpError):  # its text was cut: a value may stand across the cut
            text = str(HttpError(error.status, self._secrets.redact(error.body)))
        error.args = (self._secrets.redact(text),)
