"""Tasks of one's own, defined beside their tables: scored like any other, and refused where they lead elsewhere."""

import json

import pytest
import torch
import yaml
from support.models import make_texts, make_tiny_model, make_tokenizer
from support.task_tables import define, save_items

from mka.errors import RecipeError
from mka.evaluation.catalog import Catalog
from mka.evaluation.definitions import read_definitions
from mka.evaluation.tasks import check_tasks, run_tasks
from mka.pipeline.inputs import digest_task

WORDS = make_texts(8, seed=3)


@pytest.fixture
def folder(tmp_path):
    return save_items(tmp_path, WORDS)


def run(folder, tasks):
    model = make_tiny_model("llama", max_position_embeddings=512).eval()
    return model, run_tasks(model, make_tokenizer(), tasks, tasks_folder=folder, max_length=512, progress=False)


def test_items_agree_with_scoring_by_hand(folder):
    model, (score,) = run(folder, {"mine": None})
    tokenizer, right = make_tokenizer(), []
    for number, text in enumerate(WORDS):
        sums = []
        for choice in ("w3", "w9 w4", "w5"):
            context, whole = tokenizer(text).input_ids, tokenizer(f"{text} {choice}").input_ids
            with torch.inference_mode():
                found = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(sum(float(found[place - 1, whole[place]]) for place in range(len(context), len(whole))))
        right.append(int(max(range(3), key=sums.__getitem__) == number % 3))
    assert score.items == tuple(right) and (score.name, score.metric, score.n) == ("mine", "acc", len(WORDS))
    assert score.value == sum(right) / len(right)


def test_a_group_is_the_mean_over_the_items_of_its_tasks(folder):
    define(folder, "second")
    (folder / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["mine", "second"]}))
    _, (both, one) = run(folder, {"both": None, "mine": None})
    assert both.n == 2 * one.n and both.value == one.value
    names = [file.name for file in Catalog(folder).list_files("both", every=True)]
    assert sorted(set(names)) == ["mine.jsonl", "mine.yaml", "second.yaml"]


def test_definition_and_table_are_in_the_digest_and_texts_are_kept_apart(folder):
    before = digest_task(Catalog(folder), "mine", 0)
    assert list(Catalog(folder).read_texts("mine")) == WORDS
    define(folder, doc_to_text="{{question}}?")
    changed = digest_task(Catalog(folder), "mine", 0)
    (folder / "mine.jsonl").write_text((folder / "mine.jsonl").read_text() + "\n")
    assert len({before, changed, digest_task(Catalog(folder), "mine", 0)}) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"doc_to_text": "!function code.text"}, "runs Python of its own"),
        ({"include": "other.yaml"}, "include leads out of the file"),
        ({"class": "code.Task"}, "class leads out of the file"),
        ({"dataset_path": "org/name"}, "dataset_path is 'org/name'; allowed: json"),
        ({"dataset_kwargs": {"data_files": {"test": "../secret.txt"}}}, "is not in"),
        ({"dataset_kwargs": {"data_files": {"train": "mine.jsonl"}}}, "data_files has train, asked for: test"),
        ({"dataset_kwargs": ...}, "has no data_files"),
        ({"test_split": ...}, "no split to measure on"),
        ({"metric_list": [{"metric": "bleu"}]}, "asks for none of acc_norm, acc, exact_match"),
        ({"metric_list": "acc"}, "'metric_list': .* list, got 'acc'"),
        ({"metric_list": [{"metric": "acc"}, {}]}, "missing key 'metric_list.1.metric'"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "hf_evaluate'.* got True"),
        (
            {"metric_list": [{"metric": "acc"}], "output_type": "generate_until"},
            "none of exact_match, .* generate_until",
        ),
        ({"generation_kwargs": {"custom_generate": "code"}}, "unknown key 'generation_kwargs.custom_generate'"),
        ({"filter_list": [{"name": "x", "filter": [{"function": "decontaminate"}]}]}, "got 'decontaminate'"),
        ({"filter_list": [{"name": name, "filter": [{"function": "take_first"}]} for name in "ab"]}, "at most 1 item"),
        ({"process_results": "code.score"}, "process_results leads out of the file"),
        ({"doc_to_texts": "{{question}}"}, "unknown key 'doc_to_texts' .*'doc_to_text'"),
        ({"fewshot_config": {"split": "dev"}}, "data_files has test, asked for: dev, test"),
        ({"dataset_kwargs": {"data_files": {"test": "x" * 300}}}, "is not in"),
        ({"repeats": 10**9}, "'repeats': .* 64, got 1000000000"),
        ({"task": ...}, "defines no task"),
        ({"task": "piqa"}, "'piqa' is one of lm-eval's own"),
    ],
)
def test_what_is_not_run_here_is_refused_in_one_line(folder, changes, said):
    define(folder, **changes)
    with pytest.raises(RecipeError, match=said) as refused:
        check_tasks({"mine": None}, folder)
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ question.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        "{{ nothing }}",
    ],
)
def test_a_template_sees_its_item_and_nothing_else(folder, template, monkeypatch):
    monkeypatch.chdir(folder)
    define(folder, doc_to_text=template)
    with pytest.raises(RecipeError, match="not usable by lm-eval"):
        run(folder, {"mine": None})
    assert not (folder / "ran").exists()


