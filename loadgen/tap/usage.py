"""Usage for streams whose client asked for none: what is added to the request, and what is taken out of the reply again. Pure.

The closing chunk of a stream that was asked for usage has no choices; the client, who did not ask, never sees it. All else passes as it is.
"""

import re

import msgspec

_EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_raw = msgspec.json.Decoder(dict[str, msgspec.Raw])


class _Options(msgspec.Struct):
    include_usage: bool | None = None


class _Asked(msgspec.Struct):
    stream: bool | None = None
    stream_options: _Options | None = None


def with_usage(body: bytes) -> bytes | None:
    """The request that asks for usage too, every other value as it was written; None where it asks for it itself, is no stream, or
    cannot be read."""
    try:
        asked = msgspec.json.decode(body, type=_Asked)
        if not asked.stream or (asked.stream_options is not None and asked.stream_options.include_usage):
            return None
        fields = _raw.decode(body)
        options = msgspec.json.decode(fields.get("stream_options", msgspec.Raw(b"null"))) or {}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    fields["stream_options"] = msgspec.Raw(msgspec.json.encode({**options, "include_usage": True}))
    return msgspec.json.encode(fields)


class WithoutUsage:
    """A stream without the chunk that its client did not ask for. What of an event is not whole is kept until it is."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """What of the stream goes on."""
        data = self._rest + data if self._rest else data
        end = start = 0
        kept: list[bytes] = []
        for match in _EVENT_END.finditer(data):
            if b'"usage"' in (event := data[end : match.end()]) and _closes(event):
                kept.append(data[start:end])
                start = match.end()
            end = match.end()
        kept.append(data[start:end])
        self._rest = data[end:]
        return b"".join(kept)

    def close(self) -> bytes:
        """What is left when the stream has ended."""
        rest, self._rest = self._rest, b""
        return rest


def _closes(event: bytes) -> bool:
    """Whether an event is the chunk that tells usage and nothing else."""
    if not _NO_CHOICES.search(event):
        return False
    data = b"".join(line[5:] for line in event.splitlines() if line.startswith(b"data:"))
    try:
        told = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return isinstance(told, dict) and told.get("choices") == [] and told.get("usage") is not None
