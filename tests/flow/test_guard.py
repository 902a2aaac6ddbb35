"""The guard at every door: good tables pass, a planted fault is named, and the record can be read offline."""

import json
import math
import re
import socket
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mka.errors import CalibrationError, GuardError, NumericsError, OutputError, PlanError
from mka.evaluation.scores import EvalReport, Score
from mka.plan.plan import MergedLayer, MergePlan, take_layers
from mka.texts.rows import text_digest
from tasks.guards import guard
from tasks.guards.checkpoint import checkpoint_suite, checkpoint_table
from tasks.guards.columns import expect_finite
from tasks.guards.evaluation import evaluation_report_suite, evaluation_report_table
from tasks.guards.hidden_states import hidden_states_suite, hidden_states_table
from tasks.guards.plan import plan_suite, plan_table
from tasks.guards.scores import scores_suite, scores_table
from tasks.guards.texts import (
    calibration_suite,
    calibration_table,
    evaluation_table,
    evaluation_texts_suite,
    heldout_suite,
    heldout_table,
)

TEXTS = ("The cat sat.", "A river runs south.", "Tides follow the moon.")
SOURCES = ("prose", "prose", "science")
LAYERS, SAMPLES, WIDTH = 4, 6, 8


def evaluation_rows():
    texts = {"boolq": "is the sky blue", "piqa": "to open a jar, twist"}
    return [
        {"task": task, "id": 0, "field": "question", "text": text, "text_sha256": text_digest(text)}
        for task, text in texts.items()
    ]


def pooled():
    return np.random.default_rng(0).normal(size=(LAYERS + 1, SAMPLES, WIDTH)).astype(np.float32)


def similarity():
    return np.array([[1.0, 0.5, 0.25], [0.5, 1.0, 0.75], [0.25, 0.75, 1.0]])


def plan():
    layers = (MergedLayer((0,), (1.0,)), MergedLayer((1, 2), (0.5, 0.5)), MergedLayer((3,), (1.0,)))
    return MergePlan("mka", "", LAYERS, layers)


def facts(**changes):
    good = {"layers": 3, "config_layers": 3, "missing_keys": [], "unexpected_keys": [], "nonfinite_tensors": 0}
    return good | {"parameters": 1000, "bytes": 4000, "generation_mismatches": 0} | changes


def report(perplexity=20.0, accuracy=0.5, n=100, stderr=0.05):
    text = Score("prose", "perplexity", perplexity, 1.0, 12, False)
    task = Score("boolq", "acc", accuracy, stderr, n, True)
    return EvalReport({}, (text, task), {}, {}, {})


