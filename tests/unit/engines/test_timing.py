"""Figures of speed, worked out by hand from the times of tokens."""

import pytest

from mka.engines.exchange import Run
from mka.engines.timing import collect_figures, measure_decode, measure_first_token, measure_prefill


def test_prefill_is_all_prompts_until_the_last_is_read():
    assert measure_prefill(Run(2, 1, ((1.0,), (4.0,))), 100) == pytest.approx(50)


def test_the_first_token_is_that_of_a_prompt_in_the_middle():
    assert measure_first_token(Run(3, 2, ((1.0, 9.0), (2.0, 9.0), (6.0, 9.0)))) == 2.0


def test_decoding_counts_from_when_every_prompt_is_read():
    """At 1 the second prompt is still read, until 2; after that there are 3 and 4 of the first, 3 of the second."""
    assert measure_decode(Run(2, 4, ((1.0, 2.0, 3.0, 4.0), (2.0, 3.0)))) == pytest.approx(3 / 2)
    assert measure_decode(Run(1, 3, ((0.5, 0.75, 1.0),))) == pytest.approx(4)
    assert measure_decode(Run(2, 2, ((1.0, 1.5), (2.0,)))) is None


def test_figures_are_medians_per_number_at_once():
    slow, fast = Run(1, 2, ((1.0, 2.0),)), Run(1, 2, ((1.0, 1.5),))
    found = collect_figures([Run(1, 1, ((2.0,),)), slow, fast, fast, Run(4, 1, ((1.0,),) * 4), Run(2, 2, ())], 10)
    assert list(found) == ["1", "4"]
    assert found["1"]["decode_tokens_per_second"] == {"median": 2.0, "least": 1.0, "most": 2.0, "n": 3}
    assert found["1"]["prefill_tokens_per_second"]["median"] == 5 and found["1"]["prefill_tokens_per_second"]["n"] == 1
    assert found["4"] == {"prefill_tokens_per_second": {"median": 40.0, "least": 40.0, "most": 40.0, "n": 1}}
