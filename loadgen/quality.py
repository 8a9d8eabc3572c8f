"""Final answers held against the known ones, and what a right one costs. Pure.

A known answer that is a number is met by the last number of the text, however it is written (1,000 and 1000.0 are one); any other by the
whole text, but for case, white space and a full stop. Where several calls answer last and nobody reads them, the majority of them answers.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from fanmark.agents.runtime import Key
from fanmark.loadgen.amplification import spent
from fanmark.loadgen.questions import Question, asked
from fanmark.loadgen.records import Call, Query
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


def quality(queries: Sequence[Query], questions: Sequence[Question], *, forced: bool) -> dict[str, Any] | None:
    """`quality` of an arm: how many of its counted queries were judged, how many right, and what was spent on all whose answer is known,
    failed ones included, for each right one. None where no answer is known."""
    with_answer = [q for q in queries if (one := asked(questions, q.query)) is not None and one.answer is not None]
    if not with_answer:
        return None
    judged = [query for query in with_answer if query.correct is not None]
    right = sum(query.correct or False for query in judged)
    low, high = wilson(right, len(judged)) if judged else (None, None)
    return {
        "judged": len(judged),
        "correct": right,
        "share": right / len(judged) if judged else None,
        "low": low,
        "high": high,
        "per_correct": {name: _per_correct(with_answer, name, right) for name in COSTS},
        "reason": None if judged else _FORCED if forced else _NONE,
    }


def _per_correct(queries: Sequence[Query], name: str, right: int) -> float | None:
    if not right or any(query.resources[name] is None for query in queries if query.outcome == "completed"):
        return None
    return math.fsum(spent(query, name) for query in queries) / right
