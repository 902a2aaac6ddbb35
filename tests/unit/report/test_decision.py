"""The sentence that page and terminal begin with, from the meaning of the figures: saved, lost, use it or not."""

import pytest

from mka.evaluation.scores import EvalReport, Score
from mka.report.decision import asks_too_little, tell_decision, tell_demonstration
from mka.report.speeds import warn_of_others
from mka.report.table import result_table


def report(layers=30, size=100.0, decode=None, perplexity=10.0, served=None, conditions=None):
    """Decode: the slowest, the median and the fastest round."""
    speed = dict(zip(("_least", "", "_most"), decode or ()))
    facts = {"layers": layers, "bytes": size * 1e6, "parameters": 1e6 * layers}
    return EvalReport(
        facts | ({"served_bytes": served * 1e6} if served else {}),
        (Score("boolq", "perplexity", perplexity, 0.1, 8, False),) if perplexity else (),
        {f"decode_tokens_per_second{end}": rate for end, rate in speed.items()},
        {},
        conditions or {},
    )


def gate(verdict="pass", threshold=0.9, lower=0.95, **changes):
    check = {"name": "perplexity boolq", "recovery": 0.97, "lower": lower, "upper": 0.99, "threshold": threshold}
    check |= {"verdict": verdict, "n": 8, "metric": "perplexity", "bound": "recovery"}
    return {"verdict": verdict, "checks": [check | changes]}


BASE = report(size=400.0, served=200.0, decode=(19.0, 20.0, 21.0))
# Rounding alone halves the bytes that are served, and nothing is faster.
CONTROL = report(size=120.0, served=100.0, decode=(19.0, 20.0, 20.5), perplexity=10.1)
KEPT = "the control (same rounding, all layers kept)"


def test_only_bytes():
    candidate = report(28, 114.0, (18.5, 20.0, 21.5), 10.3, served=94.0)
    assert tell_decision(BASE, candidate, CONTROL, gate()) == (
        "Saves 53 % of the bytes (50 % by bits, 3 % by depth) of the base as served in 16 bits; decoding speed cannot "
        "be told from the base's; perplexity 1.03 times as high as the base's: use it where bytes count, and "
        f"{KEPT} where they do not."
    )


def test_only_time():
    candidate = report(28, 120.0, (24.0, 25.0, 26.0), 10.3, served=100.0)
    assert tell_decision(BASE, candidate, CONTROL, gate()) == (
        "Saves 50 % of the bytes (50 % by bits, 0 % by depth) and 20 % of the decoding time (by depth alone) of "
        "the base as served in 16 bits; perplexity 1.03 times as high as the base's: use it where time "
        f"counts, and {KEPT} where it does not."
    )


def test_time_is_shared_out_where_timing_tells_its_parts():
    # Rounding slows the base down from 20 to 16 tokens per second, fewer layers bring 25: of 50 ms, −12.5 and 22.5.
    slow = report(size=120.0, served=100.0, decode=(15.5, 16.0, 16.5))
    told = tell_decision(BASE, report(28, 120.0, (24.0, 25.0, 26.0), served=100.0), slow, gate())
    assert "20 % of the decoding time (−25 % by bits, 45 % by depth)" in told
    like_control = report(28, 120.0, (15.0, 16.2, 17.0), served=100.0)
    assert "takes 23 % of the decoding time (by bits alone) more" in tell_decision(BASE, like_control, slow, gate())


def test_nothing_gained():
    candidate = report(28, 130.0, (15.0, 16.0, 17.0), 10.3, served=104.0)
    told = tell_decision(BASE, candidate, CONTROL, gate())
    # A quarter more time: 1/16 beside 1/20 of a second per token.
    assert told == (
        "Saves 48 % of the bytes (50 % by bits, −2 % by depth) of the base as served in 16 bits; takes 25 % of the "
        "decoding time (by depth alone) more; perplexity 1.03 times as high as the base's: do not use it, "
        f"it wins neither bytes nor time against {KEPT}, which is nearer to the base."
    )
    same = tell_decision(BASE, report(28, 400.0, (19.0, 20.0, 21.0), served=200.0), BASE, gate())
    assert same.startswith("Saves nothing of the base as served in 16 bits; decoding speed cannot be told")
    assert same.endswith("do not use it, it wins neither bytes nor time against the base.")
    healed = tell_decision(BASE, report(28, 130.0, perplexity=9.0, served=104.0), CONTROL, gate())
    assert healed.endswith(f"use it for its quality alone, it wins neither bytes nor time against {KEPT}.")


def test_undecided_and_refused_say_what_was_found_and_needed():
    candidate = report(28, 114.0, perplexity=11.0, served=94.0)
    found = "(perplexity boolq 0.970 [0.950 to 0.990], needed ≥ 0.980)"
    assert tell_decision(BASE, candidate, CONTROL, gate("undecided", 0.98)).endswith(
        f": do not use it yet, the gate is undecided {found} and more items would decide."
    )
    assert tell_decision(BASE, candidate, CONTROL, gate("fail", 0.98)).endswith(
        f": do not use it, the gate refused it {found}."
    )


