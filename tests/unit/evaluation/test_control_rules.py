"""Rules `better_than: control`: facts by comparison, metrics by a paired bootstrap that has to exclude a tie."""

import json
import math

import pytest

from mka.errors import GuardError, NumericsError
from mka.evaluation.gate import decide
from mka.evaluation.rules import asks_control, rules_against_champion
from mka.evaluation.scores import EvalReport, Score
from mka.recipe import GateRule, GateSettings
from mka.report.verdict import describe_check, describe_decision, tell_checks

BASE = [300.0, 310.0, 305.0, 295.0]
# Differs from the base's by another amount in every window, half of them up.
AROUND = [290.0, 320.0, 294.0, 306.0]


def text(nll, name="prose", tokens=100):
    items = tuple((float(value), tokens) for value in nll)
    return Score(name, "perplexity", math.exp(sum(nll) / (tokens * len(nll))), 0.1, len(nll), False, items)


def task(items, name="piqa"):
    return Score(name, "acc", sum(items) / len(items), 0.1, len(items), True, tuple(items))


def report(*scores, speed=50.0, **facts):
    return EvalReport(facts, scores, {"decode_tokens_per_second": speed}, {}, {})


def beat(*metrics):
    return GateSettings(rules=tuple(GateRule(metric=metric, better_than="control") for metric in metrics))


def shift(nll, by):
    return [value + by for value in nll]


@pytest.mark.parametrize(
    ("metric", "ours", "theirs", "verdict"),
    [
        ("bytes", {"bytes": 118e6}, {"bytes": 142e6}, "pass"),
        ("bytes", {"bytes": 142e6}, {"bytes": 142e6}, "fail"),
        ("bytes", {"bytes": 143e6}, {"bytes": 142e6}, "fail"),
        ("parameters", {"parameters": 90e6}, {"parameters": 100e6}, "pass"),
        ("layers", {"layers": 30}, {"layers": 30}, "fail"),
        ("decode_tokens_per_second", {"speed": 59.0}, {"speed": 50.0}, "pass"),
        ("decode_tokens_per_second", {"speed": 50.0}, {"speed": 50.0}, "fail"),
        ("decode_tokens_per_second", {"speed": 49.0}, {"speed": 50.0}, "fail"),
    ],
)
def test_a_fact_has_to_be_better_in_its_own_direction(metric, ours, theirs, verdict):
    (check,) = decide(report(), report(**ours), beat(metric), seed=0, control=report(**theirs)).checks
    assert (check.verdict, check.lower, check.upper, check.n) == (verdict, None, None, None)
    assert [check.value, check.threshold] == [*ours.values(), *theirs.values()]


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [(shift(BASE, -25), "pass"), (shift(BASE, 25), "fail"), (BASE, "fail"), (AROUND, "undecided")],
)
def test_a_metric_has_to_exclude_a_tie(ours, verdict):
    (check,) = decide(
        report(text(BASE)), report(text(ours)), beat("perplexity"), seed=0, control=report(text(BASE))
    ).checks
    assert check.verdict == verdict and check.bound == "better_than" and check.recovery is None
    assert [check.value, check.threshold] == pytest.approx([math.exp(sum(nll) / 400) for nll in (ours, BASE)])
    if ours is AROUND:
        assert check.lower < 1 < check.upper
    else:  # every window differs by the same: nothing is left to chance
        assert [check.lower, check.upper] == pytest.approx([math.exp((sum(BASE) - sum(ours)) / 400)] * 2)


def test_items_are_paired_with_the_controls_and_more_is_better():
    solved = [1] * 30 + [0] * 10
    half = [1, 0] * 20
    for ours, theirs, verdict in ((solved, half, "pass"), (half, solved, "fail"), (half, half, "fail")):
        base, candidate, control = report(task([1, 0] * 20)), report(task(ours)), report(task(theirs))
        (check,) = decide(base, candidate, beat("tasks"), seed=0, control=control).checks
        assert (check.name, check.verdict, check.n) == ("tasks against control", verdict, 40)
        assert (check.value, check.threshold) == (sum(ours) / 40, sum(theirs) / 40)


def test_where_nothing_is_rounded_the_base_is_what_has_to_be_beaten():
    base, fewer = report(text(BASE), bytes=100.0), report(text(shift(BASE, 5)), bytes=90.0)
    checks = decide(base, fewer, beat("bytes", "perplexity"), seed=0, control=base).checks
    assert [check.verdict for check in checks] == ["pass", "fail"]


def test_both_numbers_and_the_control_are_named_wherever_a_verdict_is_told():
    base, candidate = report(text(BASE)), report(text(shift(BASE, 25)), bytes=118e6, speed=59.0)
    control = report(text(BASE), bytes=142.1e6, speed=50.0)
    decision = decide(base, candidate, beat("bytes", "decode_tokens_per_second", "perplexity"), seed=0, control=control)
    body = json.loads(json.dumps(decision.to_dict(), allow_nan=False))
    assert body["verdict"] == "fail"
    size, speed, perplexity = map(describe_check, body["checks"])
    assert (size["name"], size["figure"], size["threshold"]) == (
        "bytes against control",
        "118.0 MB",
        "< control 142.1 MB",
    )
    assert (speed["figure"], speed["threshold"]) == ("59.0 tokens/s", "> control 50.0 tokens/s")
    # exp(1210 / 400) = 20.59 and exp(1310 / 400) = 26.44; exp(-0.25) = 0.779.
    assert (perplexity["figure"], perplexity["threshold"]) == ("26.44", "< control 20.59")
    assert perplexity["bounds"] == "0.779 to 0.779 (1: a tie)"
    lines = describe_decision(body)
    assert "better than control 142.1 MB" in lines[1] and "118.0 MB" in lines[1] and lines[1].endswith("pass")
    assert "bounds [ 0.779,  0.779] (1: a tie)" in lines[3] and "better than control 20.59" in lines[3]
    assert tell_checks(body, "fail") == (
        "perplexity prose against control 26.44 [0.779 to 0.779 (1: a tie)], needed < control 20.59"
    )


def test_what_cannot_be_compared_is_refused():
    one = report(text(BASE), bytes=100.0)
    with pytest.raises(GuardError, match="compares with the control, of which there is no report"):
        decide(one, one, beat("bytes"), seed=0)
    with pytest.raises(GuardError, match="the report of the control does not tell it"):
        decide(one, one, beat("bytes"), seed=0, control=report(text(BASE)))
    with pytest.raises(GuardError, match="control and candidate differ in items"):
        decide(one, one, beat("perplexity"), seed=0, control=report(text(BASE[:3])))
    with pytest.raises(GuardError, match="measured of the control only"):
        decide(one, one, beat("perplexity"), seed=0, control=report(text(BASE), text(BASE, "code")))
    with pytest.raises(NumericsError, match="the control solves no item"):
        some, none = report(task([1, 0])), report(task([0, 0]))
        decide(some, some, beat("tasks"), seed=0, control=none)


def test_a_control_that_others_rules_do_not_ask_for_is_not_looked_at():
    one = report(text(BASE))
    plain = GateSettings(rules=(GateRule(metric="perplexity", recovery=0.5),))
    assert decide(one, one, plain, seed=0, control=report()) == decide(one, one, plain, seed=0)
    assert asks_control(beat("bytes")) and not asks_control(plain) and not asks_control(GateSettings())
    # A champion in the base's place has no control.
    assert not asks_control(rules_against_champion(beat("bytes")))
