"""What the names of tasks stand for: lm-eval's own by an index, groups and tags, definitions of one's own elsewhere."""

import json
import time

import pytest
import yaml
from support.models import make_texts, make_tiny_model, make_tokenizer
from support.task_tables import MINE, define

import mka.evaluation.packaged as packaged
import mka.evaluation.task_index as task_index
import mka.outside.rendering as rendering
from mka.errors import RecipeError
from mka.evaluation.catalog import Catalog
from mka.evaluation.packaged import Function, NotRunError, check_function, define_packaged, find_packaged, read_packaged
from mka.evaluation.task_index import build_index, find_index, read_index
from mka.evaluation.tasks import _weigh_tasks, run_tasks

WORDS = make_texts(6, seed=5)


@pytest.fixture
def mine(tmp_path):
    """A folder of definitions of one's own, in a folder within it."""
    folder = tmp_path / "mine" / "inner"
    folder.mkdir(parents=True)
    rows = [{"question": text, "choices": ["w3", "w9 w4", "w5"], "answer": n % 3} for n, text in enumerate(WORDS)]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    define(folder)
    return tmp_path / "mine"


def write_index(folder, **files):
    for name, body in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(body) if isinstance(body, dict) else body)
    return build_index(folder)


def test_every_name_is_found_and_the_second_use_takes_no_time():
    index = read_index()
    assert len(index) > 10_000 and {index[name].kind for name in ("gsm8k", "sciq", "blimp", "tinyBenchmarks")} >= {
        "task"
    }
    assert (index["gsm8k"].output_type, index["gsm8k"].data, index["gsm8k"].why) == (
        "generate_until",
        "openai/gsm8k:main",
        "",
    )
    read_index.cache_clear()
    start = time.monotonic()
    assert read_index() == index
    assert time.monotonic() - start < 1


def test_the_index_is_kept_by_version_and_made_anew_where_it_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_index(
        folder, one=MINE | {"task": "one", "tag": ["tagged"], "dataset_path": "org/name", "dataset_kwargs": None}
    )
    monkeypatch.setattr(task_index, "find_packaged", lambda: folder)
    read_index.cache_clear()
    try:
        found = read_index()
        assert set(found) == {"one", "tagged"} and found["tagged"].members == ("one",)
        (file,) = find_index().parent.iterdir()
        assert file == find_index() and "lm-eval-" in file.name
        write_index(folder, two=MINE | {"task": "two"})
        read_index.cache_clear()
        assert set(read_index()) == {"one", "tagged"}  # kept: the version says what there is
        monkeypatch.setattr(task_index.importlib.metadata, "version", lambda name: "99")
        read_index.cache_clear()
        assert set(read_index()) == {"one", "two", "tagged"}
        find_index().write_text('{"names": {"one": ')
        read_index.cache_clear()
        assert set(read_index()) == {"one", "two", "tagged"}
    finally:
        read_index.cache_clear()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("humaneval", "task 'humaneval' is not run here: .*code"),
        ("wikitext", "is not run here: .*loglikelihood_rolling"),
        ("gsm8kk", "unknown task 'gsm8kk' .did you mean 'gsm8k'"),
        (
            "leaderboard",
            "group 'leaderboard': .* is not run here: .*leaderboard_ifeval.*; name the others: .*leaderboard_bbh",
        ),
        ("openllm", "group 'openllm' says other things of its members"),
    ],
)
def test_what_is_not_run_here_is_refused_by_name(name, said):
    with pytest.raises(RecipeError, match=said) as refused:
        catalog = Catalog()
        catalog.check(catalog.expand({name: 8}))
    assert "\n" not in str(refused.value)


def test_tags_and_groups_without_a_mean_become_their_members_and_groups_with_one_stay():
    catalog = Catalog()
    index = read_index()
    assert (index["ai2_arc"].kind, index["ai2_arc"].members) == ("tag", ("arc_challenge", "arc_easy"))
    assert catalog.expand({"leaderboard_bbh": 50, "gsm8k": None}) == {"leaderboard_bbh": 50, "gsm8k": None}
    assert catalog.expand({"ai2_arc": 7, "arc_easy": 7}) == {"arc_challenge": 7, "arc_easy": 7}
    with pytest.raises(RecipeError, match="'arc_easy' is asked for twice"):
        catalog.expand({"ai2_arc": 7, "arc_easy": 9})
    stem = catalog.find("mmlu_stem")
    assert stem.metric == "acc" and stem.by_size and len(stem.tasks) == 19
    assert {task.name for task in stem.tasks} < {task.name for task in catalog.find("mmlu").tasks}
    with pytest.raises(RecipeError, match=r"'mmlu_anatomy' is part of 'mmlu_stem'|'mmlu_\w+' is part of 'mmlu_stem'"):
        catalog.check({"mmlu_stem": 60, stem.tasks[0].name: 4})


