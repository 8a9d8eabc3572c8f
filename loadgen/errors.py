"""What a user can cause or must be told, split by whose fault it is. Each is one line: what was given, what is allowed, what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTING = "parting"  # the name of a thread that may wait for a lost cluster for ever, and must not hold the end of the process up


class FanmarkError(Exception):
    """Base: the command line prints it as one line and ends with `exit_code`. Nothing was sent, but for a LostError."""

    exit_code = 2


class ScenarioError(FanmarkError):
    """The scenario or a flag is wrong."""


class UnreachableError(FanmarkError):
    """The target is silent or has no such model, or a tool server does not start."""

    exit_code = 3


class LostError(FanmarkError):
    """What is measured can no longer be written down: a run ends with it."""

    exit_code = 1


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Raises LostError where what is done in it cannot be written there."""
    try:
        yield
    except OSError as e:
        raise LostError(f"{out}: cannot be written ({e.strerror})") from None


class Stopped(Exception):
    """A query has reached a limit of its arm and ends with what it has; `limit` is the arm's key."""

    def __init__(self, limit: str) -> None:
        super().__init__(limit)
        self.limit = limit


class CallError(Exception):
    """A call or tool call failed; `kind` is its class in summary.json ("connect", "http_4xx", "tool_transport", ...)."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
