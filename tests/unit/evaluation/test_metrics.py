"""The table of metrics: everybody asks its rows, rules are checked against it, and old reports stay readable."""

import ast
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mka.errors import GuardError, RecipeError
from mka.evaluation import metrics, rules
from mka.evaluation.gate import decide
from mka.evaluation.metrics import HEADLINE, METRICS, group_scores
from mka.evaluation.rules import check_rules, list_rules, rules_against_champion
from mka.evaluation.scores import EvalReport, Score
from mka.pipeline.recipes import validate_recipe
from mka.recipe import EvaluationSettings, GateRule, GateSettings
from mka.report.table import result_table
from mka.report.verdict import describe_check, describe_decision, tell_checks

ROOT = Path(__file__).parents[3]
TABLE = ROOT / "mka" / "evaluation" / "metrics.py"
# What measures a metric names it; lm-eval's results have columns of these names.
MEASURING = {ROOT / f"{row.measure.partition(':')[0].replace('.', '/')}.py" for row in METRICS.values()}
MEASURING |= {ROOT / "mka" / "evaluation" / name for name in ("catalog.py", "packaged.py", "task_keys.py")}


def text(nll, name="prose", tokens=100):
    items = tuple((float(value), tokens) for value in nll)
    return Score(name, "perplexity", math.exp(sum(nll) / (tokens * len(nll))), 0.1, len(nll), False, items)


def task(items, name="piqa", metric="acc"):
    return Score(name, metric, sum(items) / len(items), 0.1, len(items), True, tuple(items))


def report(*scores, **facts):
    return EvalReport(facts, scores, {"decode_tokens_per_second": 50.0}, {}, {})


def gate(*rules):
    return GateSettings(rules=tuple(GateRule(**rule) for rule in rules))


def test_nobody_but_the_table_and_what_measures_knows_a_metric_by_name():
    strangers = []
    for path in (path for room in ("mka", "tasks", "flows") for path in (ROOT / room).rglob("*.py")):
        if path == TABLE or path in MEASURING:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in METRICS:
                strangers.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.value}")
    for path in (ROOT / "mka").rglob("*.j2"):
        words = set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
        strangers += [f"{path.name} {name}" for name in METRICS if name in words]
    assert strangers == []