def test_a_metric_of_another_name_is_no_code_to_run(folder, monkeypatch):
    monkeypatch.chdir(folder)  # lm-eval would load a folder of the metric's name, and then ask a hub for it
    (folder / "planted").mkdir()
    (folder / "planted" / "planted.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    define(folder, metric_list=[{"metric": "planted"}, {"metric": "acc"}])
    _, (score,) = run(folder, {"mine": None})
    assert score.metric == "acc" and not (folder / "ran").exists()


def test_an_item_that_no_template_fits_ends_it_before_the_model_is_asked(folder):
    rows = (folder / "mine.jsonl").read_text().splitlines()
    row = json.loads(rows[-1]) | {"answer": None}
    (folder / "mine.jsonl").write_text("\n".join([*rows[:-1], json.dumps(row)]))
    with pytest.raises(RecipeError, match="not usable by lm-eval: TypeError"):
        run_tasks(None, None, {"mine": None}, tasks_folder=folder, progress=False)


def test_an_item_without_two_texts_to_choose_from_is_refused(folder):
    define(folder, doc_to_choice="question")  # lm-eval would take a text for the list of its letters
    with pytest.raises(RecipeError, match=r"doc_to_choice makes 'w.*' of item 1; needed: a list of two or more"):
        run_tasks(None, None, {"mine": None}, tasks_folder=folder, progress=False)


def test_a_value_that_is_nested_without_end_is_refused(folder):
    deep = "[" * 30 + "0" + "]" * 30
    (folder / "mine.jsonl").write_text((folder / "mine.jsonl").read_text().replace('"answer": 1', f'"answer": {deep}'))
    with pytest.raises(RecipeError, match="item 2: 'answer' is nested deeper than 8 levels"):
        list(Catalog(folder).read_texts("mine"))


def test_a_table_is_found_by_its_name_though_that_reads_like_a_pattern(folder):
    (folder / "mine.jsonl").rename(folder / "mine[1].jsonl")
    define(folder, dataset_kwargs={"data_files": {"test": "mine[1].jsonl"}})
    assert list(Catalog(folder).read_texts("mine")) == WORDS
    assert {file.name for file in Catalog(folder).list_files("mine", every=True)} == {"mine[1].jsonl", "mine.yaml"}


def test_answers_that_are_generated_are_scored_by_exact_match(folder):
    model, tokenizer, rows = make_tiny_model("llama", max_position_embeddings=512).eval(), make_tokenizer(), []
    for number, text in enumerate(WORDS):
        with torch.inference_mode():
            found = model(torch.tensor([tokenizer(text).input_ids])).logits[0, -1].argmax()
        rows.append({"question": text, "answer": tokenizer.decode(found) if number % 2 else "another"})
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = {"output_type": "generate_until", "doc_to_choice": ..., "doc_to_target": "{{answer}}"}
    changes |= {"generation_kwargs": {"until": ["."], "max_gen_toks": 1}, "metric_list": [{"metric": "exact_match"}]}
    define(folder, **changes)
    _, (score,) = run(folder, {"mine": None})
    assert score.items == (0, 1) * 4 and score.metric == "exact_match" and score.extra["truncated"] == 0
    define(folder, **changes | {"generation_kwargs": {"max_gen_toks": 512}})
    with pytest.raises(RecipeError, match="leaves no room for a question in the 512 tokens"):
        run(folder, {"mine": None})


@pytest.mark.parametrize("text", ["", "- a", "a: [", "task: mine\ntask: twice", "\x00", "a: &a [*a]", "{1: 2}"])
def test_a_damaged_definition_is_refused_in_one_line(folder, text):
    (folder / "mine.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"mine\.yaml"):
        read_definitions(folder)


def test_an_unknown_name_is_answered_with_the_nearest_that_is_defined(folder):
    with pytest.raises(RecipeError, match="mean 'mine'"):
        check_tasks({"mini": None}, folder)
    check_tasks({"piqa": None}, folder / "missing")
