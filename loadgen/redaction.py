"""Keys and other secret values, kept out of every text that is shown or written. Pure, but for the lane that it stands before."""

import html
import re
from collections.abc import Mapping
from typing import Any, Protocol

from fanmark.loadgen.lanes.http import HttpError, Sent
from fanmark.loadgen.lanes.sse import Reply

REDACTED = "[redacted]"
_WORD_BELOW = 8  # a shorter value is taken out as a word only: as a part of words it would tear up every text
_HEAD = 6  # so many characters of a value are looked for at first, and tell it where the end of its text cut it off
_CUT = re.compile(  # a part of a character, and what closes a text
    r"(?:%(?:25)*[0-9a-f]{0,2}|\\+[ux]?[0-9a-f]{0,8}|&[a-z#0-9]*)*['\"`)}>. ]*", re.IGNORECASE
)
_ESCAPED = {"\n": "n", "\r": "r", "\t": "t", "\f": "f", "\b": "b"}
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


def _written(c: str) -> str:
    """A pattern of one character as a URL, JSON, HTML or Python writes it, or one of them what another wrote, or as it stands."""
    if c.isascii() and (c.isalnum() or c in "-_.~"):
        return re.escape(c)
    percent, number = "".join(f"%(?:25)*{byte:02x}" for byte in c.encode()), ord(c)
    slashes = r"(?:\\|%(?:25)*5c)+"
    python = "".join(rf"{slashes}x{byte:02x}" for byte in c.encode())
    units = c.encode("utf-16-be")
    json = "".join(rf"{slashes}u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))
    ways = [percent, json, rf"{slashes}u0*{number:x}", python, rf"{slashes}x{number:02x}"]
    ways += [rf"{slashes}(?:{re.escape(_ESCAPED.get(c, c))}|{percent})"]
    ways += [rf"&\#(?:0*{number}|x0*{number:x});", re.escape(html.escape(c))]
    return f"(?:(?i:{'|'.join(ways)})|{re.escape(c)}{'|[+]|%(?:25)*2[bB]' if c == ' ' else ''})"


class _Value:
    """One value that no text may show."""

    def __init__(self, value: str) -> None:
        flags = re.IGNORECASE if len(value) >= _WORD_BELOW else 0
        written = [_written(c) for c in value]
        edges = ("", "") if flags else (r"(?<![A-Za-z0-9_])", r"(?![A-Za-z0-9_])")
        self._whole = re.compile("".join(written).join(edges), flags)
        self._head = re.compile("".join(written[:_HEAD]), flags)
        self._tail = [re.compile(way, flags) for way in written[_HEAD:]]

    def redact(self, text: str) -> str:
        """The text without the value, and without what is left of it where the text was cut."""
        text = self._whole.sub(REDACTED, text)
        for head in self._head.finditer(text) if self._tail else ():
            end = head.end()
            for way in self._tail:
                found = way.match(text, end)
                if found is None:
                    break
                end = found.end()
            if _CUT.fullmatch(text, end):
                return text[: head.start()] + REDACTED
        return text


class Secrets:
    """Values that no text may show. A server that says one back does so as it stands, in JSON, in a URL, or cut short."""

    def __init__(self) -> None:
        self._values: dict[str, _Value] = {}

    def __bool__(self) -> bool:
        return bool(self._values)

    def add(self, value: str) -> None:
        """From now on `value` is redacted."""
        if value:
            self._values[value] = _Value(value)

    def redact(self, text: str) -> str:
        """The text without any of the values, the longest first."""
        for value in sorted(self._values, key=len, reverse=True):
            text = self._values[value].redact(text)
        return text

    def clean(self, value: Any) -> Any:
        """A JSON value with every text in it redacted."""
        if isinstance(value, dict):
            return {k: self.clean(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.clean(v) for v in value]
        return self.redact(value) if isinstance(value, str) else value


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
        except Exception as e:
            self._redact(e)
            raise
        if reply.finish not in (None, "stop", "length"):
            reply.finish = self._secrets.redact(str(reply.finish))
        return reply

    async def get(self, url: str, headers: Mapping[str, str], *, timeout_s: float = 10.0) -> tuple[int, bytes]:
        """As the lane does; what a refusal says is redacted."""
        try:
            return self._refusal(await self._lane.get(url, headers, timeout_s=timeout_s))
        except Exception as e:
            self._redact(e)
            raise

    async def post(
        self, url: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float = 30.0
    ) -> tuple[int, bytes]:
        """As the lane does; what a refusal says is redacted."""
        try:
            return self._refusal(await self._lane.post(url, body, headers, timeout_s=timeout_s))
        except Exception as e:
            self._redact(e)
            raise

    async def close(self) -> None:
        """Closes the lane."""
        await self._lane.close()

    def _refusal(self, reply: tuple[int, bytes]) -> tuple[int, bytes]:
        status, body = reply
        return (status, self._secrets.redact(body.decode(errors="replace")).encode()) if status >= 300 else reply

    def _redact(self, error: Exception) -> None:
        """In place, as a class of error may hold more than this file knows of. A refusal's body stays whole: parameters are read from it,
        and nothing shows it."""
        if isinstance(error, HttpError):  # its text was cut: a value may stand across the cut
            error.args = (str(HttpError(error.status, self._secrets.redact(error.body))),)
        error.args = tuple(self._secrets.clean(list(error.args)))
