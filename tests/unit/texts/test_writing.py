import pytest

from mka.errors import RecipeError
from mka.texts.rows import text_digest
from mka.texts.writing import FEWEST_TOKENS, KINDS, OPENINGS, Wanted, judge_text, measure_repetition


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], 0.0),
        ([1, 2, 3], 0.0),
        ([1, 2, 3, 4], 0.0),
        # Runs 1234 2341 3412 4123 1234: one of five was there before.
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),
        # Twenty times the same token is seventeen times the same run.
        ([7] * 20, 16 / 17),
        (list(range(100)), 0.0),
    ],
)
def test_repetition_is_the_share_of_runs_of_four_that_were_there_before(ids, expected):
    assert measure_repetition(ids) == pytest.approx(expected)


def test_a_text_is_left_out_for_the_first_reason_that_applies():
    good = list(range(10, 40))
    seen = {text_digest("a  Text")}

    def judge(text, ids):
        return judge_text(text, ids, frozenset({0, 1}), seen)

    assert judge("something new", good) is None
    assert judge("something new", good[:15]) == "short" and judge("something new", good[:16]) is None
    assert judge("cut \ufffd here", good) == "unreadable" and judge("cut \0 here", good) == "unreadable"
    assert judge("something new", [*good, 1]) == "special"
    assert judge("something new", [10] * 30) == "repetitive"
    assert judge("A text", good) == "duplicate"
    # Nine of 27 runs of a text that begins again are above 0.3, eight of 27 are not.
    assert judge("something new", [*good[:18], *good[:12]]) == "repetitive"
    assert judge("something new", [*good[:19], *good[:11]]) is None


def test_texts_are_as_long_as_their_share_within_bounds():
    assert Wanted(100_000).length == 256
    assert Wanted(25_600, 256).length == 100
    assert Wanted(25_601, 256).length == 101
    assert Wanted(10_000, 256).length == 64
    assert Wanted(100_000, 256).length == 256


def test_too_few_tokens_are_refused_in_one_line():
    assert FEWEST_TOKENS == 2 * 64 * (len(OPENINGS) + 2) == 2 * 64 * KINDS
    assert Wanted(FEWEST_TOKENS).tokens == FEWEST_TOKENS
    with pytest.raises(
        RecipeError, match=f"^{FEWEST_TOKENS - 1} tokens are too few to write: at least {FEWEST_TOKENS}"
    ):
        Wanted(FEWEST_TOKENS - 1)


def test_no_opening_ends_in_a_space_or_stands_in_two_kinds():
    texts = [text for group in OPENINGS.values() for text in group]
    assert all(text == text.strip() for text in texts) and len(set(texts)) == len(texts)