def test_importing_the_table_imports_no_model_library():
    code = (
        "import sys, mka.evaluation.metrics; print(*{'torch', 'transformers', 'lm_eval', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


def test_what_measures_a_metric_is_there():
    for row in METRICS.values():
        module, _, function = row.measure.partition(":")
        assert callable(getattr(__import__(module, fromlist=[function]), function))


def test_rows_of_one_pool_can_be_added_up():
    for row in METRICS.values():
        alike = [other for other in METRICS.values() if other.subject == row.subject]
        assert len({(o.scale, o.higher_is_better, o.resampled, o.required, o.of_base) for o in alike}) == 1


def test_scores_of_one_pool_make_one_group_and_texts_one_each_in_the_order_of_the_table():
    scores = [task([1, 0]), text([300, 310], "b"), task([1, 0], "boolq", "acc_norm"), text([300, 310], "a")]
    groups = group_scores(scores)
    assert [group.check for group in groups] == ["perplexity b", "perplexity a", "tasks"]
    assert [group.label for group in groups] == ["b", "a", "tasks"]
    assert groups[2].keys == (("piqa", "acc"), ("boolq", "acc_norm"))


def test_a_report_of_the_former_format_is_read_as_one_list_of_scores(tmp_path):
    new = report(text([300.0, 310.0]), task([1, 0]), layers=3)
    body = json.loads(new.to_json())
    assert body["format"] == "mka-evaluation/2" and [score["name"] for score in body["scores"]] == ["prose", "piqa"]
    first, second = body.pop("scores")
    former = tmp_path / "former.json"
    former.write_text(json.dumps({**body, "format": "mka-evaluation/1", "text": [first], "tasks": [second]}))
    assert EvalReport.load(former) == new
    (tmp_path / "new.json").write_text(new.to_json())
    assert EvalReport.load(tmp_path / "new.json") == new
    former.write_text(json.dumps({**body, "format": "mka-evaluation/9"}))
    with pytest.raises(ValueError, match="mka-evaluation/9"):
        EvalReport.load(former)


def test_todays_keys_are_the_two_default_rules_and_the_same_rules_decide_the_same():
    settings = GateSettings(perplexity_recovery=0.8, task_recovery=0.7)
    same = [{"metric": "perplexity", "recovery": 0.8}, {"metric": "tasks", "recovery": 0.7}]
    assert list_rules(settings) == tuple(GateRule(**rule) for rule in same)
    rng = np.random.default_rng(0)
    base = report(text(rng.normal(300, 30, 9)), task(list(rng.integers(0, 2, 30))))
    other = report(text(rng.normal(310, 30, 9)), task(list(rng.integers(0, 2, 30))))
    assert decide(base, other, settings, seed=4) == decide(base, other, gate(*same), seed=4)


def test_a_rule_may_bound_the_value_itself_with_its_interval():
    nll = [300.0, 310.0, 305.0, 295.0]
    one = report(text(nll))
    value = one.scores[0].value
    for rule, verdict in (
        ({"most": 1.2 * value}, "pass"),
        ({"most": 0.8 * value}, "fail"),
        ({"most": value}, "undecided"),
        ({"least": 0.8 * value}, "pass"),
        ({"least": 1.2 * value}, "fail"),
    ):
        (check,) = decide(one, one, gate({"metric": "perplexity", **rule}), seed=0).checks
        assert check.value == pytest.approx(value) and check.recovery is None and check.verdict == verdict
        assert check.lower < value < check.upper
        assert check.name == "perplexity prose value"


def test_the_value_of_tasks_is_their_mean():
    one = report(task([1, 0, 0, 0]), task([1, 1, 1, 0], "boolq"))
    (check,) = decide(one, one, gate({"metric": "tasks", "least": 0.5}), seed=0).checks
    assert check.value == 0.5 and (check.name, check.n) == ("tasks value", 8)


def test_facts_and_speed_are_judged_as_they_are():
    one = report(bytes=250_000_000, layers=24)
    rules = [{"metric": "bytes", "most": "250MB"}, {"metric": "layers", "most": 20}]
    rules += [{"metric": "decode_tokens_per_second", "least": 40}]
    decision = decide(one, one, gate(*rules), seed=0)
    assert [(c.verdict, c.value, c.lower, c.n) for c in decision.checks] == [
        ("pass", 250e6, None, None),
        ("fail", 24, None, None),
        ("pass", 50, None, None),
    ]
    body = json.loads(json.dumps(decision.to_dict(), allow_nan=False))
    assert describe_check(body["checks"][0])["threshold"] == "≤ 250.0 MB"
    assert tell_checks(body, "fail") == "layers 24, needed ≤ 20"
    assert len(describe_decision(body)) == 4
    with pytest.raises(GuardError, match="'parameters'"):
        decide(one, one, gate({"metric": "parameters", "most": "1"}), seed=0)


@pytest.mark.parametrize(
    ("text", "number"), [("250MB", 250e6), ("1.5 GB", 1.5e9), ("12B", 12), ("3kB", 3000), (7, 7), ("8", 8)]
)
def test_sizes_are_read_as_people_write_them(text, number):
    assert GateRule(metric="bytes", most=text).most == number


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"metric": "perplexty", "recovery": 0.5}], "'perplexty' (did you mean 'perplexity'?)"),
        ([{"metric": "byte", "most": 5}], "'byte' (did you mean 'bytes'?)"),
        ([{"metric": "bytes", "recovery": 0.5}], "bytes has no recovery; bound it by most, least or better_than"),
        (
            [{"metric": "tasks", "recovery": 0.5, "most": 1}],
            "exactly one of recovery, most, least, better_than, must must be given",
        ),
        ([{"metric": "tasks", "recover": 0.5}], "(did you mean 'recovery'?)"),
        ([{"metric": "bytes", "most": "250 elephants"}], "'gate.rules.0.most'"),
        ([{"metric": "bytes", "better_than": "base"}], "better_than': Input should be 'control', got 'base'"),
    ],
)
def test_rules_that_cannot_be_judged_are_refused_in_one_line(rules, message):
    with pytest.raises(RecipeError) as caught:
        validate_recipe({"name": "x", "model": {"hub": "a/b"}, "target": {"layers": 3}, "gate": {"rules": rules}})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_rules_and_the_thresholds_they_stand_for_exclude_each_other():
    given = {"rules": [{"metric": "bytes", "most": 5}], "task_recovery": 0.3}
    with pytest.raises(RecipeError, match="rules stand in place of task_recovery"):
        validate_recipe({"name": "x", "model": {"hub": "a/b"}, "target": {"layers": 3}, "gate": given})
    # A recorded recipe spells out every default, the former one of perplexity too.
    recorded = gate({"metric": "bytes", "most": 5}).model_dump(mode="json")
    assert GateSettings.model_validate(recorded) == gate({"metric": "bytes", "most": 5})
    former = GateSettings.model_validate(recorded | {"perplexity_recovery": 0.5})
    assert former.rules == gate({"metric": "bytes", "most": 5}).rules


