import json
import math

import numpy as np
import pytest

from mka.errors import GuardError, NumericsError
from mka.evaluation.bootstrap import bound_levels
from mka.evaluation.gate import combine_verdicts, decide, judge, recover_tasks
from mka.evaluation.scores import EvalReport, Score
from mka.recipe import GateSettings
from mka.report.verdict import describe_decision

Z95 = 1.6448536269514722


def text(nll, *, name="prose", tokens=100):
    counts = tokens if isinstance(tokens, list) else [tokens] * len(nll)
    items = tuple((float(a), b) for a, b in zip(nll, counts))
    return Score(name, "perplexity", math.exp(sum(nll) / sum(counts)), 0.1, len(nll), False, items)


def task(items, *, name="piqa", digest="d"):
    extra = {"items_digest": digest}
    return Score(name, "acc", sum(items) / len(items), 0.1, len(items), True, tuple(items), extra)


def report(texts=(), tasks=()):
    return EvalReport({}, (*texts, *tasks), {}, {}, {})


def gate(perplexity=0.5, tasks=0.9):
    return GateSettings(perplexity_recovery=perplexity, task_recovery=tasks)


def test_identical_reports_recover_exactly_one_and_pass_the_strictest_gate():
    rng = np.random.default_rng(0)
    same = report([text(rng.normal(300, 50, 8))], [task([1, 0, 1, 1, 0]), task([0, 1], name="boolq")])
    decision = decide(same, same, gate(1.0, 1.0), seed=0)
    assert decision.verdict == "pass"
    assert [(c.recovery, c.lower, c.upper) for c in decision.checks] == [(1.0, 1.0, 1.0)] * 2


def test_a_constant_loss_per_window_has_no_uncertainty_however_windows_differ():
    base = np.random.default_rng(1).normal(300, 80, 10)
    check = decide(report([text(base)]), report([text(base + 25.0)]), gate(), seed=0).checks[0]
    assert [check.recovery, check.lower, check.upper] == pytest.approx([math.exp(-0.25)] * 3)


def test_perplexity_bounds_agree_with_the_normal_interval_at_large_n():
    rng = np.random.default_rng(2)
    n = 2000
    base = rng.normal(300, 40, n)
    loss = rng.normal(20, 30, n)
    check = decide(report([text(base)]), report([text(base + loss)]), gate(), seed=0, resamples=4000).checks[0]
    half = Z95 * loss.std(ddof=1) / math.sqrt(n) / 100
    centre = -loss.mean() / 100
    assert math.log(check.recovery) == pytest.approx(centre)
    assert math.log(check.lower) == pytest.approx(centre - half, abs=0.1 * half)
    assert math.log(check.upper) == pytest.approx(centre + half, abs=0.1 * half)


def test_task_bounds_agree_with_the_binomial_interval_at_large_n():
    n, solved = 4000, 3000
    base, candidate = [1] * n, [1] * solved + [0] * (n - solved)
    check = decide(report(tasks=[task(base)]), report(tasks=[task(candidate)]), gate(), seed=0, resamples=4000).checks[
        0
    ]
    half = Z95 * math.sqrt(0.75 * 0.25 / n)
    assert check.recovery == 0.75
    assert check.lower == pytest.approx(0.75 - half, abs=0.15 * half)
    assert check.upper == pytest.approx(0.75 + half, abs=0.15 * half)


def test_task_recovery_is_the_ratio_of_mean_scores_with_equal_weight_per_task():
    base = report(tasks=[task([1, 0], name="a"), task([1, 1, 1, 1, 0], name="b")])
    candidate = report(tasks=[task([0, 0], name="a"), task([1, 1, 1, 0, 0], name="b")])
    check = decide(base, candidate, gate(), seed=0).checks[0]
    assert check.recovery == pytest.approx((0 + 0.6) / (0.5 + 0.8))
    assert (check.name, check.n) == ("tasks", 7)


def test_bounds_enclose_the_truth_about_90_times_in_100_even_with_eight_windows():
    rng = np.random.default_rng(3)
    trials, enclosed = 1000, 0
    for trial in range(trials):
        base = rng.normal(300, 50, 8)
        candidate = base + rng.normal(10, 20, 8)
        check = decide(report([text(base)]), report([text(candidate)]), gate(), seed=trial, resamples=400).checks[0]
        enclosed += check.lower <= math.exp(-0.1) <= check.upper
    # Two bounds of 95 % enclose 90 %. The plain percentile interval encloses some 82 % at n = 8.
    assert 0.86 <= enclosed / trials <= 0.93


@pytest.mark.parametrize(
    ("lower", "upper", "verdict"),
    [(0.9, 1.0, "pass"), (0.8999, 0.9, "undecided"), (0.5, 0.8999, "fail"), (0.8, 1.1, "undecided"), (1, 1, "pass")],
)
def test_a_check_passes_at_the_threshold_and_fails_only_wholly_below_it(lower, upper, verdict):
    assert judge(lower, upper, 0.9) == verdict


@pytest.mark.parametrize(
    ("verdicts", "overall"),
    [
        (["pass", "pass"], "pass"),
        (["pass", "undecided"], "undecided"),
        (["undecided", "fail", "pass"], "fail"),
    ],
)
def test_the_worst_check_decides(verdicts, overall):
    assert combine_verdicts(verdicts) == overall


