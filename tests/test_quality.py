"""Answers held against the known ones: which number a text says, who answers, and what a right answer costs."""

import asyncio
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from answering_server import answering, right
from hypothesis import given
from hypothesis import strategies as st
from two_arms import call

from fanmark.agents import topologies
from fanmark.loadgen import session, table
from fanmark.loadgen.quality import COSTS, final_replies, is_right, known_answer, last_number, quality
from fanmark.loadgen.questions import Question
from fanmark.loadgen.records import Query, read_queries
from fanmark.loadgen.reduced import reduced
from fanmark.loadgen.scenario_check import check
from fanmark.loadgen.simulate import Options, simulate
from fanmark.loadgen.statistics import wilson

TABLE = topologies()

numbers = st.decimals(-(10**9), 10**9, allow_nan=False, allow_infinity=False, places=3)
forms = st.sampled_from(["{:f}", "{:,f}", "{:.5f}", "{:,.4f}"])
before = st.sampled_from(["", "It is ", "6 x 7 = ", "= ", "(", "so $", "**", "10 and 12: ", "\\boxed{", "1, 2, "])
after = st.sampled_from(["", ".", " coins.", ")", "!", "}", "**", "%", " km/h, all told.", "\n"])


@given(numbers, forms, before, after)
def test_the_last_number_is_found_however_it_is_written(n: Decimal, form: str, head: str, tail: str) -> None:
    text = f"{head}{form.format(n)}{tail}"
    assert last_number(text) == n
    assert is_right(str(n), [text]) and is_right(form.format(n), [text]) and not is_right(str(n + 1), [text])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12-5=7", "7"),
        ("7 - 12 is -5", "-5"),
        ("7-12", "12"),  # a sign between two numbers is none
        ("\u22125", "-5"),
        ("$1,234.50", "1234.5"),
        ("1.5e3", "1500"),
        (".5", "0.5"),
        ("1,23", "23"),  # no thousands
        ("the answer is 42. I checked it twice", "42"),
        ("none", None),
        ("", None),
    ],
)
def test_numbers_in_words(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("answer", "texts", "correct"),
    [
        ("42", ["6 x 7 is 42"], True),
        ("42", ["42 is 6 x 7"], False),  # the last number counts
        ("1,000", ["1000.0"], True),
        ("40 %", ["It is 40%."], True),
        ("5 and 3 make 8\n#### 8", ["8"], True),
        ("Paris", [" paris.\n"], True),
        ("Paris", ["It is Paris"], False),  # a text is the answer, or it is not
        ("Paris", [""], False),
        ("42", ["41", "42", "42.0"], True),
        ("42", ["41", "42"], False),  # as many: the first
        ("42", ["I do not know", "42"], True),
        ("42", ["I do not know"], False),
        ("B", ["A", "B", "b."], True),
    ],
)
def test_what_most_texts_say_is_held_against_the_answer(answer: str, texts: list[str], correct: bool) -> None:
    assert is_right(answer, texts) is correct


def test_a_known_answer_is_a_number_where_it_is_one() -> None:
    assert [known_answer(text) for text in ("1,000.0", "-3", "12 apples", "I. Newton.")] == [
        Decimal(1000), Decimal(-3), "12 apples", "i. newton",
    ]  # fmt: skip


def test_the_final_answers_are_those_that_nobody_read() -> None:
    at = (0.0, 0.5, 1.0)
    calls = [call(n, at, (9, 0, 9), after=after) for n, after in ((1, []), (2, []), (3, [1, 2]), (4, [1, 2]))]
    votes = {("answer", 1, 0): 1, ("answer", 1, 1): 2, ("answer", 2, 1): 4, ("answer", 2, 0): 3}
    assert final_replies(calls, votes) == [("answer", 2, 0), ("answer", 2, 1)]
    judged = [*calls, call(5, at, (9, 0, 9), after=[3, 4])]
    assert final_replies(judged, votes | {("judge_answer",): 5}) == [("judge_answer",)]
    assert final_replies(judged, votes | {("vote", 1): 5}) == []  # who votes answers nothing
    assert final_replies([call(1, at, (9, 0, 9), samples=3)], {("answer",): 1}) == []


def asked(number: int, correct: bool | None, **more: Any) -> Query:
    """A query of 3 calls, 100 tokens in, 20 out, 2 s, one cent."""
    costs = dict.fromkeys(COSTS, 0.0) | {
        "retries": 0,
        "calls": 3,
        "input_tokens": 100,
        "output_tokens": 20,
        "latency_s": 2.0,
    }
    given_: dict[str, Any] = {"outcome": "completed", "resources": {**costs, "dollars": 0.01}} | more
    return Query(
        query=number, arm="a", warmup=False, due_at=0.0, started_at=0.0, done_at=2.0, expected={}, mismatches=[],
        seed="", correct=correct, **given_,
    )  # fmt: skip


KNOWN = [Question((("user", str(i)),), answer="1") for i in range(4)] + [Question((("user", "?"),))]


