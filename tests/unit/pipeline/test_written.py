"""The base's own text in the place of a table: how much, stored by what, and read like any other."""

from pathlib import Path

import pytest
import yaml
from support.models import make_texts, make_tiny_model, make_tokenizer, save_model
from support.project import write_rows

import mka.evidence.writing
import mka.model.loading
from mka.errors import CalibrationError, RecipeError
from mka.model.checkpoint import open_checkpoint
from mka.pipeline.job import prepare
from mka.pipeline.pipeline import foresee
from mka.pipeline.recipes import validate_recipe
from mka.pipeline.written import OwnText, as_own_text, locate_table, want_text, write_table
from mka.recipe import BASE_TEXT, AlignmentFit, CalibrationTexts, HealFit, ModelSource
from mka.terminal import showing
from mka.texts.rows import read_rows, read_texts
from mka.texts.writing import FEWEST_TOKENS, Wanted

OWN = OwnText(
    Path("store/texts.jsonl"), {"tokens": 5000, "texts": 40, "seed": 3, "dropped": {"short": 4, "special": 1}}
)


@pytest.fixture(autouse=True)
def quiet():
    with showing(False):
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "base"
    return open_checkpoint(save_model(make_tiny_model("llama"), folder))


@pytest.fixture
def silent(monkeypatch):
    """Fail if a model is run."""
    monkeypatch.setattr(mka.model.loading, "load_model", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr(mka.model.loading, "open_decoder", lambda *_: pytest.fail("the model was opened"))


def make_recipe(base, folder, **changes):
    heldout = write_rows(folder / "heldout.jsonl", make_texts(30, seed=2), "words")
    raw = {
        "name": "tiny",
        "method": {"name": "mka"},
        "model": {"folder": str(base.path)},
        "target": {"layers": 4},
        "calibration": {"path": "base", "samples": 60, "max_tokens": 16},
        "alignment": {"path": "base", "enabled": True, "tokens": 512, "context": 16},
        "evaluation": {"text": str(heldout), "overlap_index": None, "context": 32},
    }
    return validate_recipe(raw | changes)


def test_base_names_its_own_text_and_any_other_path_a_file():
    assert locate_table(Path("base"), OWN) == OWN.file
    assert locate_table(Path("tables/base"), OWN) == Path("tables/base")
    assert locate_table(Path("base.jsonl"), OWN) == Path("base.jsonl")
    assert locate_table(Path("base"), None) == BASE_TEXT
    assert OWN.describe() == "5,000 tokens in 40 texts, seed 3, 5 more left out"


def test_the_base_is_asked_for_what_the_section_that_needs_most_needs():
    calibration = CalibrationTexts(path="base", samples=100, max_tokens=64)
    # Of each of at most seven sources a rest shorter than a window is lost.
    alignment = AlignmentFit(path="base", tokens=2048, context=128)
    heal = HealFit(path="base", tokens=10_000, context=256, heldout_tokens=512)
    assert want_text(calibration, seed=0) == Wanted(6400, 100, 0)
    assert want_text(alignment=alignment, seed=4) == Wanted(2048 + 7 * 128, 0, 4)
    assert want_text(calibration, alignment, seed=0) == Wanted(6400, 100, 0)
    # One source, a fifth of the table if it has only five, is measured on and not trained on.
    assert want_text(heal=heal, seed=0) == Wanted(14_000 + 7 * 256, 0, 0)
    assert want_text(calibration, alignment, heal, seed=0) == Wanted(14_000 + 7 * 256, 100, 0)
    large = HealFit(path="base", tokens=512, context=16, heldout_tokens=4096)
    assert want_text(heal=large, seed=0) == Wanted(7 * 4096 + 7 * 16)
    small = AlignmentFit(path="base", tokens=256, context=16)
    assert want_text(alignment=small, seed=0) == Wanted(FEWEST_TOKENS)
    assert want_text(CalibrationTexts(), AlignmentFit(), HealFit(), seed=0) is None
    assert want_text(seed=0) is None


def test_a_table_is_written_once_for_one_base_amount_seed_and_precision(base, tmp_path, monkeypatch):
    source = ModelSource(folder=base.path)
    made = write_table(base, source, Wanted(1000), tmp_path)
    rows = read_rows(as_own_text(made).file)
    assert len(rows) == made.facts["texts"] and {"text", "source"} == set(rows[0])
    # Read by another way than it was written: the tokenizer that people load.
    assert sum(len(make_tokenizer()(row["text"])["input_ids"]) for row in rows) == made.facts["tokens"] >= 1000
    others = [
        write_table(base, source, Wanted(1000, 30), tmp_path),
        write_table(base, source, Wanted(1000, seed=1), tmp_path),
        write_table(base, source, Wanted(1200), tmp_path),
        write_table(base, ModelSource(folder=base.path, dtype="bfloat16"), Wanted(1000), tmp_path),
    ]
    assert len({made.key, *(other.key for other in others)}) == 5
    monkeypatch.setattr(mka.evidence.writing, "write_texts", lambda *_: pytest.fail("it wrote again"))
    again = write_table(base, source, Wanted(1000), tmp_path)
    assert again.reused and again.digest == made.digest


def test_a_job_reads_what_its_base_wrote_for_it(base, tmp_path):
    recipe = make_recipe(base, tmp_path, seed=2)
    job = prepare(recipe, tmp_path / "work")
    (file,) = (tmp_path / "work").glob("stages/write-*/texts.jsonl")
    texts = read_texts(file)
    assert list(job.inputs.calibration.texts) == texts[:60] and job.inputs.calibration.path == "base"
    assert sorted(t for group in job.inputs.alignment.texts.values() for t in group) == sorted(texts)
    assert len(job.inputs.alignment.texts) == 6 and job.inputs.alignment.tokens == 512
    assert job.inputs.own_text.facts["seed"] == 2 and not job.inputs.own_text.foreseen
    assert job.recipe == recipe  # the record says `base`, not where the store keeps it
    assert yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))["alignment"]["path"] == "base"