def test_what_a_group_says_of_its_members_holds(tmp_path, monkeypatch):
    body = MINE | {"dataset_path": "org/name", "dataset_kwargs": None, "num_fewshot": 1}
    members = ["a", {"task": "b", "num_fewshot": 3}, {"group": "within", "task": ["c"], "num_fewshot": 4}]
    mean = {"metric": "acc", "weight_by_size": False}
    write = {name: body | {"task": name} for name in "abc"}
    write_index(tmp_path, **write, g={"group": "g", "task": members, "aggregate_metric_list": [mean]})
    for module in ("mka.evaluation.catalog", "mka.evaluation.task_groups"):
        monkeypatch.setattr(f"{module}.find_packaged", lambda: tmp_path)
        monkeypatch.setattr(f"{module}.read_index", lambda: build_index(tmp_path))
    found = Catalog().find("g")
    assert (found.metric, found.by_size) == ("acc", False)
    assert [(task.name, task.body["num_fewshot"]) for task in found.tasks] == [("a", 1), ("b", 3), ("c", 4)]


def test_tasks_that_weigh_the_same_have_lm_evals_mean_and_error():
    from lm_eval.api.metrics import aggregate_subtask_metrics, unweighted_mean_stderr

    rows = [[1, 0, 1, 1], [0, 0, 1], [1, 1]]
    items, value, stderr = _weigh_tasks(rows)
    means = [sum(row) / len(row) for row in rows]
    errors = [(mean * (1 - mean) / (len(row) - 1)) ** 0.5 for mean, row in zip(means, rows)]
    assert value == pytest.approx(aggregate_subtask_metrics(means, [4, 3, 2], weight_by_size=False))
    assert stderr == pytest.approx(unweighted_mean_stderr(errors))
    assert len(items) == 9 and sum(items) / 9 == pytest.approx(value)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os", "imports os"),
        ("from evaluate import load", "imports evaluate"),
        ("import re, subprocess", "imports subprocess"),
        ("def text(doc):\n    import requests", "imports requests"),
        ("def text(doc):\n    return open('/etc/passwd').read()", "uses open"),
        ("def text(doc):\n    return eval(doc['x'])", "uses eval"),
        ("import datasets\nDATA = datasets.load_dataset('org/name')", "uses load_dataset"),
        ("from datasets import load_dataset", "uses load_dataset"),
        ("from lm_eval.tasks.other import text", "is not among lm-eval's tasks"),
        ("from lm_eval.models.huggingface import HFLM", "imports lm_eval.models.huggingface"),
        ("def (", "cannot be read"),
    ],
)
def test_a_function_of_a_module_that_reaches_further_is_refused(tmp_path, monkeypatch, code, said):
    folder = tmp_path / "lm_eval" / "tasks"
    folder.mkdir(parents=True)
    (folder / "utils.py").write_text(code)
    monkeypatch.setattr(packaged, "find_packaged", lambda: folder)
    with pytest.raises(NotRunError, match=said):
        check_function(Function(f"{folder}/utils.text"))
    (folder / "fine.py").write_text("import re\nimport datasets\ndef text(doc):\n    return re.sub('a', '', doc['q'])")
    check_function(Function(f"{folder}/fine.text"))
    with pytest.raises(NotRunError, match="not among lm-eval's tasks"):
        check_function(Function(f"{tmp_path}/elsewhere.text"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"class": "x"}, "class runs code"),
        ({"custom_dataset": Function("/x/utils.make")}, "custom_dataset runs code"),
        ({"unsafe_code": True}, "code that the model writes"),
        ({"use_prompt": "promptsource:all"}, "use_prompt runs code"),
        ({"dataset_path": "json"}, "'json' is no repository of a hub"),
        ({"dataset_path": "/data/x"}, "no repository of a hub"),
        ({"dataset_path": "../x"}, "no repository of a hub"),
        ({"dataset_kwargs": {"data_files": "https://x/y.json"}}, "leads out of the data set's repository"),
        ({"dataset_kwargs": {"data_files": {"test": ["../../x"]}}}, "leads out of the data set's repository"),
        ({"dataset_kwargs": {"streaming": True}}, "dataset_kwargs.streaming is not read"),
        ({"test_split": None}, "no split to measure on"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "scored by none of"),
        ({"metric_list": [{"metric": "bleu"}]}, "scored by none of"),
        ({"doc_to_image": "image"}, "unknown key 'doc_to_image'"),
        ({"generation_kwargs": {"max_gen_toks": 10**9}}, "max_gen_toks"),
        ({"generation_kwargs": {"custom_generate": "org/code"}}, "custom_generate"),
        ({"filter_list": [{"name": "x", "filter": [{"function": Function("/x/utils.f")}]}]}, "is a function"),
    ],
)
def test_lm_evals_own_definitions_are_held_to_the_closed_list(tmp_path, changes, said):
    body = MINE | {"dataset_path": "org/name", "dataset_kwargs": None} | changes
    with pytest.raises(NotRunError, match=said):
        define_packaged("mine", tmp_path / "mine.yaml", body)


