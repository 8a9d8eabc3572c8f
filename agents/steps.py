"""A recorded query, step by step: what replay.py re-enacts."""

from dataclasses import dataclass

from fanmark.agents.runtime import Author, Key


@dataclass(frozen=True, slots=True)
class Read:
    """A message that a step read: what a step before wrote, by its key, or ("recorded", id), a text of its own, which `begins` as others
    may."""

    key: Key
    tokens: int
    author: Author = "user"
    begins: tuple[tuple[Key, int], ...] = ()

    @property
    def as_read(self) -> Key:
        """The key of the message in the prompt: another agent's reply is quoted."""
        return ("quoted", *self.key) if self.key[0] == "reply" and self.author == "user" else self.key


@dataclass(frozen=True, slots=True)
class Step:
    """A recorded call, which `writes` ("reply", its number), or a tool call, which writes ("result", its number): so many `tokens`, a call
    as so many `samples` of equal length. `after`: what it waited for; `pause_s`: since the last of that, else since the query's start. A
    tool call took `seconds`."""

    writes: Key
    tokens: int
    role: str = "agent"
    round: int = 1
    after: tuple[Key, ...] = ()
    pause_s: float = 0.0
    seconds: float = 0.0
    input_tokens: int | None = None
    cached_tokens: int | None = None
    reads: tuple[Read, ...] = ()
    samples: int = 1

    @property
    def is_call(self) -> bool:
        return self.writes[0] == "reply"

    @property
    def sample_tokens(self) -> int:
        """How long each sample is; what was written is known of all of them together."""
        return max(1, round(self.tokens / self.samples))
