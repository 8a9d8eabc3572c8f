"""Calls, tool calls and queries as the tap sees them, while they are told apart."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fanmark.agents.runtime import ToolAsk
from fanmark.loadgen.tap.asked import Asked, Said
from fanmark.loadgen.tap.ids import Name

NOWHERE_ASKED = Asked(None, [], {})
OPEN_ASKS_IDLE = 10  # so many times as long is waited while a tool call is open


class Answer(NamedTuple):
    """How a call or tool call ended. `id` is the reply's, where it may be told again."""

    text: str = ""
    asks: tuple[ToolAsk, ...] = ()
    failed: bool = False
    id: str | None = None


@dataclass(eq=False)
class Seen:
    """A call or tool call as the tap saw it. `text` is its reply, or its result; `extends` the call whose messages its own begin with;
    `after` are those that it waited for, `sources` those whose replies its messages are, by their place. `tool`: None for a call."""

    n: int
    began_at: float
    asked: Asked
    query: "Group"
    tool: str | None = None
    spoken: list[Said] = field(default_factory=list)
    system: str = ""
    chain: list[bytes] = field(default_factory=list)
    length: int = 0  # of the chain, which goes once it has been looked up
    digest: bytes = b""
    attempt: int = 1
    failed_before: list["Seen"] = field(default_factory=list)
    extends: "Seen | None" = None
    caller: "Seen | None" = None  # whose tool call it is, or was handed over by
    after: list["Seen"] = field(default_factory=list)
    sources: list["Seen | None"] = field(default_factory=list)
    by_time: bool = False
    text: str = ""
    asks: tuple[ToolAsk, ...] = ()
    says: list[str] = field(default_factory=list)  # what of it may be read again
    open_asks: list[ToolAsk] = field(default_factory=list)
    ended_at: float | None = None
    failed: bool = False
    record: Any = None  # the recorder's own

    @property
    def round(self) -> int:
        """Which call of its agent's it is, within the query."""
        before = self.extends
        return 1 if before is None or before.query is not self.query else before.round + 1


@dataclass(eq=False)
class Group:
    """A query as the tap sees it."""

    name: Name
    session: int
    turn: int
    calls: list[Seen] = field(default_factory=list)
    in_flight: int = 0
    ended_at: float = 0.0
    over: bool = False
    followed: bool = False  # the session's next query has begun
    paused_after: Seen | None = None  # the call at whose end nothing was in flight

    @property
    def attributed(self) -> str:
        """By which method; "none" where its one call shows no company."""
        lone = self.name.method == "content" and self.turn == 1 and len(self.calls) == 1 and not self.followed
        return "none" if lone else self.name.method

    def told(self) -> Iterator[str]:
        """All replies and results so far."""
        yield from (seen.text for seen in self.calls if seen.text)

    def release(self) -> None:
        """Lets go of all that only an open query needs: what was said, but for the replies by which its session's next query is known."""
        for seen in self.calls:
            seen.asked, seen.spoken, seen.system, seen.record = NOWHERE_ASKED, [], "", None
            seen.after, seen.sources, seen.failed_before, seen.caller, seen.extends = [], [], [], None, None
            seen.says = []
        self.calls, self.paused_after = [], None

    def ends_at(self, idle_s: float) -> float | None:
        """When it ends if nothing comes; None while something is in flight."""
        if self.in_flight:
            return None
        waits = any(seen.open_asks for seen in self.calls)
        return self.ended_at + idle_s * (OPEN_ASKS_IDLE if waits else 1)


NOWHERE = Group(Name("none", "", False), 0, 0)