def test_of_several_filters_the_first_is_scored_or_the_one_that_a_group_names():
    file = find_packaged() / read_index()["gsm8k"].file
    body = read_packaged(file)
    names = [entry["name"] for entry in body["filter_list"]]
    assert len(names) == 2
    for wanted, name in ((None, names[0]), (names[1], names[1])):
        task = define_packaged("gsm8k", file, body, wanted)
        assert [entry["name"] for entry in task.body["filter_list"]] == [name] and task.metric == "exact_match"
    assert task.data.label == "openai/gsm8k:main" and task.data.splits[0] == "test"


def test_definitions_of_ones_own_may_be_elsewhere(mine, tmp_path):
    tables = tmp_path / "tables"
    tables.mkdir()
    catalog = Catalog(tables, mine)
    catalog.check(catalog.expand({"mine": None}))
    model = make_tiny_model("llama", max_position_embeddings=512).eval()
    told = {"tasks_folder": tables, "include_path": mine, "max_length": 512, "progress": False}
    (score,) = run_tasks(model, make_tokenizer(), {"mine": None}, **told)
    assert (score.name, score.n, score.extra["source"]) == ("mine", len(WORDS), "tables")
    assert list(catalog.read_texts("mine")) == WORDS
    before = catalog.digest("mine", 0)
    define(mine / "inner", doc_to_text="{{question}}?")
    assert Catalog(tables, mine).digest("mine", 0) != before
    with pytest.raises(RecipeError, match="is no folder"):
        Catalog(tables, mine / "missing").find("mine")
    (tables / "mine.jsonl").write_text((mine / "inner" / "mine.jsonl").read_text())
    define(tables)
    with pytest.raises(RecipeError, match=r"'mine' is defined in .* and in .*; rename one"):
        Catalog(tables, mine).find("mine")


def test_definitions_elsewhere_are_under_the_same_closed_list(mine):
    define(mine, "other", include="base.yaml")
    with pytest.raises(RecipeError, match="include leads out of the file"):
        Catalog(None, mine).find("other")
    define(mine, "other", dataset_path="org/name", dataset_kwargs=...)
    assert Catalog(None, mine).find("other").tasks[0].data.path == "org/name"
    define(mine, "other", dataset_path="csv", dataset_kwargs=...)
    with pytest.raises(RecipeError, match=r"other\.yaml: its data set 'csv' is no repository"):
        Catalog(None, mine).find("other")


ENDLESS = "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"doc_to_text": ENDLESS}, "doc_to_text"),
        ({"description": ENDLESS}, "description"),
        ({"doc_to_text": "{{ question | regex_replace('(w+ ?[^x]?)+x', '') }}"}, "doc_to_text"),
        ({"fewshot_config": {"doc_to_text": ENDLESS}, "num_fewshot": 1}, "fewshot_config.doc_to_text"),
    ],
)
def test_a_template_without_end_is_refused_with_task_and_key(mine, monkeypatch, changes, key):
    monkeypatch.setattr(rendering, "LIMIT", 1.0)
    define(mine / "inner", **changes)
    rows = [{"question": "w" * 60, "choices": ["a", "b"], "answer": 0}] * 3
    (mine / "inner" / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    start = time.monotonic()
    with pytest.raises(
        RecipeError, match=rf"task 'mine': {key} takes more than 1 s of one item and is given up"
    ) as told:
        run_tasks(None, None, {"mine": None}, tasks_folder=None, include_path=mine, shots=None, progress=False)
    assert time.monotonic() - start < 30 and "\n" not in str(told.value)


def test_a_pattern_without_end_is_refused_when_it_meets_an_answer(mine, monkeypatch):
    """No rehearsal knows what a model says."""
    monkeypatch.setattr(rendering, "LIMIT", 1.0)
    changes = {"output_type": "generate_until", "doc_to_choice": ..., "doc_to_target": "{{answer}}"}
    changes |= {"metric_list": [{"metric": "exact_match"}], "generation_kwargs": {"until": [], "max_gen_toks": 4}}
    pattern = {"function": "regex", "regex_pattern": "(a+)+$"}
    define(mine / "inner", **changes, filter_list=[{"name": "x", "filter": [pattern, {"function": "take_first"}]}])
    model = make_tiny_model("llama", max_position_embeddings=512).eval()
    monkeypatch.setattr("lm_eval.models.huggingface.HFLM.generate_until", lambda self, requests, **_: _say(requests))
    with pytest.raises(RecipeError, match=r"task 'mine': filter_list\.0\.filter\.0\.regex_pattern takes more than 1 s"):
        run_tasks(model, make_tokenizer(), {"mine": None}, tasks_folder=None, include_path=mine, progress=False)


def _say(requests):
    return ["a" * 40 + "b" for _ in requests]
