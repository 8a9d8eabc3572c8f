"""A target as a run sees it, whatever carries its calls: HTTP (target.py), or the engine in process (lanes/virtual.py)."""

import re
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from fanmark.agents.runtime import Author, Key
from fanmark.loadgen.counters import Reading
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.lanes.http import HttpError, Sent
from fanmark.loadgen.lanes.sse import Reply
from fanmark.loadgen.prompts import ChatPrompts, Part, Prompts
from fanmark.loadgen.scenario import Target
from fanmark.servers.tokenizer import vocabulary

if TYPE_CHECKING:
    from fanmark.servers.engine.attribution import Weights

LOST = {
    "ignore_eos": "replies may end early: output tokens are a bound, not exact",
    "cache_salt": "a salted line opens every prompt instead; its tokens count",
    "stream_options": "streams carry no usage: token counts are unknown",
    "return_token_ids": "replies are re-encoded: input tokens may differ by a few",
    "max_tokens": "max_completion_tokens is sent instead",
    "thinking_token_budget": "how much of an answer is reasoning is left to the model",
}
_TEMPLATE_TOKENS = 256  # what a chat template may add of its own, at most


def role_key(role: str, keys: Container[str]) -> str | None:
    """Which of `keys` names this role: itself, or without its number (worker-3 is a worker)."""
    plain = re.sub(r"-\d+$", "", role)
    return role if role in keys else plain if plain in keys else None


def _without_env(params: Mapping[str, Any]) -> dict[str, Any]:
    """What of the params needs no environment: all that a target has that nobody is reached at."""
    return {k: v for k, v in params.items() if not (isinstance(v, dict) and v.keys() == {"env"})}


def _weights(name: str) -> "Weights":
    """What work takes of a full replica, by the profile of a target that does not tell itself. Raises ScenarioError."""
    from fanmark.servers.engine.attribution import weights_of
    from fanmark.servers.profiles import ProfileError, load_profile

    try:
        profile = load_profile(name)
    except ProfileError as e:
        raise ScenarioError(f"profile {name!r}: {e}") from None
    return weights_of(profile.law, profile.settings.max_num_batched_tokens)


class Lane(Protocol):
    """What carries the calls, as far as records name it."""

    @property
    def name(self) -> str: ...


