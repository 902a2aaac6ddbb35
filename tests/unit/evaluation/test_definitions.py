"""Tasks of one's own, defined beside their tables: scored like any other, and refused where they lead elsewhere."""

import json

import pytest
import torch
import yaml
from support.models import make_texts, make_tiny_model, make_tokenizer

from mka.errors import RecipeError
from mka.evaluation.definitions import read_definitions
from mka.evaluation.task_tables import list_tables, read_task_texts
from mka.evaluation.tasks import check_tasks, run_tasks
from mka.pipeline.inputs import digest_task

WORDS = make_texts(8, seed=3)
MINE = {
    "task": "mine",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "/written/down/elsewhere/mine.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def define(folder, name="mine", **changes):
    body = {key: value for key, value in (MINE | {"task": name} | changes).items() if value is not ...}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(body))


@pytest.fixture
def folder(tmp_path):
    rows = [{"question": text, "choices": ["w3", "w9 w4", "w5"], "answer": n % 3} for n, text in enumerate(WORDS)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    define(tmp_path)
    return tmp_path


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
    names = [file.name for file in list_tables(folder, "both", every=True)]
    assert sorted(set(names)) == ["mine.jsonl", "mine.yaml", "second.yaml"]


def test_definition_and_table_are_in_the_digest_and_texts_are_kept_apart(folder):
    before = digest_task(folder, "mine", 0)
    assert list(read_task_texts("mine", folder)) == WORDS
    define(folder, doc_to_text="{{question}}?")
    changed = digest_task(folder, "mine", 0)
    (folder / "mine.jsonl").write_text((folder / "mine.jsonl").read_text() + "\n")
    assert len({before, changed, digest_task(folder, "mine", 0)}) == 3


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
        ({"metric_list": "acc"}, "asks for none of"),
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


@pytest.mark.parametrize("text", ["", "- a", "a: [", "task: mine\ntask: twice", "\x00", "a: &a [*a]", "{1: 2}"])
def test_a_damaged_definition_is_refused_in_one_line(folder, text):
    (folder / "mine.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"mine\.yaml"):
        read_definitions(folder)


def test_an_unknown_name_is_answered_with_the_nearest_that_is_defined(folder):
    with pytest.raises(RecipeError, match="mean 'mine'"):
        check_tasks({"mini": None}, folder)
    check_tasks({"piqa": None}, folder / "missing")
