"""What requests are read as, what is refused and how; answers, their lengths and their pieces."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanmark.servers.answers import Lengths, Speaker, cut_at_stop, split_evenly
from fanmark.servers.body_fields import ApiError
from fanmark.servers.openai_api import Ask, Limits, Thinking, decode_body, parse_chat, parse_completions
from fanmark.servers.prompts import prompt_ids, tools_text
from fanmark.servers.tokenizer import Tokenizer, vocabulary

TOKENIZER = Tokenizer(vocabulary())
LIMITS = Limits("tiny", 100)
SPEAKER = Speaker(TOKENIZER, Lengths(), 100)
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def chat(**body: Any) -> Ask:
    return parse_chat({"messages": [{"role": "user", "content": "the ocean is deep"}], **body}, LIMITS, TOKENIZER)


def complete(**body: Any) -> Ask:
    return parse_completions({"prompt": "the ocean is deep", **body}, LIMITS, TOKENIZER)


REFUSED_CHATS: list[tuple[dict[str, Any], int, str | None, str]] = [
    # body, status, param, part of the message
    ({"max_tokens": 8.5}, 400, "body.max_tokens", "got a number with a fractional part"),
    ({"max_tokens": [8]}, 400, "body.max_tokens", "'input': '<list of 1 items>'"),
    ({"stream": "maybe"}, 400, "body.stream", "unable to interpret input"),
    ({"model": 7}, 400, "body.model", "Input should be a valid string"),
    ({"messages": "hello"}, 400, "body.messages", "Input should be a valid list"),
    ({"messages": ["hello"]}, 400, "body.messages", "Input should be a valid dictionary"),
    ({"n": "two", "seed": "three"}, 400, "body.n", "2 validation errors"),
    ({"stop": 7}, 400, "body.stop", "Input should be a valid string"),
    ({"temperature": {}}, 400, "body.temperature", "Input should be a valid number"),
    ({"top_p": 0}, 400, "top_p", "top_p must be in (0, 1], got 0.0."),
    ({"min_tokens": -1}, 400, None, "min_tokens must be greater than or equal to 0"),
    (
        {"max_tokens": 97},
        400,
        "input_tokens",
        "you requested 97 output tokens and your prompt contains at least 4 input",
    ),
    ({"messages": [{"role": "user", "content": ""}]}, 400, None, "The prompt cannot be empty"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None, "not a multimodal model"),
    ({"logprobs": True}, 400, "logprobs", "logprobs are not available"),
    ({"tools": [TOOL], "tool_choice": "often"}, 400, "tool_choice", "must be none, auto, required or a named function"),
    ({"tools": [{"type": "function"}]}, 400, "tools", "must be a function with a name"),
    ({"vllm_xargs": {"answer_tokens": "9"}}, 400, "vllm_xargs", "must be an integer >= 0, got '9'"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format", "needs a schema"),
    ({"structured_outputs": {"grammar": "x"}}, 400, None, "knows json, choice and regex"),
]


@pytest.mark.parametrize(("body", "status", "param", "why"), REFUSED_CHATS)
def test_a_wrong_chat_is_refused_with_its_reason(
    body: dict[str, Any], status: int, param: str | None, why: str
) -> None:
    with pytest.raises(ApiError) as refused:
        chat(**body)
    error = refused.value.body()["error"]
    assert (error["code"], error["param"]) == (status, param)
    assert why in error["message"]


REFUSED_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "body.prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [1, -1]}, "prompt"),
    ({"prompt": [1 << 40]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [[[1]]]}, "prompt"),
    ({"prompt": {"text": "a"}}, "prompt"),
    ({"echo": True}, "echo"),
    ({"logprobs": 1}, "logprobs"),
]


@pytest.mark.parametrize(("body", "param"), REFUSED_COMPLETIONS)
def test_a_wrong_completion_is_refused(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        complete(**body)
    assert refused.value.param == param


@pytest.mark.parametrize("raw", [b"[1]", b"\xff{}", b""])
def test_a_body_that_is_no_json_object_is_a_bad_request(raw: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        decode_body(raw, "application/json; charset=utf-8")
    assert (refused.value.status, refused.value.kind) == (400, "Bad Request")


def test_numbers_may_come_as_texts_and_null_is_absent() -> None:
    ask = chat(max_tokens="8", n=None, ignore_eos="true", temperature=None, stop=None, model=None)
    assert (ask.max_tokens, ask.n, ask.ignore_eos, ask.stop) == (8, 1, True, ())


def test_max_completion_tokens_goes_before_max_tokens_and_completions_default_to_16() -> None:
    assert chat(max_tokens=8, max_completion_tokens=9).max_tokens == 9
    assert chat().max_tokens is None
    assert (complete().max_tokens, complete(max_tokens=None).max_tokens) == (16, None)


PROMPTS: list[tuple[Any, list[list[int]]]] = [
    ("the of", [[0, 1]]),
    ([5, 6, 7], [[5, 6, 7]]),
    (["the", "of and"], [[0], [1, 2]]),
    ([[5], [6, 7]], [[5], [6, 7]]),
]


@pytest.mark.parametrize(("prompt", "ids"), PROMPTS)
def test_a_prompt_is_text_ids_or_a_list_of_either(prompt: Any, ids: list[list[int]]) -> None:
    assert [list(each) for each in complete(prompt=prompt).prompts] == ids


def test_a_chat_prompt_is_its_texts_one_after_the_other() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "the of"},
        {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "text", "text": "to"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]},
    ]
    call = [
        i
        for text in ('<tool_call>\n{"name": "look", "arguments": ', "{}", "}\n</tool_call>")
        for i in TOKENIZER.encode(text)
    ]
    assert prompt_ids(TOKENIZER, messages, [TOOL]) == [*TOKENIZER.encode(tools_text([TOOL])), 0, 1, 2, 3, *call]


REASONING: list[tuple[dict[str, Any], Thinking | None, bool]] = [
    ({}, None, False),
    ({"chat_template_kwargs": {"enable_thinking": False}}, None, True),
    ({"chat_template_kwargs": {"enable_thinking": True}}, Thinking(None, 0.5), True),
    ({"reasoning_effort": "high"}, Thinking(None, 0.75), True),
    ({"reasoning_effort": "none"}, None, True),
    ({"thinking_token_budget": 7}, Thinking(7, 0.5), True),
    ({"thinking_token_budget": 7, "chat_template_kwargs": {"enable_thinking": False}}, None, True),
]


@pytest.mark.parametrize(("body", "thinking", "reported"), REASONING)
def test_reasoning_is_asked_for_in_three_ways(body: dict[str, Any], thinking: Thinking | None, reported: bool) -> None:
    ask = chat(**body)
    assert (ask.thinking, ask.reports_reasoning) == (thinking, reported)


def shown(deltas: list[bytes], key: str) -> str:
    return "".join(json.loads(delta).get(key, "") for delta in deltas if delta)


@given(
    st.integers(1, 90),
    st.none() | st.integers(0, 100),
    st.none() | st.integers(1, 95),
    st.lists(st.sampled_from(["a", "the", "e o", "ing", " w", "zzz"]), max_size=2),
    st.integers(-5, 5),
)
def test_pieces_make_the_whole_and_lengths_are_exact(
    length: int, budget: int | None, ends: int | None, stop: list[str], seed: int
) -> None:
    extra = {} if ends is None else {"vllm_xargs": {"answer_tokens": ends}}
    ask = chat(max_tokens=length, thinking_token_budget=budget, stop=stop, seed=seed, **extra)
    answer = SPEAKER.answer(ask, ask.prompts[0], 0)
    assert len(answer.deltas) == len(answer.ids) <= length
    assert shown(answer.deltas, "content") == (answer.content or "")
    assert shown(answer.deltas, "reasoning") == (answer.reasoning or "")
    assert answer.deltas[-1]
    if answer.stop_reason is None:
        stopped = ends is not None and ends <= length
        assert len(answer.ids) == (min(length, ends) if ends else length)
        assert answer.finish == ("stop" if stopped else "length")
        assert not any(text in (answer.content or "") for text in stop)
        if not stopped:
            text = TOKENIZER.encode(answer.reasoning or "") + TOKENIZER.encode(answer.content or "")
            assert text == answer.ids
    else:
        assert answer.finish == "stop"
    assert answer.reasoning_tokens == min(
        budget or 0, len(answer.ids) - (answer.finish == "stop" and not answer.stop_reason)
    )


@given(
    st.lists(st.text("ab", max_size=3), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=2),
    st.booleans(),
)
def test_a_stop_text_is_found_wherever_it_falls(texts: list[str], stops: list[str], include: bool) -> None:
    pieces, stop = cut_at_stop(texts, stops, 0, include=include)
    whole, said = "".join(texts), "".join(pieces)
    if stop is None:
        assert said == whole and len(pieces) == len(texts)
        assert not any(text in whole for text in stops)
    else:
        before = said.removesuffix(stop) if include else said
        assert whole.startswith(before + stop)
        assert "".join(texts[: len(pieces)]).startswith(before + stop)
        if not include:  # of two that end in one token, the first of the list counts, as in vLLM
            assert stop not in said


def test_stop_ids_end_an_answer_from_min_tokens_on() -> None:
    ids = SPEAKER.answer(ask := chat(max_tokens=20), ask.prompts[0], 0).ids
    for low in (0, 5):
        ask = chat(max_tokens=20, stop_token_ids=[ids[3], ids[9]], min_tokens=low)
        answer = SPEAKER.answer(ask, ask.prompts[0], 0)
        last = 3 if low == 0 else 9
        assert (len(answer.ids), answer.stop_reason) == (last + 1, ids[last])
        assert TOKENIZER.encode(answer.content or "") == ids[:last]


@given(st.text(max_size=40), st.integers(1, 12))
def test_even_pieces_make_the_text(text: str, parts: int) -> None:
    pieces = split_evenly(text, parts)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


FORMS: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {"choice": ["agree"]}}, "agree"),
    ({"structured_outputs": {"regex": "[a]{5}"}}, "aaaaa"),
    ({"structured_outputs": {"json": {"const": 7}}}, "7"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": {"a": 1}}}}}, '{"a": 1}'),
    ({"response_format": {"type": "json_object"}}, "{}"),
]


@pytest.mark.parametrize(("body", "text"), FORMS)
def test_an_answer_keeps_to_its_form(body: dict[str, Any], text: str) -> None:
    ask = chat(max_tokens=50, **body)
    answer = SPEAKER.answer(ask, ask.prompts[0], 0)
    assert (answer.content, answer.finish) == (text, "stop")
    assert shown(answer.deltas, "content") == text
    assert len(answer.ids) == len(TOKENIZER.encode(text)) + 1


def test_a_call_cut_short_reads_as_text() -> None:
    ask = chat(max_tokens=9, tools=[TOOL], tool_choice="required")
    answer = SPEAKER.answer(ask, ask.prompts[0], 0)
    assert (answer.finish, list(answer.calls), len(answer.ids)) == ("length", [], 9)
    assert (answer.content or "").startswith("<tool_call>")


@pytest.mark.parametrize(("mean", "cv"), [(50, 0.0), (50, 1.0)])
def test_drawn_lengths_have_their_mean(mean: float, cv: float) -> None:
    from random import Random

    rng = Random(1)
    drawn = [Lengths(mean, cv).draw(rng, None) or 0 for _ in range(4000)]
    assert sum(drawn) / len(drawn) == pytest.approx(mean, rel=0.05)
    assert (len(set(drawn)) == 1) == (cv == 0)


def test_a_script_calls_each_tool_once_the_last_one_first() -> None:
    """And then answers, or, where it must call, calls the first of the list again; what is optional is left out, texts are sentences."""
    limits = Limits("tiny", 4000, scripted_tools=True)
    schema = {"type": "object", "properties": {"task": {"type": "string"}, "note": {}}, "required": ["task"]}
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in ("end", "ask")]
    messages: list[dict[str, Any]] = [{"role": "user", "content": "the ocean"}]
    called: dict[str | None, list[str | None]] = {None: [], "required": []}
    for turn in range(3):
        for choice, names in called.items():
            body = {"messages": messages + turn * [{"role": "assistant", "content": "so"}], "tools": tools}
            ask = parse_chat({**body, "tool_choice": choice}, limits, TOKENIZER)
            answer = Speaker(TOKENIZER, Lengths(), 4000).answer(ask, ask.prompts[0], 0)
            names += [call.name for call in answer.calls] or [None]
            for call in answer.calls:
                arguments = json.loads(call.arguments)
                assert list(arguments) == ["task"] and len(arguments["task"]) >= 60
    assert called == {None: ["ask", "end", None], "required": ["ask", "end", "end"]}