GOOD = {
    "calibration": lambda: (calibration_table(TEXTS, SOURCES, {}), calibration_suite(3)),
    "heldout": lambda: (heldout_table(TEXTS, SOURCES), heldout_suite(3)),
    "evaluation_texts": lambda: (
        evaluation_table(evaluation_rows()),
        evaluation_texts_suite(["boolq", "piqa"]),
    ),
    "hidden_states": lambda: (hidden_states_table(pooled()), hidden_states_suite(LAYERS, SAMPLES)),
    "scores": lambda: (
        scores_table(similarity(), "pairwise-similarity"),
        scores_suite("pairwise-similarity", 3),
    ),
    "distance": lambda: (
        scores_table(np.array([[0.1, 0.3], [0.3, 0.2]]), "block-distance"),
        scores_suite("block-distance", 2),
    ),
    "importance": lambda: (
        scores_table(np.array([0.3, -0.1]), "layer-importance"),
        scores_suite("layer-importance", 2),
    ),
    "plan": lambda: (plan_table(plan(), ["full"] * LAYERS), plan_suite(3)),
    "checkpoint": lambda: (checkpoint_table(facts()), checkpoint_suite(3)),
    "evaluation_report": lambda: (
        evaluation_report_table(report(), report(30.0, 0.4)),
        evaluation_report_suite(4),
    ),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    # Building Data Docs is half of a refusal's time; the tests that take tmp_path itself build them.
    monkeypatch.setattr(guard, "_build_docs", lambda context, checks_folder: checks_folder / "index.html")
    return tmp_path / "checks"


def refusal(folder, name, table, expectations):
    with pytest.raises(GuardError) as caught:
        guard.check(name, table, expectations, folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"guard '{name}' failed ")
    return message


@pytest.mark.parametrize("name", GOOD)
def test_good_table_passes_its_suite(name, folder):
    table, expectations = GOOD[name]()
    result = guard.check(name, table, expectations, folder)
    assert result.name == name
    assert result.expectations == result.passed == len(expectations)
    assert result.warnings == ()
    assert json.loads(json.dumps(result.summary, allow_nan=False))["rows"] == len(table)


def test_calibration_text_of_the_evaluation_is_named(folder):
    tasks = {text_digest("  the CAT sat. "): "boolq"}
    message = refusal(folder, "calibration", calibration_table(TEXTS, SOURCES, tasks), calibration_suite(3))
    assert message.startswith(
        "guard 'calibration' failed 1 of 6: expect_column_values_to_be_null(found_in_evaluation): "
        "1 unexpected, e.g. ['boolq: The cat sat.'] in rows [0]"
    )


def test_at_most_five_short_values_are_named(folder):
    texts = [f"text {i} " + "long " * 100 for i in range(9)]
    digests = {text_digest(text) for text in texts}
    message = refusal(folder, "calibration", calibration_table(texts, ["s"] * 9, digests), calibration_suite(1))
    assert "9 unexpected" in message
    assert message.count("'evaluation: text ") == 5
    assert len(message) < 1000


def test_calibration_too_few_repeated_empty_and_null(folder):
    table = calibration_table(["same", "same", "", None], ["a", "b", "c", None], {})
    message = refusal(folder, "calibration", table, calibration_suite(10))
    assert "failed 5 of 6" in message
    assert "expect_table_row_count_to_be_between(min_value=10): observed 4" in message
    assert "expect_column_values_to_not_be_null(text): 1 unexpected, e.g. [None] in rows [3]" in message
    assert "expect_column_values_to_not_be_null(source)" in message
    assert "(characters, " in message
    assert "expect_column_values_to_be_unique(text_sha256): 2 unexpected" in message


def test_evaluation_task_without_rows_and_unknown_task(folder):
    message = refusal(
        folder,
        "evaluation_texts",
        evaluation_table(evaluation_rows()),
        evaluation_texts_suite(["boolq", "arc"]),
    )
    assert "expect_column_distinct_values_to_contain_set(task, value_set=['arc', 'boolq']): missing 'arc'" in message
    assert "expect_column_values_to_be_in_set(task, value_set=['arc', 'boolq']): 1 unexpected, e.g. ['piqa']" in message


def test_evaluation_rows_without_a_digest_do_not_pass(folder):
    rows = [{key: value for key, value in row.items() if key != "text_sha256"} for row in evaluation_rows()]
    message = refusal(folder, "evaluation_texts", evaluation_table(rows), evaluation_texts_suite(["boolq", "piqa"]))
    assert re.search(r'match_regex\(text_sha256.*column "text_sha256" .* does not exist', message)


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_hidden_state_that_is_not_finite(folder, fault):
    states = pooled()
    states[2, 3, 5] = fault
    table = hidden_states_table(states)
    message = refusal(folder, "hidden_states", table, hidden_states_suite(LAYERS, SAMPLES))
    fraction = 1 - 1 / (SAMPLES * WIDTH)
    assert "failed 1 of 9" in message
    assert f"(finite_fraction, min_value=1.0, max_value=1.0): 1 unexpected, e.g. [{fraction!r}] in rows [2]" in message


def test_layer_without_any_finite_sample_and_zero_vector(folder):
    states = pooled()
    states[1] = math.nan
    states[3, 0] = 0
    message = refusal(folder, "hidden_states", hidden_states_table(states), hidden_states_suite(LAYERS, SAMPLES))
    assert "expect_column_values_to_not_be_null(norm_mean): 1 unexpected, e.g. [None] in rows [1]" in message
    assert "(norm_min, min_value=0.0, strict_min=True): 1 unexpected, e.g. [0.0] in rows [3]" in message


def test_hidden_state_norms_are_euclidean():
    states = np.array([[[3.0, 4.0], [0.0, 2.0]]])
    row = hidden_states_table(states).iloc[0]
    assert (row.norm_mean, row.norm_min, row.norm_max, row.samples) == (3.5, 2.0, 5.0, 2)


def test_similarity_above_one(folder):
    values = similarity()
    values[0, 2] = values[2, 0] = 1.3
    table = scores_table(values, "pairwise-similarity")
    message = refusal(folder, "scores", table, scores_suite("pairwise-similarity", 3))
    assert "failed 1 of 5" in message
    assert "(value, min_value=0.0, max_value=1.0): 2 unexpected, e.g. [1.3, 1.3] in rows [2, 6]" in message


@pytest.mark.parametrize(
    ("where", "value", "column"),
    [((0, 1), 0.6, "asymmetry"), ((1, 1), 0.9, "diagonal_error"), ((1, 1), math.nan, "value")],
)
def test_similarity_asymmetric_off_diagonal_one_or_null(folder, where, value, column):
    values = similarity()
    values[where] = value
    table = scores_table(values, "pairwise-similarity")
    message = refusal(folder, "scores", table, scores_suite("pairwise-similarity", 3))
    assert "failed 1 of 5" in message
    assert f"({column}" in message


def test_diagonal_is_free_where_the_definition_leaves_it_free(folder):
    table = scores_table(similarity() * 0.9, "pairwise-similarity")
    assert guard.check("scores", table, scores_suite("pairwise-similarity", 3, unit_diagonal=False), folder).passed


def test_plan_of_halves_has_no_weights_to_sum_and_needs_one_kind_of_attention_only(folder):
    layers = (MergedLayer((0,), (1.0,)), take_layers((1, 2), (2,), (1, 2)))
    kinds = ["full", "full", "sliding", "sliding"]
    table = plan_table(MergePlan("aligned", "", 4, layers), kinds)
    assert list(table["verb"]) == ["combine", "take"] and list(table["weight_sum"].isna()) == [False, True]
    guard.check("plan", table, plan_suite(2), folder)
    assert "(weight_sum" in refusal(folder, "plan", table.assign(weight_sum=None), plan_suite(2))
    assert "(halves" in refusal(folder, "plan", table.assign(halves=[2, 1]), plan_suite(2))
    mixed = MergePlan("aligned", "", 4, (layers[0], take_layers((1, 2), (1, 2), (1,))))
    assert "(kinds" in refusal(folder, "plan", plan_table(mixed, kinds), plan_suite(2))


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_importance_that_is_not_finite(folder, fault):
    table = scores_table(np.array([0.3, fault]), "layer-importance")
    message = refusal(folder, "scores", table, scores_suite("layer-importance", 2))
    assert "failed 1 of 3" in message and "in rows [1]" in message


def test_plan_with_another_count_than_the_target(folder):
    message = refusal(folder, "plan", plan_table(plan()), plan_suite(2))
    assert "failed 1 of 10: expect_table_row_count_to_equal(value=2): observed 3 " in message


def test_plan_that_merges_distant_layers_of_different_kinds(folder):
    layers = (MergedLayer((0,), (1.0,)), MergedLayer((1, 3), (0.5, 0.5)))
    table = plan_table(MergePlan("mka", "", 4, layers), ["full", "full", "sliding", "sliding"])
    message = refusal(folder, "plan", table.assign(weight_sum=[1.0, 1.1]), plan_suite(2))
    assert "failed 3 of 10" in message
    assert "(skipped, min_value=0.0, max_value=0.0): 1 unexpected, e.g. [1] in rows [1]" in message
    assert "(kinds, min_value=1.0, max_value=1.0): 1 unexpected, e.g. [2] in rows [1]" in message
    assert "1 unexpected, e.g. [1.1] in rows [1]" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"missing_keys": ["model.layers.2.mlp.up_proj.weight"]}, "(missing_keys, min_value=0.0, max_value=0.0): 1 "),
        ({"unexpected_keys": 2}, "(unexpected_keys, min_value=0.0, max_value=0.0): 1 unexpected, e.g. [2]"),
        ({"nonfinite_tensors": 1}, "(nonfinite_tensors"),
        ({"generation_mismatches": 3}, "(generation_mismatches"),
        ({"bytes": 0}, "(bytes, min_value=1.0): 1 unexpected, e.g. [0]"),
        (
            {"config_layers": 4},
            "expect_column_pair_values_to_be_equal(layers, config_layers): 1 unexpected, e.g. [[3, 4",
        ),
        ({"layers": 2, "config_layers": 2}, "(layers, value_set=[3]): 1 unexpected, e.g. [2]"),
        ({"missing_keys": None}, 'column "missing_keys" in BatchData does not exist'),
    ],
)
def test_checkpoint_with_one_fault(folder, changes, expected):
    message = refusal(folder, "checkpoint", checkpoint_table(facts(**changes)), checkpoint_suite(3))
    assert "failed 1 of 9" in message
    assert expected in message