def test_planted_good_bad_and_uncertain_candidates():
    rng = np.random.default_rng(4)
    base = rng.normal(300, 30, 40)
    for mean, spread, verdict in ((5, 2, "pass"), (120, 2, "fail"), (69, 60, "undecided")):
        candidate = base + rng.normal(mean, spread, 40)
        assert decide(report([text(base)]), report([text(candidate)]), gate(0.5), seed=0).verdict == verdict


def test_one_failing_source_fails_the_candidate_and_leaves_other_checks_alone():
    rng = np.random.default_rng(5)
    good, bad = rng.normal(300, 30, 20), rng.normal(300, 30, 20)
    after = good + rng.normal(5, 5, 20)
    alone = decide(report([text(good)]), report([text(after)]), gate(), seed=7)
    both = decide(
        report([text(bad, name="code"), text(good)]),
        report([text(bad + 200, name="code"), text(after)]),
        gate(),
        seed=7,
    )
    assert (alone.verdict, both.verdict) == ("pass", "fail")
    assert both.checks[1] == alone.checks[0]
    assert [c.verdict for c in both.checks] == ["fail", "pass"]


def test_same_seed_same_bounds_and_block_size_only_bounds_memory(monkeypatch):
    rng = np.random.default_rng(6)
    base = rng.normal(300, 30, 16)
    reports = report([text(base)]), report([text(base + rng.normal(10, 10, 16))])
    first = decide(*reports, gate(), seed=1)
    assert decide(*reports, gate(), seed=1) == first
    assert decide(*reports, gate(), seed=2) != first
    monkeypatch.setattr("mka.evaluation.bootstrap._BLOCK", 16 * 7)
    assert decide(*reports, gate(), seed=1) == first


def test_levels_are_wider_at_small_n_and_5_percent_in_the_limit():
    assert bound_levels(10**7)[0] == pytest.approx(0.05, abs=1e-5)
    # t_{0.95,7} = 1.8946 (tables); sqrt(8/7) * 1.8946 = 2.0254; Phi(-2.0254) = 0.0214.
    assert bound_levels(8) == pytest.approx((0.0214, 0.9786), abs=1e-4)


def test_a_base_that_may_solve_nothing_gives_no_upper_bound_and_stays_undecided():
    base, candidate = report(tasks=[task([1, 0, 0])]), report(tasks=[task([0, 1, 0])])
    decision = decide(base, candidate, gate(), seed=0)
    assert decision.verdict == "undecided"
    assert (decision.checks[0].lower, decision.checks[0].upper) == (0.0, math.inf)
    assert json.loads(json.dumps(decision.to_dict(), allow_nan=False))["checks"][0]["upper"] is None


@pytest.mark.parametrize(
    ("base", "candidate", "message"),
    [
        (report([text([300, 310])]), report([text([300, 310, 320])]), "n 2 and 3"),
        (report([text([300, 310])]), report([text([300, 310], tokens=[100, 99])]), "tokens per window"),
        (report(tasks=[task([1, 0])]), report(tasks=[task([1, 0], digest="e")]), "the items themselves"),
        (report([text([300, 310])]), report([text([300, 310], name="code")]), "'code'"),
        (report(tasks=[task([1])]), report(tasks=[task([1])]), "2 or more"),
        (report(), report(), "nothing to decide on"),
    ],
)
def test_reports_of_different_measurements_are_refused(base, candidate, message):
    with pytest.raises(GuardError, match=message):
        decide(base, candidate, gate(), seed=0)


def test_undefined_recovery_is_refused():
    with pytest.raises(NumericsError, match="solves no item"):
        decide(report(tasks=[task([0, 0])]), report(tasks=[task([1, 0])]), gate(), seed=0)
    broken = report([Score("prose", "perplexity", 1.0, 0.1, 2, False, ((math.nan, 100), (300.0, 100)))])
    with pytest.raises(NumericsError, match="prose"):
        decide(report([text([300, 310])]), broken, gate(), seed=0)


def test_description_is_aligned_and_carries_the_numbers():
    base = report([text([300, 310]), text([250, 260], name="a longer name")], [task([1, 0, 1])])
    decision = decide(base, base, gate(0.4, 0.8), seed=0)
    first, *rows = describe_decision(decision.to_dict())
    assert first.startswith("gate: pass")
    assert len({row.index("recovery") for row in rows}) == 1
    assert "1.000" in rows[0] and "0.400" in rows[0] and rows[0].endswith("pass")
    assert [c["name"] for c in decision.to_dict()["checks"]] == [
        "perplexity prose",
        "perplexity a longer name",
        "tasks",
    ]


def test_a_task_alone_recovers_as_the_gate_says_when_it_is_the_only_one():
    rng = np.random.default_rng(5)
    base, candidate = (report([], [task(list(rng.integers(0, 2, 40)))]) for _ in range(2))
    (check,) = decide(base, candidate, gate(), seed=3).checks
    (row,) = recover_tasks(base, candidate, seed=3)
    assert row == {
        "name": "piqa",
        "recovery": check.recovery,
        "lower": check.lower,
        "upper": check.upper,
        "n": 40,
    }


def test_a_task_the_base_cannot_solve_has_no_recovery():
    base = report([text([300.0] * 4)], [task([0, 0, 0]), task([1, 0, 1], name="boolq")])
    assert [row["name"] for row in recover_tasks(base, base, seed=0)] == ["boolq"]
