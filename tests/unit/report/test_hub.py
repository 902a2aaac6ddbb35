"""What a hub reads of a card: relation to the base, licence, and what was measured, in the hub's own format."""

import pytest
from huggingface_hub import ModelCard

from mka.evaluation.scores import EvalReport, Score
from mka.model.card import read_license
from mka.plan.plan import MergePlan, identity_layers, keep_layers
from mka.report.data import ReportData
from mka.report.page import write_card

INT8 = {"quantize": {"scheme": "int8"}}
SCORES = (
    Score("boolq", "perplexity", 20.5, 0.51, 8, False),
    Score("piqa", "acc_norm", 0.54, 0.07, 50, True),
    Score("piqa", "acc", 0.52, 0.07, 50, True),
    Score("sciq", "perplexity", float("inf"), 0.5, 8, False),
)


def make_data(recipe=None, layers=None, **more):
    recipe = {"name": "tiny", "model": {"hub": "org/model"}} | (recipe or {})
    return ReportData(recipe=recipe, plan=MergePlan("uidl", "deleted", 3, layers or keep_layers([0, 2])), **more)


def read_card(data, folder):
    return ModelCard.load(write_card(data, folder)).data


@pytest.mark.parametrize(
    ("data", "relation"),
    [
        (make_data(), "merge"),
        (make_data(INT8), "merge"),
        (make_data(layers=identity_layers(3)), None),
        (make_data(INT8, layers=identity_layers(3)), "quantized"),
    ],
)
def test_fewer_layers_are_no_quantization(data, relation, tmp_path):
    found = read_card(data, tmp_path)
    assert found.base_model == "org/model" and found.get("base_model_relation") == relation


def test_what_was_healed_is_a_finetune():
    from mka.report.hub import name_relation

    assert name_relation(make_data(INT8, healing={"tokens": 8192})) == "finetune"


def test_results_come_back_as_the_hubs_own(tmp_path):
    report = EvalReport({"layers": 2}, SCORES, {}, {}, {})
    found = read_card(make_data(candidate=report), tmp_path)
    assert found.model_name == "tiny"
    results = {(result.dataset_type, result.metric_type): result for result in found.eval_results}
    assert results.keys() == {("boolq", "perplexity"), ("piqa", "acc_norm"), ("piqa", "acc")}  # infinity is none
    best = results["piqa", "acc_norm"]
    assert (best.metric_value, best.metric_args) == (0.54, {"stderr": 0.07, "n": 50})
    assert best.task_type == "text-generation" and "lm-eval" in best.dataset_name


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: mit", {"license": "mit"}),
        ("license: [gemma]", {"license": "gemma"}),
        (
            "license: other\nlicense_name: x-1\nlicense_link: LICENSE",
            {"license": "other", "license_name": "x-1", "license_link": "LICENSE"},
        ),
        ("license: [mit, apache-2.0]\ntags: x", {}),
        ("license: 3", {}),
        ("license: [", {}),
        ("- x", {}),
    ],
)
def test_the_licence_is_the_bases(front, expected, tmp_path):
    for ends in ("\n", "\r\n"):
        (tmp_path / "README.md").write_bytes(f"---\n{front}\n---\n# x\n".replace("\n", ends).encode())
        assert read_license(tmp_path) == expected
    found = read_card(make_data(provenance=expected), tmp_path)
    assert {key: found.get(key) for key in expected} == expected


def test_a_folder_without_card_says_no_licence(tmp_path):
    assert read_license(tmp_path) == {}
    (tmp_path / "README.md").write_text("# no front matter\n")
    assert read_license(tmp_path) == {}