def test_text_of_the_base_that_evaluation_uses_is_refused_like_any_other(base, tmp_path):
    recipe = make_recipe(base, tmp_path)
    prepare(recipe, tmp_path / "work")
    (file,) = (tmp_path / "work").glob("stages/write-*/texts.jsonl")
    texts = read_texts(file)
    write_rows(tmp_path / "heldout.jsonl", [*make_texts(30, seed=2), texts[-1].upper().replace("W", "w")], "words")
    with pytest.raises(CalibrationError, match=f"1 of {len(texts)} calibration texts are used by evaluation") as error:
        prepare(recipe, tmp_path / "work")
    assert "another seed makes other text" in str(error.value)


def test_a_dry_run_writes_nothing_and_says_what_would_be_written(base, tmp_path, silent):
    recipe = make_recipe(base, tmp_path)
    job = prepare(recipe, tmp_path / "work", write=False)
    facts = foresee(job, tmp_path / "out")
    assert facts["to_write"] == {"tokens": 960, "texts": 60, "seed": 0}
    assert facts["calibration_texts"] == 60 and facts["calibration_tokens"] == 60 * 16
    assert facts["alignment"]["tokens"] == 512
    # The whole model at once, and 32 texts of up to 256 tokens: keys and values of six layers, 32 numbers wide.
    weights = 4 * sum(tensor.parameters for tensor in base.tensors.values())
    assert facts["memory_bytes"] >= weights + 32 * 256 * 2 * 6 * 32 * 4
    assert not (tmp_path / "work").exists()


def test_a_dry_run_reads_what_is_written_already(base, tmp_path, monkeypatch):
    recipe = make_recipe(base, tmp_path)
    made = prepare(recipe, tmp_path / "work")
    monkeypatch.setattr(mka.model.loading, "load_model", lambda *_: pytest.fail("the model was loaded"))
    foreseen = prepare(recipe, tmp_path / "work", write=False)
    assert foreseen.inputs.calibration == made.inputs.calibration
    assert foresee(foreseen, tmp_path / "out")["to_write"] is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"target": {"layers": 9}}, "9"),
        ({"quantize": {"scheme": "int8", "group_size": 24}}, "does not divide"),
        ({"evaluation": {"text": "nowhere.jsonl"}}, "text table not found: nowhere.jsonl"),
        ({"calibration": {"path": "nowhere.jsonl"}}, "text table not found: nowhere.jsonl"),
        ({"evaluation": {"text": None, "tasks": {"piqa": 4}, "tasks_folder": "nowhere"}}, "no table in nowhere"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_base_writes(base, tmp_path, silent, changes, expected):
    with pytest.raises((CalibrationError, RecipeError), match=expected):
        prepare(make_recipe(base, tmp_path, **changes), tmp_path / "work")


def test_nothing_is_written_for_sections_that_are_not_in_use(base, tmp_path, silent):
    changes = {"alignment": {"path": "base"}, "method": {"name": "reference_code"}, "heal": {"path": "base"}}
    assert prepare(make_recipe(base, tmp_path, **changes), tmp_path / "work").inputs.own_text is None