def test_report_under_unequal_n(folder):
    table = evaluation_report_table(report(n=100), report(n=90))
    message = refusal(folder, "evaluation_report", table, evaluation_report_suite())
    assert "failed 1 of 15: expect_column_pair_values_to_be_equal(n, n_of_other): 2 unexpected" in message
    assert "[100, 90]" in message and "[90, 100]" in message


def test_report_that_lacks_a_task_of_the_base(folder):
    candidate = EvalReport({}, report().scores[:1], {}, {}, {})
    table = evaluation_report_table(report(), candidate)
    message = refusal(folder, "evaluation_report", table, evaluation_report_suite())
    assert "failed 1 of 15: expect_column_pair_values_to_be_equal(n, n_of_other): 1 unexpected" in message
    assert "e.g. [[100, 0]] in rows [1]" in message


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [
        (report(perplexity=0.9), "(value, min_value=1.0, where metric == 'perplexity'): 1 unexpected, e.g. [0.9]"),
        (report(perplexity=math.inf), "1 unexpected, e.g. [inf]"),
        (report(perplexity=math.nan), "expect_column_values_to_not_be_null(value): 1 unexpected"),
        (report(accuracy=1.2), "where metric IN ['acc', 'acc_norm', 'exact_match']): 1 unexpected, e.g. [1.2]"),
        (report(stderr=-0.1), "(stderr, min_value=0.0"),
    ],
)
def test_report_with_an_impossible_figure(folder, candidate, expected):
    table = evaluation_report_table(report(), candidate)
    message = refusal(folder, "evaluation_report", table, evaluation_report_suite())
    assert "failed 1 of 15" in message
    assert expected in message