class Endpoint(ABC):
    """One target, ready to be called. `notes` collects what the user must be told; `dropped` holds refused parameters."""

    def __init__(self, name: str, config: Target, model: str, server: str) -> None:
        self.name = name
        self.config = config
        self.model = model
        self.server = server
        self.max_model_len: int | None = None
        self.notes: list[str] = []
        self.dropped: set[str] = set()
        self.params = _without_env(config.params)
        self.role_params = {name: _without_env(role.params) for name, role in config.roles.items()}
        self.prompts: Prompts = ChatPrompts(vocabulary(), None, None)
        self.tool_part: Part | None = None
        self.tools: list[dict[str, Any]] = []
        self.weights = _weights(config.profile) if config.profile is not None else None

    @property
    @abstractmethod
    def lane(self) -> Lane: ...

    @abstractmethod
    def send(self, body: Mapping[str, Any], headers: Mapping[str, str], sent: Sent) -> Awaitable[Reply]:
        """One call. Raises CallError."""

    @abstractmethod
    async def schema_tokens(self, system: bool) -> int | None:
        """What the schemas of `tools` add to a chat prompt, one with a system message or without; None where it is not known."""

    @property
    def metrics_urls(self) -> tuple[str, ...]:
        """Where the target's servers tell of themselves; without an address, a name of its own."""
        return (self.name,)

    @abstractmethod
    async def reading(self, timeout_s: float = 10.0) -> Reading | None:
        """What the target's servers say of themselves; None if they do not."""

    async def power(self, timeout_s: float = 10.0) -> Mapping[str, float]:
        """`joules` since they were last reset and `watts` now of the GPUs under the target, as far as somebody tells."""
        return {}

    async def expose(self, tools: Sequence[dict[str, Any]], *, system: bool) -> None:
        """Takes the tools' schemas (OpenAI's form) that stand in a tool user's prompts, and measures what they add to a prompt."""
        self.tools = list(tools)
        if not tools:
            return
        if self.config.api == "completions":
            self.tool_part = await self.prompts.reply_part("system", msgspec.json.encode(self.tools).decode(), None)
        else:
            self.tool_part = Part("", await self.schema_tokens(system))

    def model_of(self, role: str) -> str:
        """The model of a role's calls."""
        own = role_key(role, self.config.roles)
        return (self.config.roles[own].model if own else None) or self.model

    @property
    def filler(self) -> bool:
        """Whether its answers are filler, as those of our own servers are."""
        return self.server.startswith(("fanmark-stub", "engine model"))

    @property
    def salts_text(self) -> bool:
        """Whether prefix caches are kept apart by a line of text, since the target refused `cache_salt`."""
        return "cache_salt" in self.dropped

    def body(
        self,
        parts: Sequence[tuple[Author, Part]],
        *,
        max_tokens: int,
        forced: bool,
        salt: str | None,
        tools: bool,
        samples: int,
        reasoning_tokens: int,
        role: str = "",
        may_call: bool = False,
    ) -> dict[str, Any]:
        """The request, as a JSON object. Parameters that the target refused before are left out."""
        own = role_key(role, self.config.roles)
        fields: dict[str, Any] = {"model": self.model_of(role)}
        if self.config.api == "completions":
            fields["prompt"] = self.prompt_of([part.content for _, part in parts])  # type: ignore[misc]  # all are ids
            fields["return_token_ids"] = True
        else:
            fields["messages"] = [{"role": author, "content": part.content, **part.fields} for author, part in parts]
            if tools and self.tools:
                fields |= {"tools": self.tools, "tool_choice": "auto" if may_call else "none"}
        fields |= {"max_tokens": max_tokens, "stream": True, "stream_options": {"include_usage": True}}
        if samples > 1:
            fields["n"] = samples
        if reasoning_tokens and self.config.api == "chat":
            fields["thinking_token_budget"] = reasoning_tokens
        if forced:
            fields["ignore_eos"] = True
        if salt is not None:
            fields["cache_salt"] = salt
        fields |= self.params
        if own is not None:
            fields |= self.role_params[own]
        for name in self.dropped & set(fields):
            del fields[name]
        if "max_tokens" in self.dropped:
            fields["max_completion_tokens"] = max_tokens
        return fields

    def prompt_of(self, parts: Sequence[list[int]]) -> Any:
        """The prompt of a completion, by the ids of its messages."""
        return [i for ids in parts for i in ids]

    async def prompt_tokens(self, prompt: Sequence[tuple[Key, Author, Part]], body: Mapping[str, Any]) -> int:
        """How long a prompt is; where that is not known, a bound: a token is at least a byte of the request, or of a template."""
        total = 0
        if "tools" in body:
            prompt = [*prompt, (("tools",), "system", self.tool_part or Part("", None))]
        for _, author, part in prompt:
            size = part.size
            if size is None and isinstance(part.content, str) and part.content:
                counted = await self.prompts.reply_size(author, part.content)
                size = counted[0] if counted is not None else None
            if size is None:
                return len(msgspec.json.encode(body)) + _TEMPLATE_TOKENS
            total += size
        return total

    def drop_refused(self, error: HttpError, body: Mapping[str, Any]) -> bool:
        """Whether the refusal names an optional parameter of `body`; it is left out from now on, and said once."""
        if error.status not in (400, 422):
            return False
        for name in [*LOST, *self.params, *(name for params in self.role_params.values() for name in params)]:
            if name in body and name in error.body:
                if name not in self.dropped:
                    self.dropped.add(name)
                    self.notes.append(f"{self.name}: refuses {name!r}: {LOST.get(name, 'it is left out')}")
                return True
        return False
