"""Final answers held against the known ones, and what a right one costs. Pure.

A known answer that is a number is met by the last number of the text, however it is written (1,000 and 1000.0 are one); any other by the
whole text, but for case, white space and a full stop. Where several calls answer last and nobody reads them, the majority of them answers.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import partial
from typing import Any

from fanmark.agents.runtime import Key
from fanmark.loadgen.questions import Question, asked
from fanmark.loadgen.records import Call
from fanmark.loadgen.reduced import QueryKind, Rows
from fanmark.loadgen.statistics import wilson

_FINAL = ("answer", "judge_answer")
_FORCED = 'forced lengths go on behind an answer: lengths = "natural"'
_NONE = "no final answer can be (a stub's and the engine model's are filler, and votes are none)"
_SIGN = r"(?:(?<![\w).])-)?"  # not the one between two numbers
_NUMBER = re.compile(
    rf"{_SIGN}\$?(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d{{1,3}})?|{_SIGN}(?<!\d)\.\d+"
)
COSTS = ("calls", "tool_calls", "input_tokens", "fresh_tokens", "output_tokens", "dollars", "latency_s")


def last_number(text: str) -> Decimal | None:
    """The last number that a text says."""
    found = _NUMBER.findall(text.replace("\u2212", "-"))
    return _decimal(found[-1]) if found else None


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("$", ""))


def known_answer(text: str) -> Decimal | str:
    """A file's answer, a number where it is one; of one with its way (GSM8K) what stands behind ####."""
    final = text.rpartition("####")[2].strip()
    plain = final.replace("\u2212", "-").rstrip("%. ")
    return _decimal(plain) if _NUMBER.fullmatch(plain) else _plain(final)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(". ")


def is_right(answer: str, texts: Iterable[str]) -> bool:
    """Whether what most of the texts say is the answer; where as many say this as that, the first of them counts."""
    known = known_answer(answer)
    said = [last_number(text) if isinstance(known, Decimal) else _plain(text) for text in texts]
    votes = Counter(each for each in said if each is not None)
    return bool(votes) and votes.most_common(1)[0][0] == known


def final_replies(calls: Sequence[Call], numbers: Mapping[Key, int]) -> list[Key]:
    """The answers that no other call read, in the order of their calls, `numbers`; none where one call gave several."""
    read = {number for call in calls for number in call.after}
    found = sorted((number, key) for key, number in numbers.items() if key[0] in _FINAL and number not in read)
    several = {call.call for call in calls if call.samples > 1}
    return [] if several & {number for number, _ in found} else [key for _, key in found]


def quality(queries: Rows[QueryKind], questions: Sequence[Question], *, forced: bool) -> dict[str, Any] | None:
    """`quality` of an arm: how many of its counted queries were judged, how many right, and what was spent on all whose answer is known,
    failed ones included, for each right one. None where no answer is known."""
    if not any(True for _ in _asked(queries, questions, "number")):
        return None
    right, wrong = (
        sum(1 for _ in _asked(queries.where(partial(_is, correct=correct)), questions, "number"))
        for correct in (True, False)
    )
    judged = right + wrong
    low, high = wilson(right, judged) if judged else (None, None)
    return {
        "judged": judged,
        "correct": right,
        "share": right / judged if judged else None,
        "low": low,
        "high": high,
        "per_correct": {name: _per_correct(queries, questions, name, right) for name in COSTS},
        "reason": None if judged else _FORCED if forced else _NONE,
    }


def _is(kind: QueryKind, *, correct: bool) -> bool:
    return kind.correct is correct


def _asked(queries: Rows[QueryKind], questions: Sequence[Question], name: str) -> Iterator[Any]:
    """A column, of the queries whose question has a known answer."""
    for number, value in queries.rows("number", name):
        if (one := asked(questions, number)) is not None and one.answer is not None:
            yield value


def _per_correct(queries: Rows[QueryKind], questions: Sequence[Question], name: str, right: int) -> float | None:
    names = (name, "retries") if name == "calls" else (name,)
    values = [value for each in names for value in _asked(queries, questions, each)]
    return None if not right or None in values else math.fsum(values) / right