def test_warning_is_told_and_stops_nothing(folder):
    table = evaluation_report_table(report(), report(stderr=math.nan))
    result = guard.check("evaluation_report", table, evaluation_report_suite(), folder)
    assert (result.expectations, result.passed) == (15, 14)
    assert len(result.warnings) == 1
    assert result.warnings[0].startswith("expect_column_values_to_not_be_null(stderr): 1 unexpected")


def test_tables_refuse_what_has_the_wrong_shape():
    with pytest.raises(NumericsError, match=r"shape \(2, 3\).*allowed"):
        scores_table(np.ones((2, 3)), "pairwise-similarity")
    with pytest.raises(NumericsError, match=r"shape \(3,\), expected \(L\+1, N, D\)"):
        hidden_states_table(np.ones(3))
    with pytest.raises(PlanError, match="2 layer kinds for a plan of 4"):
        plan_table(plan(), ["a", "b"])
    with pytest.raises(CalibrationError, match="3 texts but 1 sources"):
        calibration_table(TEXTS, ["a"], {})


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.words, self.links, self.loaded, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        if "href" in attributes:
            (self.links if tag == "a" else self.loaded).append(attributes["href"])
        if "src" in attributes:
            self.loaded.append(attributes["src"])

    def handle_data(self, data):
        self.words.append(data.strip())


