"""The plan as a file and as a value: what it says about itself, and what it refuses to be."""

import json
import math

import pytest

from mka.errors import PlanError
from mka.methods import get_method
from mka.plan.plan import FORMAT, MergedLayer, MergePlan, Step, identity_layers, keep_layers


def make_plan(*layers, layers_in=6, **fields):
    return MergePlan("test", "a test", layers_in, tuple(MergedLayer(*layer) for layer in layers), **fields)


def example():
    """Six layers to three: 1, 2 and 3 become one (2 with weight 0), 4 is deleted."""
    return make_plan(
        ((0,), (1.0,)),
        ((1, 2, 3), (0.3, 0.0, 0.7)),
        ((5,), (1.0,)),
        steps=(Step((2,), (3,), 0.9, 0.0), Step((1,), (2, 3), 0.8, 0.3), Step((4,), (), 0.1, 0.0)),
        settings={"weights": "fixed", "grid": [0, 1]},
        base={"model": "tiny", "digest": "ab"},
    )


def test_what_a_plan_says_about_itself():
    plan = example()
    assert plan.layers_out == 3
    assert plan.layer_ratio == 0.5
    assert plan.removed == (2, 4)
    assert plan.merged == (MergedLayer((1, 2, 3), (0.3, 0.0, 0.7)),)
    assert not plan.is_identity
    assert [layer.is_copy for layer in plan.layers] == [True, False, True]


def test_identity_and_deletion():
    whole = MergePlan("test", "", 4, identity_layers(4))
    assert whole.is_identity and whole.removed == () and whole.merged == () and whole.layer_ratio == 0.0
    some = MergePlan("test", "", 4, keep_layers([3, 0]))
    assert some.layers == (MergedLayer((0,), (1.0,)), MergedLayer((3,), (1.0,)))
    assert some.removed == (1, 2)


def test_json_round_trip(tmp_path):
    plan = example()
    assert MergePlan.from_json(plan.to_json()) == plan
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json(), encoding="utf-8")
    assert MergePlan.load(path) == plan


def test_the_file_names_format_verb_and_what_follows_from_the_layers():
    body = json.loads(example().to_json())
    assert body["format"] == FORMAT == "mka-plan/1"
    assert body["layers_out"] == 3 and body["removed"] == [2, 4]
    assert body["layers"][1] == {"verb": "combine", "sources": [1, 2, 3], "weights": [0.3, 0.0, 0.7]}
    assert body["steps"][2] == {"left": [4], "right": [], "score": 0.1, "weight": 0.0}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "plan keeps 0 layers; allowed: 1 to 3"),
        ([((i,), (1.0,)) for i in range(4)], "plan keeps 4 layers; allowed: 1 to 3"),
        ([((), ())], "plan layer 0: 0 sources, 0 weights"),
        ([((0,), (1.0,)), ((1, 2), (1.0,))], "plan layer 1: 2 sources, 1 weights"),
        ([((3,), (1.0,))], "plan layer 0: source 3 after -1; sources must rise and stay below 3"),
        ([((-1,), (1.0,))], "plan layer 0: source -1"),
        ([((1,), (1.0,)), ((0,), (1.0,))], "plan layer 1: source 0 after 1"),
        ([((0, 1), (0.5, 0.5)), ((1, 2), (0.5, 0.5))], "plan layer 1: source 1 after 1"),
        ([((1, 0), (0.5, 0.5))], "plan layer 0: source 0 after 1"),
        ([((0, 1), (0.5, 0.4))], "plan layer 0: weights sum to 0.9, must be 1"),
        ([((0,), (1.00001,))], "plan layer 0: weights sum to 1.00001, must be 1"),
        ([((0,), (math.nan,))], "plan layer 0: weights sum to nan, must be 1"),
        ([((0, 1), (math.inf, -math.inf))], "plan layer 0: weights sum to nan, must be 1"),
    ],
)
def test_a_plan_that_is_not_well_formed_is_refused(layers, message):
    with pytest.raises(PlanError) as caught:
        make_plan(*layers, layers_in=3)
    assert message in str(caught.value)


def change(**fields):
    return json.dumps(json.loads(example().to_json()) | fields)


def without(key):
    body = json.loads(example().to_json())
    del body[key]
    return json.dumps(body)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "p: not a plan"),
        ("{", "p: not a plan"),
        ("[1]", "p: not a plan"),
        ("3", "p: not a plan"),
        ("{}", "p: format None, expected 'mka-plan/1'"),
        (change(format="mka-plan/9"), "p: format 'mka-plan/9', expected 'mka-plan/1'"),
        (change(layers=[{"verb": "matmul", "sources": [0], "weights": [1]}]), "unknown verb 'matmul'"),
        (change(layers=[{"sources": [0], "weights": [1]}]), "p: not a plan (KeyError: 'verb')"),
        (change(layers=None), "p: not a plan"),
        (change(layers_in="6"), "p: not a plan"),
        (change(layers_in=True), "p: not a plan"),
        (change(layers_in=10**9), "allowed: 1 to 100000"),
        (change().replace('"layers_in": 6', f'"layers_in": {"9" * 5001}'), "p: not a plan (a number of 5001 digits"),
        (change(settings=[]), "settings: Input should be an object, got []"),
        (change(folds=5), "folds: Input should be a valid string, got 5"),
        (change(steps=[{"left": [9], "right": [], "score": 1, "weight": 0}]), "step 0 is about layers"),
        (change(steps=[{"left": [], "right": [1], "score": 1, "weight": 0}]), "step 0 is about layers"),
        (change(label="\ud800"), "half of a character"),
        ("[" * 100_000, "p: not a plan (it is nested too deeply)"),
        (
            change(layers=[{"verb": "combine", "sources": ["0"], "weights": [1]}]),
            "layers.0.sources.0: Input should be a valid integer, got '0'",
        ),
        (change(layers=[{"verb": "combine", "sources": [0.5], "weights": [1]}]), "a valid integer, got 0.5"),
        (change(layers=[{"verb": "combine", "sources": [True], "weights": [1]}]), "a valid integer, got True"),
        (change(layers=[{"verb": "combine", "sources": [0], "weights": ["1"]}]), "p: not a plan"),
        (change(layers=[{"verb": "combine", "sources": [7], "weights": [1]}]), "source 7"),
        *((without(key), f"p: not a plan ({key} is missing)") for key in ("method", "label", "settings", "base")),
    ],
)
def test_a_file_that_is_no_plan_is_refused_in_one_line(text, message):
    with pytest.raises(PlanError) as caught:
        MergePlan.from_json(text, "p")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PlanError, match=r"plan .*plan\.json cannot be read"):
        MergePlan.load(path)


def test_the_reference_codes_plan_says_what_it_really_is():
    assert "tail deletion" in get_method("reference_code").label
    assert "merges nothing" in get_method("reference_code").label


def test_a_plan_keeps_what_its_search_spent_and_others_have_no_such_field():
    searched = make_plan(((0,), (1.0,)), search={"budget": 10, "spent": 2.5, "measurements": {"base": 1}})
    assert MergePlan.from_json(searched.to_json()) == searched
    plain = json.loads(make_plan(((0,), (1.0,))).to_json())
    assert "search" not in plain and MergePlan.from_json(json.dumps(plain)).search == {}
