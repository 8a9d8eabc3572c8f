"""Requests of OpenAI's API as vLLM 0.32 reads them: JSON body -> `Ask`, or `ApiError` with the body that vLLM would send.

Rules of the file:
1. Pure: no clock, no I/O. Unknown fields are accepted and ignored, as vLLM does.
2. A wrong *type* is a "Bad Request" that lists every such field; a wrong *value* is a "BadRequestError" that names one.

Ways to ask the stub for what only a model can decide (all optional, ignored by a real vLLM or used as it does):
- reasoning: `chat_template_kwargs.enable_thinking = true`, `reasoning_effort` or `thinking_token_budget` (tokens of reasoning exactly);
- an end of its own: `vllm_xargs.answer_tokens` (the end-of-sequence token included; `ignore_eos` and `max_tokens` go first);
- tool calls under `tool_choice` "auto": `vllm_xargs.tool_calls` (how many in the whole conversation; the tool messages in it
  are counted) and `vllm_xargs.tools_per_turn` (how many in one reply).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fanmark.servers.body_fields import ApiError, Fields, bad_value, extra_int
from fanmark.servers.prompts import prompt_ids
from fanmark.servers.tokenizer import Tokenizer
from fanmark.servers.tool_choice import Tooling, tooling_of

_EFFORT_SHARE = {"minimal": 0.1, "low": 0.25, "medium": 0.5, "high": 0.75}
_COMPLETIONS_MAX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server allows, and what it does where a request leaves the choice to the model."""

    model: str
    max_model_len: int
    reasoning_share: float = 0.5
    auto_tool_calls: int = 1
    scripted_tools: bool = False


@dataclass(frozen=True, slots=True)
class Form:
    """The form that the output is held to: exactly one of a JSON Schema, a list of choices, a regular expression."""

    schema: Mapping[str, Any] | None = None
    choice: Sequence[str] = ()
    regex: str | None = None


@dataclass(frozen=True, slots=True)
class Thinking:
    """How much of the output is reasoning: a number of tokens, or else a share of the output."""

    tokens: int | None
    share: float


@dataclass(frozen=True, slots=True)
class Ask:
    """One checked request. `prompts` are token ids; `max_tokens` None means as long as the model likes. `body`: see responses_api."""

    api: str
    prompts: Sequence[Sequence[int]]
    max_tokens: int | None
    min_tokens: int = 0
    ignore_eos: bool = False
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    include_stop: bool = False
    seed: int | None = None
    priority: int = 0
    salt: str = ""
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    request_id: str | None = None
    has_tools: bool = False
    tooling: Tooling | None = None
    form: Form | None = None
    thinking: Thinking | None = None
    reports_reasoning: bool = False
    answer_tokens: int | None = None
    prompt_tokens: int = 0
    body: Mapping[str, Any] = field(default_factory=dict)


def decode_body(raw: bytes, content_type: str) -> dict[str, Any]:
    """The JSON object of a request body. Raises ApiError for another content type, broken JSON or another value."""
    if content_type.split(";")[0].strip().lower() not in ("application/json", ""):
        text = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
        raise ApiError(400, text, "Bad Request")
    try:
        body = json.loads(raw)
    except json.JSONDecodeError as error:
        at = f"body.{error.pos}"
        raise Fields.refused([_json_error(at, error.msg)]) from None
    except UnicodeDecodeError:
        raise Fields.refused([_json_error("body.0", "Invalid UTF-8")]) from None
    if not isinstance(body, dict):
        kind = {"type": "dict_type", "loc": "body", "msg": "Input should be a valid dictionary", "input": body}
        raise Fields.refused([kind])
    return body


def _json_error(at: str, text: str) -> dict[str, Any]:
    return {"type": "json_invalid", "loc": at, "msg": "JSON decode error", "input": {}, "ctx": {"error": text}}


def parse_chat(body: Mapping[str, Any], limits: Limits, tokenizer: Tokenizer) -> Ask:
    """Check a body of /v1/chat/completions. Raises ApiError as vLLM would."""
    fields = Fields(body)
    messages = fields.objects("messages", required=True)
    tools = fields.objects("tools")
    common = _Common(fields, limits)
    common.integers("max_completion_tokens", "top_logprobs", "thinking_token_budget")
    common.settle(body)
    if body.get("logprobs"):
        asked = body.get("top_logprobs") or 0
        _refuse_logprobs(asked)
    tooling = tooling_of(body, tools, messages, limits.auto_tool_calls, scripted=limits.scripted_tools)
    form = _form(body)
    if not messages:
        raise bad_value("Cannot apply chat template to an empty conversation. Provide at least one message.")
    prompt = prompt_ids(tokenizer, messages, tools)
    max_tokens = common.value("max_completion_tokens")
    thinking, reported = _thinking(body, common.value("thinking_token_budget"), limits)
    return common.ask(
        "chat",
        [prompt],
        common.value("max_tokens") if max_tokens is None else max_tokens,
        has_tools=bool(tools),
        tooling=tooling,
        form=form,
        thinking=thinking,
        reports_reasoning=reported,
    )