def test_docs_hold_passes_and_failures_and_need_no_network(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    guard.check("plan", plan_table(plan()), plan_suite(3), tmp_path, run="smollm2 / run 1")
    overlap = calibration_table(["<b>bold</b> claim", "b", "c"], SOURCES, {text_digest("<b>bold</b> claim")})
    message = refusal(tmp_path, "calibration", overlap, calibration_suite(3))
    assert message.endswith(f"(details: {tmp_path / 'index.html'})")
    assert (tmp_path / "index.html").is_file()

    index = guard.build_docs(tmp_path)
    assert index == tmp_path / "index.html"
    text = index.read_text(encoding="utf-8")
    page = Page(text)
    assert page.loaded == ["data:,"] and "<b>" not in text
    for word in ("plan", "calibration", "passed", "failed", "found_in_evaluation"):
        assert word in page.words
    assert any("<b>bold</b> claim" in word for word in page.words)
    assert len(page.links) == 3
    for link in page.links:
        assert (tmp_path / link).is_file(), link
    assert "smollm2-run-1" in text
    docs = (tmp_path / guard.DATA_DOCS / "index.html").read_text(encoding="utf-8")
    assert "plan" in docs and "calibration" in docs
    # Nor do Great Expectations' own pages: their links lead to one another.
    for path in (tmp_path / guard.DATA_DOCS).rglob("*.html"):
        own = Page(path.read_text(encoding="utf-8"))
        assert own.loaded == ["data:,"] and "script" not in own.tags, path
        for link in own.links:
            assert (path.parent / link).is_file(), (path, link)


def test_every_page_says_finite_and_folds_what_passed(tmp_path):
    table = pd.DataFrame({"value": [1.0, 2.0], "spread": [0.0, float("inf")]})
    suite = [expect_finite("value"), expect_finite("spread", 0)]
    assert "1 unexpected, e.g. [inf]" in refusal(tmp_path, "numbers", table, suite)
    pages = {path.parent.name: path.read_text() for path in (tmp_path / guard.DATA_DOCS).rglob("tables-*.html")}
    (docs,) = pages.values()
    summary = (tmp_path / "index.html").read_text()
    for text in (docs, summary):
        assert "308" not in text and "The number is finite." in text and "at least 0 and finite" in text
    assert "min_value=0.0, finite" in summary or "min_value=0, finite" in summary
    assert re.search(r"<details open>\s*<summary><strong>spread</strong>", docs)
    assert re.search(r"<details>\s*<summary><strong>value</strong>", docs)
    assert "<details><summary>1 passed</summary>" in summary


def test_text_of_a_table_stands_on_every_page_as_text(tmp_path):
    planted = "<script>alert(1)</script> \x1b[31mred\x07 \u202e<img src=x onerror=alert(2)>"
    with pytest.raises(GuardError) as refused:
        table = calibration_table([planted, "A river.", "x"], [planted, "a", "b"], {text_digest(planted): "words"})
        guard.check("calibration", table, calibration_suite(3), tmp_path / "checks")
    assert "<script>alert" in str(refused.value) and not {"\x1b", "\x07", "\u202e"} & set(str(refused.value))
    pages = list((tmp_path / "checks").rglob("*.html"))
    shown = "".join(page.read_text() for page in pages)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; " in shown and len(pages) > 2
    for page in pages:
        text = page.read_text()
        assert "<script>alert" not in text and "<img src=x" not in text, page
        assert not {"\x1b", "\x07", "\u202e"} & set(text), page


def test_repeating_a_check_keeps_the_newest_results(tmp_path):
    expectations = plan_suite(3)
    for _ in range(guard.KEPT_RUNS + 2):
        guard.check("plan", plan_table(plan()), expectations, tmp_path)
    guard.build_docs(tmp_path)
    text = guard.build_docs(tmp_path).read_text(encoding="utf-8")
    assert text.count("<details") == guard.KEPT_RUNS
    # All of them passed: nothing is unfolded.
    assert text.count(" open>") == 0
    assert len(list((tmp_path / guard.DATA_DOCS / "validations").rglob("*.html"))) == guard.KEPT_RUNS
    assert len(list((tmp_path / "gx/uncommitted/validations").rglob("*.json"))) == guard.KEPT_RUNS
    assert [path.name for path in (tmp_path / "gx/expectations").glob("*.json")] == ["plan.json"]


def test_threads_share_one_folder(tmp_path):
    failures = []

    def work(name):
        try:
            guard.check(name, *GOOD[name](), tmp_path)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("plan", "scores", "checkpoint", "heldout")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert guard.build_docs(tmp_path).read_text(encoding="utf-8").count("<details") == 4


def test_another_process_makes_it_wait(tmp_path):
    guard.build_docs(tmp_path)
    holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    arguments = [sys.executable, "-c", holder, str(tmp_path / ".lock")]
    table, expectations = GOOD["plan"]()
    worker = threading.Thread(target=guard.check, args=("plan", table, expectations, tmp_path))
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        worker.start()
        worker.join(timeout=0.5)
        assert worker.is_alive()
        process.communicate(b"\n")
    worker.join(timeout=60)
    assert not worker.is_alive()
    assert list((tmp_path / "gx/uncommitted/validations/plan").rglob("*.json"))


def test_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        guard.build_docs(tmp_path / "file" / "checks")
    guard.build_docs(tmp_path / "checks")
    (tmp_path / "checks/gx/great_expectations.yml").write_text("config_version: [")
    with pytest.raises(OutputError, match=r"cannot be opened .*remove it and run again") as caught:
        guard.build_docs(tmp_path / "checks")
    assert "\n" not in str(caught.value)


def test_great_expectations_is_imported_only_when_used():
    code = "import sys, tasks.guards.guard, tasks.guards.columns; print([m for m in {m} if m in sys.modules])"
    modules = ["great_expectations", "pandas", "torch", "scipy", "jinja2"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code.replace("{m}", repr(modules))], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
