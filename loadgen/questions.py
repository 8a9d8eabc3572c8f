"""The questions of a file (question_file.py), asked in place of generated ones."""

import math
from collections.abc import Sequence

import msgspec

from fanmark.agents.runtime import Author

CHARS_PER_TOKEN = (
    4.5  # of English prose, where no tokenizer tells: vocabularies of 100,000 tokens and more differ by a few per cent
)


class Question(msgspec.Struct, frozen=True):
    """One line: the question's messages, the last of which is a user's, and the system message that stands in place of the workload's, if
    any; the answer, where it is known; the most tokens that the final answer may have."""

    messages: tuple[tuple[Author, str], ...]
    system: str | None = None
    answer: str | None = None
    max_tokens: int | None = None

    @property
    def text(self) -> str:
        """All that its messages say."""
        return "\n".join(text for _, text in self.messages)


def asked(questions: Sequence[Question], query: int) -> Question | None:
    """What query number `query` asks: the lines in order, over and over. Warm-up, whose numbers are negative, takes them from the end."""
    return questions[query % len(questions)] if questions else None


def about_tokens(text: str) -> int:
    """How long a text is where no tokenizer tells."""
    return max(1, math.ceil(len(text) / CHARS_PER_TOKEN))
