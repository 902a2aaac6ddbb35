"""Data sets of a hub: read at a commit, kept, and read again where no hub answers."""

import json

import pytest
from support.models import make_texts, make_tiny_model, make_tokenizer
from support.task_tables import define

import mka.evaluation.task_data as task_data
from mka.errors import RecipeError
from mka.evaluation.catalog import Catalog
from mka.evaluation.listing import list_names
from mka.evaluation.tasks import run_tasks

WORDS = make_texts(8, seed=7)


def write_rows(words):
    rows = [{"question": text, "choices": ["w3", "w9 w4", "w5"], "answer": n % 3} for n, text in enumerate(words)]
    return "\n".join(map(json.dumps, rows)).encode()


@pytest.fixture
def kept(hub, tmp_path, monkeypatch):
    """Caches of its own, on a hub that has the data set."""
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.address)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    task_data.pin_revision.cache_clear()
    yield hub.put_data_set(
        "org/Mine", {"data/test.jsonl": write_rows(WORDS), "data/train.jsonl": write_rows(WORDS[:3])}
    )
    task_data.pin_revision.cache_clear()


@pytest.fixture
def mine(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    define(folder, dataset_path="org/Mine", dataset_kwargs=...)
    return folder


def run(mine, limit=None):
    model = make_tiny_model("llama", max_position_embeddings=512).eval()
    told = {"tasks_folder": None, "include_path": mine, "max_length": 512, "progress": False}
    (score,) = run_tasks(model, make_tokenizer(), {"mine": limit}, **told)
    return score


def test_a_data_set_is_read_at_its_commit_which_the_score_names(kept, mine, hub):
    first = run(mine)
    assert (first.n, first.extra["source"], first.extra["data"]) == (8, "hub", {"org/Mine": kept})
    assert list(Catalog(None, mine).read_texts("mine")) == WORDS
    said = Catalog(None, mine).digest("mine", 0)
    assert any(kept in line for line in said)
    # What the hub has next is another commit, and so another digest.
    task_data.pin_revision.cache_clear()
    files = {"data/test.jsonl": write_rows(WORDS[:5]), "data/train.jsonl": write_rows(WORDS[:2])}
    later = hub.put_data_set("org/Mine", files)
    assert Catalog(None, mine).digest("mine", 0) != said
    assert run(mine).extra["data"] == {"org/Mine": later} and run(mine).n == 5
    # A definition may pin one itself.
    define(mine, dataset_path="org/Mine", dataset_kwargs={"revision": kept})
    assert (run(mine).n, run(mine).extra["data"]) == (8, {"org/Mine": kept})


def test_a_folder_of_the_same_name_is_no_data_set_of_the_hub(kept, mine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "Mine").mkdir(parents=True)
    (tmp_path / "org" / "Mine" / "test.jsonl").write_bytes(write_rows(WORDS[:2]))
    assert run(mine).n == 8


def test_where_no_hub_answers_what_was_fetched_is_read_again(kept, mine, hub, monkeypatch):
    assert list_kept_rows(mine)["runs"].startswith("safe; its data are not")
    first = run(mine)
    for name in ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE"):
        monkeypatch.setattr(name, True)
    task_data.pin_revision.cache_clear()
    seen = len(hub.seen)
    again = run(mine)
    assert len(hub.seen) == seen
    assert (again.items, again.extra) == (first.items, first.extra)
    assert list_kept_rows(mine)["runs"] == "yes"


def list_kept_rows(mine):
    return next(row for row in list_names(Catalog(None, mine)) if row["name"] == "mine")


def test_a_data_set_that_is_not_there_is_named(kept, mine):
    define(mine, dataset_path="org/Other", dataset_kwargs=...)
    with pytest.raises(RecipeError, match=r"data set org/Other: the hub's data sets cannot be fetched") as refused:
        run(mine)
    assert "\n" not in str(refused.value)
    define(mine, dataset_path="org/Mine", dataset_kwargs=..., test_split="validation")
    with pytest.raises(RecipeError, match=r"data set org/Mine has no split 'validation': "):
        run(mine)
