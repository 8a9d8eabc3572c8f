"""A prompt that is one text: cut so that what prompts share is shared again."""

from itertools import pairwise, takewhile

from hypothesis import given
from hypothesis import strategies as st

from fanmark.loadgen.recording import Said
from fanmark.loadgen.tap.pieces import beginnings, ending, pieces
from fanmark.loadgen.tap.seen import NOWHERE, NOWHERE_ASKED, Seen

WHOLE = Said("whole", 9_999)
ENDS = (*range(256, 4_097, 256), *range(4_608, 16_385, 512), *range(18_432, 24_001, 2_048))  # of pieces


def cut(text: str, *earlier: Seen) -> list[tuple[Said, Seen | None]]:
    return pieces(b"salt", text, WHOLE, earlier)


def reply(n: int, text: str) -> Seen:
    return Seen(n, 0.0, NOWHERE_ASKED, NOWHERE, text=text)


@given(st.integers(0, 20_000), st.integers(0, 3_000), st.integers(0, 3_000))
def test_prompts_share_what_they_begin_with_but_for_less_than_a_piece(common: int, one: int, other: int) -> None:
    first, second = (cut("a" * common + letter * more) for letter, more in (("b", one), ("c", other)))
    alike = list(takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
    shared = 4 * sum(told.tokens for (told, _), _ in alike)
    least = max((end for end in ENDS if end <= common), default=0)
    assert least - 3 <= shared <= common + 3 or (one, other) == (0, 0) or min(one, other) == 0


def test_a_reply_that_was_read_is_a_piece_of_its_own_and_later_turns_begin_alike() -> None:
    replies = [reply(n, f"this is what call number {n} has said") for n in (1, 2)]
    turns = ["q" * 300]
    for said in replies:
        turns.append(turns[-1] + said.text + " and now?")
    cuts = [cut(text, *replies[:i]) for i, text in enumerate(turns)]
    assert [source and source.n for _, source in cuts[2]] == [None, None, 1, None, 2, None]
    assert [told.author for told, _ in cuts[2]] == ["user", "user", "assistant", "user", "assistant", "user"]
    for before, after in pairwise(cuts):
        assert after[: len(before)] == before


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(1, 400))
def test_pieces_are_made_to_add_up_at_their_end(sizes: list[int], tokens: int) -> None:
    found = [Said(str(i), size) for i, size in enumerate(sizes)]
    made = ending(found, tokens)
    assert sum(told.tokens for told in made) == tokens and all(told.tokens > 0 for told in made)
    assert made[:-1] == found[: len(made) - 1] and (made == found) == (sum(sizes) == tokens)


@given(st.integers(0, 20_000), st.integers(0, 3_000), st.integers(0, 3_000))
def test_messages_share_their_beginnings(common: int, one: int, other: int) -> None:
    """As far as they are alike, but for less than a piece; lengths are in the proportion of the text."""
    first, second = (
        beginnings(b"salt", "a" * common + letter * more, (common + more) // 5)
        for letter, more in (("b", one), ("c", other))
    )
    shared = sum(a[0] == b[0] for a, b in zip(first, second, strict=False))
    assert shared == sum(end <= common for end in ENDS if end < common + min(one, other))
    assert sum(tokens for _, tokens in first) <= (common + one) // 5