def test_what_a_gate_asks_that_says_nothing():
    assert [rule.recovery for rule in list_rules(GateSettings())] == [0.9, 0.9]


def test_a_rule_on_what_was_not_measured_is_refused():
    one = report(task([1, 0]))
    with pytest.raises(GuardError, match="'perplexity' finds nothing measured"):
        decide(one, one, gate({"metric": "perplexity", "recovery": 0.5}), seed=0)


def test_against_the_champion_the_same_recoveries_are_asked_and_no_bounds():
    settings = gate({"metric": "perplexity", "recovery": 0.5}, {"metric": "bytes", "most": 5})
    held = rules_against_champion(settings)
    assert held.rules == (GateRule(metric="perplexity", recovery=settings.champion_recovery),)
    plain = rules_against_champion(GateSettings(champion_recovery=0.9))
    assert (plain.perplexity_recovery, plain.task_recovery, plain.rules) == (0.9, 0.9, ())


@pytest.fixture
def distance(monkeypatch):
    """A metric of the candidate against the base, asked for by a setting."""
    row = replace(
        HEADLINE, name="flips", asked="shots", of_base=False, scale="linear", required=None, least=0, most=1, extras=()
    )
    for module in (metrics, rules):
        monkeypatch.setattr(module, "METRICS", {**METRICS, "flips": row})
    return row


def test_what_is_measured_of_the_candidate_alone_has_a_value_and_no_recovery(distance):
    flips = Score("prose", "flips", 0.05, 0.01, 3, False, ((4, 100), (6, 100), (5, 100)))
    base, candidate = report(text([300, 310, 320])), report(text([300, 310, 320]), flips)
    rules = [{"metric": "perplexity", "recovery": 0.5}, {"metric": "flips", "most": 0.1}]
    checks = decide(base, candidate, gate(*rules), seed=0).checks
    assert [(check.name, check.verdict) for check in checks] == [
        ("perplexity prose", "pass"),
        ("flips prose value", "pass"),
    ]
    assert checks[1].value == pytest.approx(0.05)
    rows = {row["quantity"]: row for row in result_table(base, candidate)}
    assert rows["flips, prose (n = 3 windows)"]["base"] == "–"
    with pytest.raises(RecipeError, match="flips has no recovery"):
        check_rules(gate({"metric": "flips", "recovery": 0.5}))
    with pytest.raises(RecipeError, match=r"ask for it by evaluation\.shots"):
        check_rules(gate(rules[1]), EvaluationSettings())
