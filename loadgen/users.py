"""The users of a closed loop: each asks the queries of a session one after another, thinks in between, and then begins the next. Pure.

Turn k of a session is a query that reads the turns before it, each question and its final answer, right before its own question, in every
prompt in which that stands. A turn that got no answer is not told again.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from msgspec import structs

from fanmark.agents.runtime import Expected, Key, Message
from fanmark.loadgen.crew import Crew
from fanmark.loadgen.endpoint import Endpoint
from fanmark.loadgen.lengths import draw, draw_int
from fanmark.loadgen.records import Call
from fanmark.loadgen.scenario import Load, Scenario

QUESTION: Key = ("question",)
TOLD = (
    "told"  # what the keys of messages of earlier turns begin with; then comes their query's number, and their own key
)


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn that was answered, as it is read again: its query's number, its question, and its final answer, whose target was
    `answered_by`, with its token ids where that tells them."""

    query: int
    question: Message
    answer: Message
    answered_by: Endpoint | None = None
    ids: list[int] | None = None


def turn_of(
    query: int, question: Message, answer: Message, answered_by: Endpoint | None = None, ids: list[int] | None = None
) -> Turn:
    """The turn that a query was, with its messages as those of any later query."""
    asked = replace(question, key=(TOLD, query, *question.key))
    said = Message((TOLD, query, *answer.key), "assistant", answer.text, answer.tokens, per_query=True)
    return Turn(query, asked, said, answered_by, ids)


def written_last(calls: Iterable[Call], numbers: Mapping[Key, int]) -> Key | None:
    """The reply that ended last, of those that ended: a query's final answer. `numbers` are their calls."""
    ended = {call.call: call.done_at or 0.0 for call in calls if call.error is None}
    written = [key for key, number in numbers.items() if number in ended]
    return max(written, key=lambda key: (ended[numbers[key]], numbers[key]), default=None)


def text_seed(message: Message, run_seed: int, query_seed: str) -> str:
    """What a message's text is made from: the run, the query, or the earlier query that asked it first."""
    if message.key[0] == TOLD:
        return key_seed(run_seed, message.key[1:])
    return key_seed(query_seed if message.per_query else run_seed, message.key)


def key_seed(seed: int | str, key: Key) -> str:
    """What the text of a key is made from."""
    return "/".join(map(str, (seed, *key)))


@dataclass
class Session:
    """Number `index` of its arm. Its queries have the places from `first` on, in the order of all sessions, `turns` of them; `turn` is the
    one that is asked, `told` those that were answered."""

    index: int
    first: int
    turns: int
    turn: int = 0
    told: list[Turn] = field(default_factory=list)


def place_of(session: Session | None) -> tuple[int | None, int | None]:
    """The session and its turn, as a query's record has them."""
    return (None, None) if session is None else (session.index, session.turn)


def sessions(load: Load, seed: int, first: int = 0, index: int = 0) -> Iterator[Session]:
    """An arm's sessions from this place on, the same in every arm; with `load.queries` the last one ends with them."""
    end = None if load.queries is None else first + load.queries
    for number in count(index):
        turns = draw_int(load.turns, seed, "session", number)
        if end is not None:
            turns = min(turns, end - first)
        if turns <= 0:
            return
        yield Session(number, first, turns)
        first += turns


def own_sessions(load: Load, seed: int, first: int, index: int, crew: Crew) -> Iterator[Session]:
    """Those of the sessions from here on that are one worker's: a whole one always is."""
    for session in sessions(load, seed, first, index):
        if (session.index - index) % load.concurrency % crew.count == crew.index:
            yield session


def planned_sessions(scenario: Scenario, most: int) -> dict[str, dict[int, Session]]:
    """By arm, the session of each place, repeat after repeat; without users none. Where nothing says how many queries there will be, of the
    first `most`."""
    found: dict[str, dict[int, Session]] = {arm.name: {} for arm in scenario.arms}
    first = index = 0
    for _ in range(scenario.load.repeats if scenario.load.users is not None else 0):
        after, later = first, index
        for arm in scenario.arms:
            load = scenario.load_of(arm)
            load = load if load.queries is not None else structs.replace(load, queries=most)
            for session in sessions(load, scenario.seed, first, index):
                found[arm.name] |= dict.fromkeys(range(session.first, session.first + session.turns), session)
                after, later = max(after, session.first + session.turns), max(later, session.index + 1)
        first, index = after, later
    return found


def think_s(load: Load, seed: int, place: int) -> float:
    """How long a user thinks before the query at this place."""
    return draw(load.think_s, random.Random(f"{seed}/think/{place}"))


def with_told(prompt: Iterable[Message], told: Sequence[Turn]) -> list[Message]:
    """The prompt with the turns before right in front of the question."""
    before = [message for turn in told for message in (turn.question, turn.answer)]
    found: list[Message] = []
    for message in prompt:
        found += [*before, message] if message.key == QUESTION else [message]
    return found


def told_tokens(told: Sequence[Turn]) -> dict[Key, int]:
    """How long the messages of these turns are, by what was drawn and written."""
    return {message.key: message.tokens for turn in told for message in (turn.question, turn.answer)}


def expected_with(form: Expected, told: Sequence[Turn]) -> Expected:
    """The closed form of a query that tells these turns again: each of their messages is read as often as the question."""
    times = form.reads.get(QUESTION, 0)
    again = {message.key: times for turn in told for message in (turn.question, turn.answer)}
    return replace(form, reads={**form.reads, **again})