def parse_completions(body: Mapping[str, Any], limits: Limits, tokenizer: Tokenizer) -> Ask:
    """Check a body of /v1/completions; the prompt is a text, token ids, or a list of either. Raises ApiError as vLLM would."""
    fields = Fields(body)
    fields.present("prompt")
    common = _Common(fields, limits)
    common.integers("logprobs")
    common.settle(body)
    if common.value("logprobs") is not None:
        _refuse_logprobs(common.value("logprobs") or 0)
    for name in ("echo", "suffix", "use_beam_search"):
        if body.get(name):
            raise bad_value(f"{name} is not currently supported", name)
    prompts = completion_prompts(body["prompt"], tokenizer)
    max_tokens = common.value("max_tokens") if "max_tokens" in body else _COMPLETIONS_MAX_TOKENS
    return common.ask("completions", prompts, max_tokens, form=_form(body))


def completion_prompts(prompt: Any, tokenizer: Tokenizer) -> list[Sequence[int]]:
    """Token ids of each prompt of a completions request. Raises ApiError where it is neither text nor token ids."""
    if isinstance(prompt, str):
        return [tokenizer.encode(prompt)]
    if isinstance(prompt, list) and prompt:
        kinds = set(map(type, prompt))
        if kinds == {int} and min(prompt) >= 0 and max(prompt) < 1 << 31:
            return [prompt]
        if kinds <= {str, list} and not all(
            isinstance(part, list) and part and type(part[0]) is list for part in prompt
        ):
            return [ids for part in prompt for ids in completion_prompts(part, tokenizer)]
    raise bad_value(
        "prompt must be a text, a list of token ids from 0 to 2^31 - 1, or a list of either, and not empty.", "prompt"
    )


def _refuse_logprobs(asked: int) -> None:
    if asked > 20:
        text = f"Requested sample logprobs of {asked}, which is greater than max allowed: 20"
        raise bad_value(f"{text} (parameter=logprobs, value={asked})", "logprobs")
    text = "logprobs are not available: this stub has no model that could give any."
    raise bad_value(f"{text} (parameter=logprobs)", "logprobs")


