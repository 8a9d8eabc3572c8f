"""`[workload] file`: JSON lines {"prompt" or "messages", "answer"?, "max_tokens"?} -> Questions, and back into a run's folder."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.mistakes import convert, show
from fanmark.loadgen.questions import Question
from fanmark.loadgen.scenario import Table

Text = Annotated[str, msgspec.Meta(min_length=1)]
EXAMPLE = '{"prompt": "What is 6 x 7?", "answer": "42"}'


class _Message(Table, frozen=True):
    """As in a chat request; its content is text."""

    role: Literal["system", "user", "assistant"]
    content: Text


class _Line(Table, frozen=True):
    """A line as it is written."""

    prompt: Text | None = None
    messages: Annotated[list[_Message], msgspec.Meta(min_length=1)] | None = None
    answer: str | int | float | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None


def read_questions(path: Path, where: str) -> list[Question]:
    """The questions of a file, which `where` names. Raises ScenarioError at the first mistake, with its line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8"
        raise ScenarioError(
            f"{where}: cannot be read ({reason}): give a file with a question a line, {EXAMPLE}"
        ) from None
    found: list[Question] = []
    first = 0
    for i, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        found.append(_question(line, f"{path}: line {i}"))
        first = first or i
        if (found[-1].system is None) != (found[0].system is None):
            having, lacking = (i, first) if found[0].system is None else (first, i)
            raise ScenarioError(
                f"{path}: line {i}: messages: line {having} has a system message and line {lacking} has none: give it to all or none"
            )
    if not found:
        raise ScenarioError(f"{where}: is empty: give a question a line, {EXAMPLE}")
    return found


def _question(line: str, where: str) -> Question:
    try:
        raw = msgspec.json.decode(line)
    except msgspec.DecodeError as e:
        raise ScenarioError(f"{where}: is not JSON ({e}): give an object a line, {EXAMPLE}") from None
    if not isinstance(raw, dict):
        raise ScenarioError(f"{where}: is {show(raw)}: give an object a line, {EXAMPLE}")
    given = convert(raw, _Line, where)
    if (given.prompt is None) == (given.messages is None):
        raise ScenarioError(f"{where}: give either prompt or messages, {EXAMPLE}")
    messages = given.messages or [_Message(role="user", content=given.prompt or "")]
    system = messages[0].content if messages[0].role == "system" else None
    rest = messages[1:] if system is not None else messages
    if any(message.role == "system" for message in rest):
        raise ScenarioError(f"{where}: messages: a system message that is not the first: give one, or none")
    if not rest or rest[-1].role != "user":
        raise ScenarioError(f'{where}: messages: the last one must be a question: give it the role "user"')
    said = tuple((message.role, message.content) for message in rest)
    return Question(said, system, None if given.answer is None else str(given.answer), given.max_tokens)


def write_questions(path: Path, questions: Iterable[Question]) -> None:
    """The same questions as a file."""
    path.write_bytes(b"".join(msgspec.json.encode(_line(question)) + b"\n" for question in questions))


def _line(question: Question) -> dict[str, object]:
    said: Sequence[tuple[str, str]] = question.messages
    if question.system is not None:
        said = [("system", question.system), *said]
    rest = {"answer": question.answer, "max_tokens": question.max_tokens}
    messages = [{"role": role, "content": content} for role, content in said]
    return {"messages": messages} | {key: value for key, value in rest.items() if value is not None}
