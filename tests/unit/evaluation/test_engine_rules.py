"""Rules about engines: whether one serves the candidate, and how many times as fast as the base."""

import pytest

from mka.errors import GuardError, RecipeError
from mka.evaluation.gate import decide
from mka.evaluation.rules import asks_engines, check_rules
from mka.evaluation.scores import EvalReport
from mka.pipeline.recipes import validate_recipe
from mka.recipe import GateRule, GateSettings
from mka.report.verdict import describe_check, describe_decision, tell_checks

BARE = EvalReport({}, (), {}, {}, {})
RATIOS = {"decode_tokens_per_second": {"1": 1.3, "16": 1.05}, "prefill_tokens_per_second": {"1": 1.2}}
SERVED = {"vllm": {"loads": True, "ratios": RATIOS}, "llama.cpp": {"loads": False, "ratios": RATIOS}}


def gate(**rule):
    return GateSettings(rules=(GateRule(**rule),))


@pytest.mark.parametrize(
    ("rule", "value", "verdict"),
    [
        ({"metric": "engine", "engine": "vllm", "must": "load"}, 1, "pass"),
        ({"metric": "engine", "engine": "llama.cpp", "must": "load"}, 0, "fail"),
        ({"metric": "decode_speed", "engine": "vllm", "least": 1.05}, 1.05, "pass"),
        ({"metric": "decode_speed", "engine": "vllm", "least": 1.1}, 1.05, "fail"),
        ({"metric": "prefill_speed", "engine": "vllm", "least": 1.1}, 1.2, "pass"),
        # What an engine does not serve is not fast.
        ({"metric": "decode_speed", "engine": "llama.cpp", "least": 1.1}, 0, "fail"),
    ],
)
def test_the_slowest_counts_and_what_is_not_served_fails(rule, value, verdict):
    settings = gate(**rule)
    assert asks_engines(settings)
    decision = decide(BARE, BARE, settings, seed=0, served=SERVED)
    (check,) = decision.checks
    assert (decision.verdict, check.verdict, check.value, check.lower) == (verdict, verdict, value, None)
    assert check.name == f"{rule['metric']} {rule['engine']}"


def test_a_check_of_an_engine_in_words():
    decided = decide(BARE, BARE, gate(metric="engine", engine="llama.cpp", must="load"), seed=0, served=SERVED)
    (check,) = decided.to_dict()["checks"]
    row = describe_check(check)
    assert (row["name"], row["figure"], row["threshold"]) == ("engine llama.cpp", "does not load", "must load")
    assert tell_checks(decided.to_dict()) == "engine llama.cpp does not load, needed must load"
    assert "must load" in describe_decision(decided.to_dict())[1]


@pytest.mark.parametrize("served", [None, {}, {"vllm": {"loads": True, "ratios": {}}}])
def test_what_was_not_asked_is_not_decided(served):
    with pytest.raises(GuardError, match="vllm was not"):
        decide(BARE, BARE, gate(metric="decode_speed", engine="vllm", least=1.0), seed=0, served=served)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"metric": "engine", "must": "load"}, "engine needs the engine it is about"),
        ({"metric": "perplexity", "engine": "vllm", "recovery": 0.9}, "perplexity is about no engine, got 'vllm'"),
        ({"metric": "engine", "engine": "vllm", "least": 1.0}, "engine is bounded by must, got least"),
        ({"metric": "decode_speed", "engine": "vllm", "most": 1.0}, "decode_speed is bounded by least, got most"),
        ({"metric": "bytes", "must": "load"}, "bytes cannot load"),
        ({"metric": "decode_sped", "engine": "vllm", "least": 1.0}, "did you mean 'decode_speed'"),
        ({"metric": "engine", "engine": "llama.cpp", "must": "load"}, "llama.cpp is not asked; list it"),
    ],
)
def test_rules_that_cannot_be_are_refused(rule, said):
    with pytest.raises(RecipeError, match=said):
        check_rules(gate(**rule), engines=["vllm"])


def recipe(engines, **changes):
    return {"name": "one", "model": {"folder": "models/one"}, "target": {"layers": 4}, "engines": engines, **changes}


@pytest.mark.parametrize(
    ("engines", "said"),
    [
        ([{"engine": "vlm"}], "engines.0.engine"),
        ([{"engine": "vllm"}, {"engine": "vllm", "rounds": 3}], "vllm is listed twice"),
        ([{"engine": "vllm", "file_type": "q8_0"}], "file_type belongs to llama.cpp"),
        ([{"engine": "vllm", "concurrency": []}], "engines.0.concurrency"),
        ([{"engine": "vllm", "batch": 1}], "unknown key 'engines.0.batch'"),
    ],
)
def test_a_section_that_cannot_be_is_refused(engines, said):
    with pytest.raises(RecipeError, match=said):
        validate_recipe(recipe(engines))


def test_a_rule_on_an_engine_wants_it_listed():
    rules = {"rules": [{"metric": "engine", "engine": "vllm", "must": "load"}]}
    assert validate_recipe(recipe([{"engine": "vllm"}], gate=rules)).engines[0].concurrency == (1, 16)
    with pytest.raises(RecipeError, match="which has none"):
        validate_recipe(recipe([], gate=rules))