class _Common:
    """The fields that both endpoints share: types first (all at once), then values."""

    def __init__(self, fields: Fields, limits: Limits) -> None:
        self._fields, self._limits = fields, limits
        self._ints: dict[str, int | None] = {}
        self.integers("max_tokens", "min_tokens", "n", "seed", "priority")
        self._flags = {name: fields.flag(name) for name in ("stream", "ignore_eos", "return_token_ids")}
        self._flags["include_stop"] = fields.flag("include_stop_str_in_output")
        self._temperature = fields.number("temperature")
        self._top_p = fields.number("top_p")
        self._model = fields.text("model")
        self._salt = fields.text("cache_salt")
        self._request_id = fields.text("request_id")
        self._stop = fields.texts("stop")
        self._stop_ids = fields.ints("stop_token_ids")
        self._stream_options = fields.mapping("stream_options")
        self._answer_tokens: int | None = None

    def integers(self, *names: str) -> None:
        self._ints.update((name, self._fields.integer(name)) for name in names)

    def value(self, name: str) -> int | None:
        return self._ints[name]

    def settle(self, body: Mapping[str, Any]) -> None:
        """Raise for wrong types, then for the wrong values that need no prompt."""
        self._fields.settle()
        if self._stream_options is not None and not self._flags["stream"]:
            text = "Stream options can only be defined when `stream=True`. (parameter=stream_options)"
            raise bad_value(text, "stream_options")
        if self._salt == "":
            text = "Parameter 'cache_salt' must be a non-empty string if provided. (parameter=cache_salt)"
            raise bad_value(text, "cache_salt")
        self._answer_tokens = extra_int(body, "answer_tokens", 0) or None
        known = self._limits.model
        if self._model and self._model != known:
            text = f"The model `{self._model}` does not exist. Valid aliases: {known}."
            raise ApiError(404, text, "NotFoundError", "model")

    def ask(self, api: str, prompts: Sequence[Sequence[int]], max_tokens: int | None, **more: Any) -> Ask:
        options = self._stream_options or {}
        longest = max(map(len, prompts))
        self._check_values(max_tokens)
        check_context(longest, min(map(len, prompts)), max_tokens, self._limits.max_model_len)
        flags = self._flags
        return Ask(
            api=api,
            prompts=prompts,
            max_tokens=max_tokens,
            min_tokens=self.value("min_tokens") or 0,
            ignore_eos=flags["ignore_eos"],
            n=1 if self.value("n") is None else self._ints["n"] or 1,
            stop=tuple(text for text in self._stop if text),
            stop_token_ids=frozenset(self._stop_ids),
            include_stop=flags["include_stop"],
            seed=self.value("seed"),
            priority=self.value("priority") or 0,
            salt=self._salt or "",
            stream=flags["stream"],
            include_usage=bool(options.get("include_usage")),
            continuous_usage=bool(options.get("include_usage") and options.get("continuous_usage_stats")),
            return_token_ids=flags["return_token_ids"],
            request_id=self._request_id,
            answer_tokens=self._answer_tokens,
            prompt_tokens=sum(map(len, prompts)),
            **more,
        )

    def _check_values(self, max_tokens: int | None) -> None:
        n, min_tokens, limit = self.value("n"), self.value("min_tokens") or 0, self._limits.max_model_len
        if n is not None and n < 1:
            raise bad_value(f"n must be at least 1, got {n}.")
        if self._temperature is not None and self._temperature < 0:
            given = self._temperature
            text = f"temperature must be non-negative, got {given}. (parameter=temperature, value={given})"
            raise bad_value(text, "temperature")
        if self._top_p is not None and not 0 < self._top_p <= 1:
            given = self._top_p
            raise bad_value(f"top_p must be in (0, 1], got {given}. (parameter=top_p, value={given})", "top_p")
        if max_tokens is not None and max_tokens < 1:
            text = f"max_tokens must be at least 1, got {max_tokens}. (parameter=max_tokens, value={max_tokens})"
            raise bad_value(text, "max_tokens")
        if max_tokens is not None and max_tokens > limit:
            text = f"max_tokens={max_tokens} cannot be greater than max_model_len={limit}. Please request fewer output tokens."
            raise bad_value(f"{text} (parameter=max_tokens, value={max_tokens})", "max_tokens")
        if min_tokens < 0:
            raise bad_value(f"min_tokens must be greater than or equal to 0, got {min_tokens}.")
        if max_tokens is not None and min_tokens > max_tokens:
            raise bad_value(f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {min_tokens}.")


def check_context(longest: int, shortest: int, max_tokens: int | None, limit: int) -> None:
    """Raise ApiError where a prompt is empty, or too long for a context of `limit` tokens; all lengths in tokens."""
    if shortest == 0:
        raise bad_value("The prompt cannot be empty: it has no token.")
    room = limit - (max_tokens or 0)
    if longest <= room and longest < limit:
        return
    text = f"This model's maximum context length is {limit} tokens. However, "
    if longest >= limit:
        at_least = limit + 1 if longest > limit else longest
        text += (
            f"your prompt contains at least {at_least} input tokens, which exceeds this limit even without any output "
            "tokens. Please reduce the length of the input prompt."
        )
    else:
        at_least = room + 1
        text += (
            f"you requested {max_tokens} output tokens and your prompt contains at least {at_least} input tokens, for a "
            f"total of at least {limit + 1} tokens. Please reduce the length of the input prompt or the number of "
            "requested output tokens."
        )
    raise bad_value(f"{text} (parameter=input_tokens, value={at_least})", "input_tokens")


def _form(body: Mapping[str, Any]) -> Form | None:
    asked = body.get("response_format")
    if isinstance(asked, dict) and asked.get("type") == "json_object":
        return Form(schema={"type": "object"})
    if isinstance(asked, dict) and asked.get("type") == "json_schema":
        holder = asked.get("json_schema")
        schema = holder.get("schema") if isinstance(holder, dict) else None
        if not isinstance(schema, dict):
            raise bad_value(
                "response_format json_schema needs a schema. (parameter=response_format)", "response_format"
            )
        return Form(schema=schema)
    outputs = body.get("structured_outputs")
    if not isinstance(outputs, dict):
        return None
    if isinstance(outputs.get("choice"), list) and outputs["choice"]:
        return Form(choice=[str(text) for text in outputs["choice"]])
    if isinstance(outputs.get("regex"), str):
        return Form(regex=outputs["regex"])
    if isinstance(outputs.get("json"), dict):
        return Form(schema=outputs["json"])
    raise bad_value("structured_outputs: this stub knows json, choice and regex. (parameter=structured_outputs)")


def _thinking(body: Mapping[str, Any], budget: int | None, limits: Limits) -> tuple[Thinking | None, bool]:
    """How much to reason, and whether usage reports it: it does as soon as the request speaks of thinking."""
    kwargs = body.get("chat_template_kwargs")
    wish = kwargs.get("enable_thinking") if isinstance(kwargs, dict) else None
    effort = body.get("reasoning_effort")
    spoken = wish is not None or budget is not None or effort is not None
    wanted = wish is True or (wish is None and (budget is not None or effort in _EFFORT_SHARE))
    if not wanted:
        return None, spoken
    share = _EFFORT_SHARE.get(str(effort), limits.reasoning_share)
    return Thinking(None if budget is None or budget < 0 else budget, share), True