def test_quality_by_hand() -> None:
    queries = [asked(i, i < 2) for i in range(4)] + [asked(4, None), asked(5, None, outcome="failed")]
    found = quality(reduced(queries).queries, KNOWN, forced=False)
    assert found is not None
    low, high = wilson(2, 4)
    assert {key: found[key] for key in ("judged", "correct", "share", "low", "high", "reason")} == {
        "judged": 4, "correct": 2, "share": 0.5, "low": low, "high": high, "reason": None,
    }  # fmt: skip
    # 4 judged and the failed one, whose answer is known as well, for 2 right ones; the line without an answer is left out
    assert found["per_correct"] == {
        "calls": 7.5, "tool_calls": 0.0, "input_tokens": 250.0, "fresh_tokens": 0.0, "output_tokens": 50.0,
        "dollars": 0.025, "latency_s": 5.0,
    }  # fmt: skip
    unpriced = quality(
        reduced([asked(0, True, resources=asked(0, True).resources | {"dollars": None})]).queries, KNOWN, forced=False
    )
    assert unpriced is not None and unpriced["per_correct"]["dollars"] is None and unpriced["per_correct"]["calls"] == 3
    none_right = quality(reduced([asked(0, False)]).queries, KNOWN, forced=False)
    assert none_right is not None and none_right["share"] == 0.0 and set(none_right["per_correct"].values()) == {None}
    assert (
        quality(reduced(queries).queries, [], forced=False) is None
        and quality(reduced([asked(4, None)]).queries, KNOWN, forced=False) is None
    )
    unjudged = quality(reduced([asked(0, None)]).queries, KNOWN, forced=True)
    assert unjudged is not None and unjudged["share"] is None and 'lengths = "natural"' in unjudged["reason"]


ARMS: list[dict[str, Any]] = [
    {"name": "single", "topology": "single", "baseline": True},
    {"name": "votes", "topology": "self-consistency", "samples": 3},
]
WORKLOAD = {"system": 0, "answer": 12, "lengths": "natural", "file": "q.jsonl"}


def lines(folder: Path) -> list[dict[str, Any]]:
    told = [{"prompt": f"What is {i},000 + 11?", "answer": str(1000 * i + 11)} for i in range(1, 7)]
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    return told


def test_votes_are_right_more_often_than_one_answer_and_cost_more(tmp_path: Path) -> None:
    told = lines(tmp_path)
    with answering({line["prompt"]: (i, line["answer"]) for i, line in enumerate(told)}) as url:
        prices = {"input": 1.0, "output": 2.0}
        load = {"mode": "closed", "concurrency": 2, "queries": 6, "warmup": 1}
        raw = {"arm": ARMS, "workload": WORKLOAD, "load": load, "target": {"url": url, "prices": prices}}
        scenario = check(raw, str(tmp_path / "f.toml"), TABLE)
        options = session.Options(tmp_path / "run", 0, "asked", "test", [], None)
        found = asyncio.run(session.run(scenario, TABLE, options)).summary
    for query in read_queries(tmp_path / "run"):
        i = query.query % 6
        said = sum(right(i, k) for k in range(len(query.calls)))
        assert query.correct is (said > len(query.calls) / 2)
    single, votes = (found["arms"][name]["quality"] for name in ("single", "votes"))
    assert (single["correct"], single["judged"], votes["correct"], votes["judged"]) == (4, 6, 6, 6)
    assert (single["low"], single["high"]) == wilson(4, 6)
    assert (single["per_correct"]["calls"], votes["per_correct"]["calls"]) == (6 / 4, 18 / 6)
    # a question has 5 words, an answer 6: 17 millionths of a dollar
    assert single["per_correct"]["dollars"] == pytest.approx(6 * 17e-6 / 4)
    assert single["per_correct"]["fresh_tokens"] is None  # the server does not say
    told_lines = table.lines(found)
    start = told_lines.index("answers against the known ones, and what was spent for each right one")
    assert told_lines[start + 2].split()[:5] == ["single", "4", "of", "6", "66.7%"]
    assert told_lines[start + 3].split()[:5] == ["votes", "6", "of", "6", "100.0%"]


@pytest.mark.parametrize(
    ("lengths", "reason"),
    [
        ("natural", "no final answer can be (a stub's and the engine model's are filler, and votes are none)"),
        ("forced", 'forced lengths go on behind an answer: lengths = "natural"'),
    ],
)
def test_where_answers_are_filler_nothing_is_judged(tmp_path: Path, lengths: str, reason: str) -> None:
    lines(tmp_path)
    raw = {"arm": ARMS, "workload": WORKLOAD | {"lengths": lengths}, "load": {"queries": 9, "warmup": 0, "rate": 50}}
    scenario = check(raw, str(tmp_path / "f.toml"), TABLE)
    found = simulate(scenario, TABLE, Options(tmp_path / "run", "test", [])).summary
    assert {query.correct for query in read_queries(tmp_path / "run")} == {None}
    for arm in found["arms"].values():
        assert (arm["quality"]["judged"], arm["quality"]["share"], arm["quality"]["reason"]) == (0, None, reason)
    assert f"quality is not judged: {reason}" in found["notes"]
    assert "6 questions for 9 queries: they come again, and are then in the prefix cache" in found["notes"]
    assert not any("known ones" in line for line in table.lines(found))
