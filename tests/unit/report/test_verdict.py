"""What ends a command whose gate did not pass, and what would decide an undecided one."""

import math

import numpy as np
import pytest

from mka.errors import GateRefused, GateUndecided
from mka.evaluation.gate import decide
from mka.evaluation.scores import EvalReport, Score
from mka.recipe import GateSettings
from mka.report.verdict import count_needed, refuse_verdict


def check(n=16, **changes):
    return {"name": "perplexity a", "metric": "perplexity", "bound": "recovery", "value": None, "n": n} | changes


@pytest.mark.parametrize(
    ("changes", "times"),
    [
        # The bound between estimate and threshold has to come from 2 distances to 1: four times as many.
        ({"recovery": 0.93, "lower": 0.87, "upper": 0.99, "threshold": 0.9}, 4),
        ({"recovery": 0.88, "lower": 0.80, "upper": 0.92, "threshold": 0.9}, 4),
        ({"recovery": None, "value": 5.0, "lower": 4.0, "upper": 7.0, "threshold": 6.0, "bound": "most"}, 4),
        # Against the control, 1 is a tie, whatever the control's own value.
        ({"recovery": None, "value": 5.0, "lower": 0.95, "upper": 1.15, "threshold": 8.0, "bound": "better_than"}, 4),
        ({"recovery": 0.9, "lower": 0.8, "upper": 1.0, "threshold": 0.9}, None),
        ({"recovery": 0.9001, "lower": 0.8, "upper": 1.0, "threshold": 0.9}, None),
        ({"recovery": 0.95, "lower": 0.8, "upper": None, "threshold": 0.9}, None),
        ({"recovery": None, "value": 90.0, "lower": None, "upper": None, "threshold": 90.0, "n": None}, None),
    ],
)
def test_bounds_close_in_with_the_root_of_the_number(changes, times):
    needed = count_needed(check(**changes))
    assert needed is None if times is None else 16 * times <= needed <= 16 * times + 1


def measure(rng, n, worse):
    """A base and a candidate on the same windows of 100 tokens, so many nats per token worse but for noise."""
    base = rng.normal(300, 30, n)
    sides = (base, base + 100 * worse + rng.normal(0, 15, n))
    rows = [[(float(nll), 100) for nll in nlls] for nlls in sides]
    scores = [Score("a", "perplexity", math.exp(sum(x for x, _ in r) / n / 100), 0.1, n, False, tuple(r)) for r in rows]
    return (EvalReport({}, (score,), {}, {}, {}) for score in scores)


def test_three_times_as_many_as_it_says_decide_mostly_and_a_third_seldom():
    rng, worse, gate = np.random.default_rng(0), 0.07, GateSettings(perplexity_recovery=0.9)
    # What is there is 0.932 of the base; how many that takes is reckoned where the estimate is right.
    spread = 0.932 * 1.645 * 0.15 / math.sqrt(20)
    needed = count_needed(check(20, recovery=0.932, lower=0.932 - spread, upper=0.932 + spread, threshold=0.9))
    assert needed is not None and needed > 20
    decided = {}
    for share in (1 / 3, 3):
        verdicts = [
            decide(*measure(rng, round(share * needed), worse), gate, seed=trial, resamples=300).verdict
            for trial in range(60)
        ]
        decided[share] = sum(verdict != "undecided" for verdict in verdicts)
    # Of normal draws 88 and 24 % are due.
    assert decided[3] > 45 and decided[1 / 3] < 25


def decision(**verdicts):
    found = {"pass": (0.95, 0.92, 0.98), "undecided": (0.93, 0.87, 0.99), "fail": (0.5, 0.4, 0.6)}
    checks = [
        check(name=f"perplexity {name}", verdict=verdict, threshold=0.9)
        | dict(zip(("recovery", "lower", "upper"), found[verdict], strict=True))
        for name, verdict in verdicts.items()
    ]
    worst = next(v for v in ("fail", "undecided", "pass") if v in verdicts.values())
    return {"verdict": worst, "checks": checks, "confidence": 0.95, "resamples": 2000, "seed": 0}


def test_undecided_has_an_exit_code_of_its_own_and_says_what_would_decide():
    error = refuse_verdict(decision(a="pass", b="undecided"), "report.html")
    assert isinstance(error, GateUndecided) and error.exit_code == 3 and not isinstance(error, GateRefused)
    assert "perplexity b 0.930 [0.870 to 0.990], needed ≥ 0.900" in str(error) and "perplexity a" not in str(error)
    assert "windows would decide, 16 were measured (evaluation.text_tokens)" in str(error)
    assert str(error).endswith("evidence in report.html")


def test_a_failure_wins_over_what_is_undecided_and_a_pass_ends_nothing():
    error = refuse_verdict(decision(a="fail", b="undecided"), "report.html")
    assert isinstance(error, GateRefused) and error.exit_code == 1
    assert refuse_verdict(decision(a="pass"), "x") is None and refuse_verdict(None, "x") is None


def test_of_tasks_it_names_the_key_of_tasks_and_what_cannot_be_decided_is_said():
    near = check(140, name="tasks", metric="tasks", verdict="undecided", threshold=0.9, lower=0.8, upper=1.0)
    told = str(refuse_verdict({"verdict": "undecided", "checks": [near | {"recovery": 0.9}]}, "x"))
    assert "it lies so near that 100 times as many items would not decide" in told
    told = str(refuse_verdict({"verdict": "undecided", "checks": [near | {"recovery": 0.95}]}, "x"))
    assert "items would decide, 140 were measured (evaluation.tasks)" in told
