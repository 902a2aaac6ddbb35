"""Calibration windows, cut and dealt by hand."""

import pytest
import torch
from support.models import make_tokenizer

from mka.errors import CalibrationError
from mka.texts.windows import deal_windows, make_copies, pack_windows

PLAIN, WITH_BOS = make_tokenizer(), make_tokenizer(add_bos=True)


def words(first, count):
    """A text whose token ids are first, first + 1, ..."""
    return " ".join(f"w{i}" for i in range(first, first + count))


def test_texts_are_joined_and_cut_and_what_is_short_of_a_window_is_left():
    assert pack_windows(PLAIN, [words(3, 5), words(20, 1), words(30, 5)], 4) == [[3, 4, 5, 6], [7, 20, 30, 31]]


def test_every_window_starts_with_bos_where_the_tokenizer_adds_it_and_nowhere_else():
    windows = pack_windows(WITH_BOS, [words(3, 5), words(20, 6)], 4)
    assert windows == [[1, 3, 4, 5], [1, 6, 7, 20], [1, 21, 22, 23]]


def test_no_more_windows_than_wanted_and_no_more_texts_read_than_needed():
    class Counting:
        def __init__(self):
            self.bos_token_id, self.read = PLAIN.bos_token_id, []

        def __call__(self, some, **options):
            if isinstance(some, list):  # what is asked of it otherwise is how a sequence starts
                self.read += [text.strip() for text in some]
            return PLAIN(some, **options)

    tokenizer = Counting()
    texts = [words(3, 5), words(20, 5), words(30, 5)]
    assert pack_windows(tokenizer, texts, 4, most=2) == [[3, 4, 5, 6], [7, 20, 21, 22]]
    assert texts[1] in tokenizer.read and texts[2] not in tokenizer.read
    assert pack_windows(PLAIN, texts, 4, most=9) == pack_windows(PLAIN, texts, 4)


def test_all_windows_of_many_texts_are_those_of_one_text_after_the_other():
    texts = [words(3 + i % 40, 1 + i % 5) for i in range(2100)]
    one_by_one = pack_windows(PLAIN, texts, 8, most=10**6)
    assert pack_windows(PLAIN, texts, 8) == one_by_one
    assert len(one_by_one) == sum(1 + i % 5 for i in range(2100)) // 8


def test_no_text_gives_no_window():
    assert pack_windows(PLAIN, [], 4) == []
    assert pack_windows(WITH_BOS, [""], 4) == []


def deal(sizes, tokens, context=10, tokenizer=PLAIN):
    """Windows dealt per source, given windows there are per source."""
    texts = {source: [words(3, context) for _ in range(n)] for source, n in sizes.items()}
    return deal_windows(tokenizer, texts, context=context, tokens=tokens)


def counts(dealt):
    return {source: len(windows) for source, windows in dealt.items()}


@pytest.mark.parametrize(
    ("sizes", "tokens", "expected"),
    [
        # Shares 2.5, 1.5, 1 of 5 windows: one is left over and goes to the first of the largest remainders.
        ({"a": 5, "b": 3, "c": 2}, 50, {"a": 3, "b": 1, "c": 1}),
        # Shares 1.2, 1.6, 0.2 of 3: the remainder of 0.6 is the largest; nothing of c.
        ({"a": 6, "b": 8, "c": 1}, 30, {"a": 1, "b": 2}),
        # Shares 0.75, 0.75, 2.5 of 4: two are left over, and 0.75 twice is more than 0.5.
        ({"a": 3, "b": 3, "c": 10}, 40, {"a": 1, "b": 1, "c": 2}),
        # 39 tokens are 3 windows of 10.
        ({"a": 3, "b": 3}, 39, {"a": 2, "b": 1}),
        # More asked for than there is: everything.
        ({"a": 2, "b": 5}, 10_000, {"a": 2, "b": 5}),
        ({"a": 2, "b": 0}, 20, {"a": 2}),
    ],
)
def test_windows_are_dealt_by_share_and_largest_remainder(sizes, tokens, expected):
    assert counts(deal(sizes, tokens)) == expected


@pytest.mark.parametrize("wanted", range(2, 30))
def test_as_many_windows_are_dealt_as_were_asked_for_and_each_source_within_one_of_its_share(wanted):
    sizes = {"a": 7, "b": 11, "c": 1, "d": 10}
    dealt = counts(deal(sizes, 10 * wanted))
    assert sum(dealt.values()) == wanted
    assert all(abs(dealt.get(source, 0) - n * wanted / 29) < 1 for source, n in sizes.items())


def test_windows_come_from_the_start_of_each_source_and_are_whole():
    texts = {"a": [words(3, 10), words(30, 10)], "b": [words(60, 25)]}
    dealt = deal_windows(PLAIN, texts, context=10, tokens=20)
    assert torch.equal(dealt["a"], torch.tensor([list(range(3, 13))]))
    assert torch.equal(dealt["b"], torch.tensor([list(range(60, 70))]))
    with_bos = deal_windows(WITH_BOS, texts, context=10, tokens=40)
    assert {rows.shape[1] for rows in with_bos.values()} == {10}
    assert all((rows[:, 0] == 1).all() for rows in with_bos.values())


@pytest.mark.parametrize(
    ("sizes", "tokens", "there"), [({"a": 1}, 100, 1), ({"a": 9}, 19, 9), ({"a": 0, "b": 0}, 100, 0)]
)
def test_too_little_text_is_refused_in_one_line(sizes, tokens, there):
    with pytest.raises(CalibrationError, match=f"{there} windows of 10 tokens in the table") as caught:
        deal(sizes, tokens)
    assert f"tokens: {tokens}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [8, 9])
def test_copies_say_tokens_of_their_window_twice(length):
    windows = torch.arange(3 * length).reshape(3, length)
    copies = make_copies(windows, 4)
    assert copies.shape == (4, length) and torch.equal(copies, make_copies(windows, 4))
    half = (length - 1) // 2
    for index, copied in zip((0, 0, 1, 2), copies):  # four drawn evenly from three
        assert copied[0] == windows[index][0]
        said = copied[1 : 1 + half]
        assert torch.equal(copied[1 + half : 1 + 2 * half], said) and len(set(said.tolist())) == half
        assert set(said.tolist()) <= set(windows[index][1:].tolist())
    assert not torch.equal(copies[0], copies[1])  # the same window in another order
    assert [int(row[0]) for row in make_copies(windows, 2)] == [0, length]
    assert make_copies(windows, 0).shape == (0, length)
