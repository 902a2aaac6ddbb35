"""Where an engine and transformers differ first, and whether rounding can have decided."""

import math

import pytest

from mka.engines.agreement import compare
from mka.engines.exchange import Continuation
from mka.engines.reference import END, Reference

LIKELY, NEXT = math.log(0.5), math.log(0.49)
STEP = {7: LIKELY, 8: NEXT, 9: math.log(0.01)}


def transformers(*tokens, steps=None):
    return Reference(tokens, tuple(steps or [STEP] * len(tokens)))


def engine(*tokens, ended=False, logprobs=None):
    given = tuple(logprobs or [STEP.get(token, -9.0) for token in tokens])
    return Continuation(tokens, ended, given, ((),) * len(tokens))


def test_the_same_tokens_are_no_difference():
    found = compare([transformers(7, 7)] * 2, [engine(7, 7)] * 2, 0.1, 2)
    assert (found.tokens, found.agreed, found.prompts, found.same) == (4, 4, 2, 2)
    assert found.differences == found.faults == () and found.largest_error == 0


def test_a_near_tie_is_told_from_a_fault():
    """0.5 against 0.49 are 0.0202 nats, 0.5 against 0.01 are 3.9."""
    near = compare([transformers(7, 7, 7)], [engine(7, 8, 9)], 0.1, 3)
    [difference] = near.differences
    assert (difference.prompt, difference.token, difference.engine, difference.transformers) == (1, 2, 8, 7)
    assert difference.gap == pytest.approx(math.log(0.5 / 0.49)) and difference.near_tie
    assert difference.engine_logprob == NEXT and difference.transformers_logprob == LIKELY
    assert near.faults == () and (near.tokens, near.agreed, near.same) == (2, 1, 0)
    far = compare([transformers(7, 7, 7)], [engine(7, 9, 7)], 0.1, 3)
    assert not far.differences[0].near_tie and "token 2" in far.faults[0] and "3.91" in far.faults[0]


def test_what_follows_a_difference_is_not_compared():
    """Both read other texts from there on."""
    found = compare([transformers(7, 7, 7)], [engine(8, 9, 9)], 0.1, 3)
    assert found.faults == () and found.tokens == 1


def test_a_choice_beyond_the_most_likely_is_never_a_near_tie():
    found = compare([transformers(7)], [engine(55)], 100.0, 1)
    assert not found.differences[0].near_tie and found.differences[0].gap == pytest.approx(math.log(50))


def test_an_end_is_a_choice_like_any_other():
    steps = [{7: LIKELY, END: NEXT}, {7: LIKELY, END: NEXT}]
    ends = compare([transformers(7, END, steps=steps)], [engine(7, ended=True, logprobs=[LIKELY, NEXT])], 0.1, 9)
    assert ends.same == 1 and ends.faults == ()
    early = compare([transformers(7, 7, steps=steps)], [engine(ended=True, logprobs=[NEXT])], 0.1, 2)
    assert early.differences[0].engine == END and early.differences[0].near_tie
    likely = [{7: LIKELY, END: -8.0}]
    wrong = compare([transformers(7, steps=likely)], [engine(ended=True, logprobs=[-8.0])], 0.1, 1)
    assert "no near-tie" in wrong.faults[0]


@pytest.mark.parametrize(
    ("continuations", "fault"),
    [
        ([], "continued 0 of 1"),
        ([engine(7)], "stopped after 1 of 2"),
        ([engine(7, 7, logprobs=[LIKELY, None])], "token 2 has no finite"),
        ([engine(7, 7, logprobs=[LIKELY, LIKELY - 0.3])], "differ by up to 0.30 nats"),
    ],
)
def test_faults_beside_the_tokens(continuations, fault):
    assert fault in compare([transformers(7, 7)], continuations, 0.1, 2).faults[0]