def test_what_was_not_judged_or_measured():
    assert tell_decision(BASE, report(28, 114.0, served=94.0), None, None) == (
        "Saves 53 % of the bytes of the base as served in 16 bits; perplexity 1.00 times as high as the base's: "
        "no gate judged it, decide by the figures."
    )
    bare = report(28, 114.0, perplexity=None)
    assert tell_decision(report(size=400.0), bare, None, None) == (
        "Saves 72 % of the bytes of the base; what is lost was not measured: measure it before you use it."
    )
    assert tell_decision(None, bare, None, None) == tell_decision(bare, None, None, None) == ""


def test_rounding_alone_has_only_the_base_to_beat():
    rounded = report(30, 120.0, perplexity=10.1, served=100.0)
    told = tell_decision(BASE, rounded, CONTROL, gate())
    assert "(50 % by bits, 0 % by depth)" in told
    assert told.endswith("use it where bytes count, and the base where they do not.")


@pytest.mark.parametrize(
    ("decision", "asked"),
    [
        (gate(threshold=0.9), ""),
        (gate(threshold=0.95), ""),
        (gate(threshold=0.85, lower=0.86), "0.85 of the base"),
        (gate(threshold=0.5, lower=0.92), "0.5 of the base"),
        (gate(metric="bytes", bound="most", recovery=None, value=1e6, threshold=2e6), "no quality"),
        (gate(metric="perplexity", bound="most", recovery=None, value=11.0, threshold=12.0), ""),
    ],
)
def test_a_gate_that_asks_for_less_is_a_demonstration(decision, asked):
    assert asks_too_little(decision) == bool(asked)
    assert tell_demonstration(decision) == (
        f"A demonstration: its gate asks for {asked}; less than 0.9 of the base shows how the program works, not that "
        "a model is good."
        if asked
        else ""
    )


def test_a_demonstration_is_no_model_to_use_unless_more_was_found_than_asked():
    candidate = report(28, 114.0, perplexity=11.5, served=94.0)
    assert tell_decision(BASE, candidate, CONTROL, gate(threshold=0.85, lower=0.86)).endswith(
        ": a demonstration and no model to use, since its gate asks for 0.85 of the base."
    )
    assert ": use it where bytes count" in tell_decision(BASE, candidate, CONTROL, gate(threshold=0.85, lower=0.92))
    assert tell_demonstration(None) == ""
    # A bound on bytes beside it is no quality, and takes nothing away.
    facts = gate(metric="bytes", bound="most", recovery=None, lower=None, value=1e6, threshold=2e8)["checks"]
    both = gate(threshold=0.85, lower=0.92) | {"checks": gate(threshold=0.85, lower=0.92)["checks"] + facts}
    assert ": use it where bytes count" in tell_decision(BASE, candidate, CONTROL, both)
    told = tell_decision(BASE, candidate, CONTROL, {"verdict": "pass", "checks": facts})
    assert told.endswith("since its gate asks for no quality.")


@pytest.mark.parametrize(
    ("timing", "said"),
    [
        ({"rounds": 5, "cores": 2, "others_busy_cores": 1.25}, "other programs kept 1.2 of 2 cores."),
        ({"rounds": 5, "cores": 16, "others_busy_cores": 1.25}, ""),
        ({"rounds": 5, "cores": 2, "others_busy_cores": 0.1}, ""),
        ({"rounds": "many", "cores": 2, "others_busy_cores": 2}, ""),
        (None, ""),
    ],
)
def test_a_busy_machine_is_told(timing, said):
    told = warn_of_others(report(conditions={"timing": timing} if timing else {}))
    assert told == (f"The machine was busy while speeds were timed: {said}" if said else "")


def test_the_table_has_both_sizes_ranges_and_no_ratio_where_they_overlap():
    slow, fast = report(28, 114.0, (20.5, 21.5, 22.0), served=94.0), report(28, 114.0, (24.0, 25.0, 26.0), served=94.0)
    rows = {row["quantity"]: row for row in result_table(BASE, slow, CONTROL)}
    assert rows["size"]["base"] == "400.0 MB" and rows["size"]["ratio"] == "0.285"
    served = rows["size as served, 16 bits"]
    assert (served["base"], served["control"], served["candidate"], served["ratio"]) == (
        *("200.0 MB", "100.0 MB", "94.0 MB"),
        "0.470",
    )
    # 200 MB in 30 M parameters are 53.3 bits each.
    assert rows["bits per parameter"]["base"] == "53.3"
    assert rows["decode speed"]["base"] == "20.0 (19.0 to 21.0) tokens/s"
    assert rows["decode speed"]["ratio"] == "ranges overlap"
    apart = {row["quantity"]: row["ratio"] for row in result_table(BASE, fast, CONTROL)}
    assert apart["decode speed"] == "1.250"
    # A base that is stored in 16 bits has one size.
    assert [row["quantity"] for row in result_table(report(served=100.0), report(28, 94.0, served=94.0))][2:4] == [
        "size",
        "bits per parameter",
    ]
