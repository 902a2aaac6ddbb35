"""`mka compare`: ratios and intervals from items that are made by hand, and reports found by digest."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from support.models import make_tiny_model, save_model

from mka.bench.compare import compare_scores, list_differences
from mka.cli.main import main
from mka.evaluation.scores import EvalReport, Score
from mka.model.checkpoint import describe_checkpoint, open_checkpoint

CONDITIONS = {"dtype": "float32", "shots": 0, "max_length": 128}


def make_texts_score(factor, name="words", n=12, digest="x"):
    rng = np.random.default_rng(3)
    items = tuple((float(20 * factor * value), 20) for value in rng.uniform(2.0, 3.0, n))
    value = float(np.exp(sum(item[0] for item in items) / sum(item[1] for item in items)))
    return Score(name, "perplexity", value, 0.1, n, False, items, {"items_digest": digest})


def make_task_score(solved, name="piqa", digest="x"):
    items = tuple(int(i < solved) for i in range(40))
    return Score(name, "acc", solved / 40, 0.05, 40, True, items, {"items_digest": digest})


def make_report(*scores, checkpoint=None, **conditions):
    return EvalReport(checkpoint or {"layers": 6, "bytes": 100}, scores, {}, {}, CONDITIONS | conditions)


@pytest.fixture
def run(capsys):
    def compare(*given, code=0):
        capsys.readouterr()
        assert main(["compare", *map(str, given)]) == code
        return capsys.readouterr()

    return compare


def test_the_same_windows_are_compared_pairwise():
    base, worse = make_report(make_texts_score(1.0)), make_report(make_texts_score(1.05))
    (row,) = compare_scores(base, worse)
    nll = [item[0] / item[1] for item in base.scores[0].items]
    assert row["ratio"] == pytest.approx(np.exp(0.05 * np.mean(nll)))
    # Paired: what varies between windows cancels but for a twentieth of it.
    spread = 0.05 * np.std(nll) / np.sqrt(12)
    assert 1 < row["lower"] < row["ratio"] < row["upper"]
    assert np.log(row["upper"] / row["lower"]) == pytest.approx(2 * 2.2 * spread, rel=0.35)
    assert row["verdict"] == "worse" and compare_scores(worse, base)[0]["verdict"] == "better"
    assert compare_scores(base, base)[0]["verdict"] == "equal"


def test_an_interval_with_one_in_it_tells_nothing():
    one = make_report(make_task_score(20), make_task_score(22, "arc_easy"))
    other = make_report(make_task_score(22), make_task_score(20, "arc_easy"))
    *single, mean = compare_scores(one, other)
    assert mean["label"] == "mean of 2 tasks" and mean["ratio"] == pytest.approx(1) and mean["verdict"] == "undecided"
    assert single[0]["ratio"] == pytest.approx(22 / 20) and [row["counts"] for row in (*single, mean)] == [
        False,
        False,
        True,
    ]


def test_what_was_not_measured_alike_is_not_compared():
    first = make_report(make_texts_score(1.0), make_task_score(20), make_texts_score(1.0, "other"))
    second = make_report(make_texts_score(1.0, n=11), make_task_score(20, digest="y"), make_texts_score(1.1, "other"))
    rows = {row["name"]: row for row in compare_scores(first, second)}
    assert rows["words"]["verdict"] is rows["piqa"]["verdict"] is None and rows["other"]["verdict"] == "worse"
    assert "items: n 12 and 11" in rows["words"]["why"] and "the items themselves" in rows["piqa"]["why"]
    halved = compare_scores(first, replace(first, conditions=CONDITIONS | {"dtype": "bfloat16"}))
    assert {row["why"] for row in halved} == {"they differ in conditions: dtype float32 and bfloat16"}
    # Of nothing there is no ratio.
    (row,) = compare_scores(make_report(make_task_score(0)), make_report(make_task_score(3)))
    assert row["verdict"] is None and "solves nothing" in row["why"]


def test_two_reports_side_by_side(run, tmp_path):
    for name, factor, solved in (("a", 1.0, 20), ("b", 1.1, 21)):
        size = {"layers": 6 - (name == "b"), "bytes": 100 - 20 * (name == "b")}
        report = make_report(make_texts_score(factor), make_task_score(solved), checkpoint=size)
        (tmp_path / f"{name}.json").write_text(report.to_json())
    said = run(tmp_path / "a.json", tmp_path / "b.json").out
    assert "B has 5 layers, A 6; it takes 0.800 times A's bytes." in said
    assert "A is better in perplexity, words (B / A 1." in said
    assert "Which is better in piqa, acc (B / A 1.050" in said and said.rstrip().endswith("cannot be told.")
    found = json.loads(run(tmp_path / "a.json", tmp_path / "b.json", "--json").out)
    assert found["summary"] in said and found["config"] == []
    assert [score["verdict"] for score in found["scores"]] == ["worse", "undecided"]
    assert found["scores"][0]["a"].keys() == {"value", "stderr", "n"}


def test_reports_of_folders_are_found_by_digest(run, tmp_path):
    base = save_model(make_tiny_model("llama"), tmp_path / "base")
    small = save_model(make_tiny_model("llama", num_hidden_layers=4), tmp_path / "small")
    said = run(base, small).out
    assert "no report of A and B is here" in said and "num_hidden_layers" in said
    (small / "evidence").mkdir()
    for role, folder, factor in (("base", base, 1.0), ("candidate", small, 1.2)):
        report = make_report(make_texts_score(factor), checkpoint=describe_checkpoint(open_checkpoint(folder)))
        (small / "evidence" / f"{role}.json").write_text(report.to_json())
    found = json.loads(run(base, small, "--json").out)
    assert [found[side]["report"] for side in "ab"] == [
        str(small / "evidence" / f"{role}.json") for role in ("base", "candidate")
    ]
    assert found["scores"][0]["verdict"] == "worse" and found["a"]["facts"]["layers"] == 6
    assert {"key": "num_hidden_layers", "a": 6, "b": 4} in found["config"]
    # The other way round they are the same two.
    turned = json.loads(run(small, base, "--json").out)["scores"][0]
    assert turned["ratio"] == pytest.approx(1 / found["scores"][0]["ratio"]) and turned["verdict"] == "better"
    # Evidence of other weights is no evidence.
    shutil.copytree(small, tmp_path / "other")
    save_model(make_tiny_model("llama", num_hidden_layers=4, seed=1), tmp_path / "other")
    assert "no report of B is here" in run(base, tmp_path / "other").out


def test_reports_that_are_given(run, tmp_path):
    base = save_model(make_tiny_model("llama"), tmp_path / "base")
    own = make_report(make_texts_score(1.0), checkpoint=describe_checkpoint(open_checkpoint(base)))
    (tmp_path / "own.json").write_text(own.to_json())
    (tmp_path / "b.json").write_text(make_report(make_texts_score(0.9)).to_json())
    said = run(base, tmp_path / "b.json", "--report", tmp_path / "own.json").out
    assert "B is better in perplexity, words" in said
    assert "neither of the two" in run(base, base, "--report", tmp_path / "b.json", code=2).err
    assert "is not a report of mka evaluate" in run(base, base / "config.json", code=2).err
    assert "does not exist" in run(base, tmp_path / "gone", code=2).err


def test_differences_of_configs():
    first = {"a": 1, "b": [1, 2], "transformers_version": "5", "c": None}
    assert list_differences(first, {"a": 1, "b": [1, 3], "d": "x"}) == [
        {"key": "b", "a": [1, 2], "b": [1, 3]},
        {"key": "d", "a": None, "b": "x"},
    ]
