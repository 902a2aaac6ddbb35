"""`mka write`, and the commands that let the base write where a table is called `base` or is not there."""

import json
from pathlib import Path

import pytest
from support.bench import make_bench_folder, write_bench_recipe
from support.models import make_texts, make_tiny_model, save_model

import mka.evidence.writing
import mka.model.loading
from mka.cli.main import main
from mka.texts.rows import read_heldout, read_rows

SOURCES = {f"base-{kind}" for kind in ("token", "prose", "reference", "dialogue", "steps", "code")}
TARGET = ["--layers", 5, "--protect-first", 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(make_tiny_model("llama"), tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model that reads windows of an alignment, 512 tokens."""
    model = make_tiny_model("llama", max_position_embeddings=512)
    return save_model(model, tmp_path_factory.mktemp("wide") / "base")


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    """An empty folder, as an installed `mka` finds it."""
    monkeypatch.chdir(tmp_path)


def run(capsys, *given, code=0):
    capsys.readouterr()
    assert main([str(argument) for argument in given]) == code
    return capsys.readouterr()


def refuse(capsys, *given):
    out, err = run(capsys, *given, code=2)
    assert out == "" and err.startswith("mka: ") and err.count("\n") == 1
    return err


def test_write_publishes_a_table_and_says_what_is_in_it(capsys, folder):
    foreseen = json.loads(
        run(capsys, "write", folder, "--tokens", 1000, "--output", "own.jsonl", "--dry-run", "--json").out
    )
    assert foreseen == {"tokens": 1000, "length": 256, "seed": 0, "output": "own.jsonl"}
    assert not Path("own.jsonl").exists()
    facts = json.loads(run(capsys, "write", folder, "--tokens", 1000, "--output", "own.jsonl", "--json").out)
    rows = read_rows(Path("own.jsonl"))
    grouped = read_heldout(Path("own.jsonl"))
    assert facts["texts"] == len(rows) and facts["sources"] == {name: len(grouped[name]) for name in sorted(grouped)}
    assert sum(len(row["text"].split()) for row in rows) == facts["tokens"] >= 1000
    assert set(facts["dropped"]) == {"short"} and facts["seed"] == 0
    out, _ = run(capsys, "write", folder, "--tokens", 1000, "--output", "again.jsonl")
    assert Path("again.jsonl").read_bytes() == Path("own.jsonl").read_bytes()
    assert f"in {len(rows)} texts, seed 0, {facts['dropped']['short']} more left out; stored before" in out
    run(capsys, "write", folder, "--tokens", 1000, "--seed", 1, "--output", "other.jsonl")
    assert Path("other.jsonl").read_bytes() != Path("own.jsonl").read_bytes()


def test_what_cannot_be_written_is_refused_in_one_line(capsys, folder, tmp_path, monkeypatch):
    line = refuse(capsys, "write", folder, "--tokens", 100, "--output", "own.jsonl")
    assert "100 tokens are too few to write: at least 896" in line
    assert "nowhere" in refuse(capsys, "write", "nowhere", "--tokens", 1000, "--output", "own.jsonl")
    assert "is not a valid integer" in refuse(capsys, "write", folder, "--tokens", "many", "--output", "own.jsonl")
    # A base that only repeats itself.
    monkeypatch.setattr(mka.evidence.writing, "judge_text", lambda *_: "repetitive")
    line = refuse(capsys, "write", folder, "--tokens", 1000, "--output", "own.jsonl")
    assert "the base writes nothing usable: of 64 texts 64 were left out (repetitive: 64); give a table" in line
    assert not list(tmp_path.iterdir())
    (tmp_path / "own.jsonl").write_text("mine")
    assert "exists" in refuse(capsys, "write", folder, "--tokens", 1000, "--output", "own.jsonl")
    assert (tmp_path / "own.jsonl").read_text() == "mine"


def test_an_installed_mka_needs_no_table(capsys, wide, work):
    """In an empty folder, with nothing named: the base writes what calibrates and what is aligned on."""
    given = [
        "compress",
        wide,
        "--method",
        "mka",
        *TARGET,
        "--samples",
        60,
        "--align",
        "--align-tokens",
        2048,
        "--output",
        "out",
    ]
    foreseen = run(capsys, *given, "--dry-run")
    note = "note: no data/prepared/calibration.jsonl and no data/prepared/alignment.jsonl: the base writes its own text"
    assert foreseen.err.count(note) == 1 and foreseen.err.count("\n") == 2  # and that nothing will be measured
    # 2,048 and a window of each of at most seven sources.
    assert "written      first, by the base: 5,632 tokens in about 60 texts, seed 0" in foreseen.out
    assert not list(work.iterdir())
    made = run(capsys, *given, "--text", write_heldout(), "--context", 32, "--json")
    assert made.err.count(note) == 1
    facts = json.loads(made.out)
    assert facts["alignment"]["tokens"] == 2048 and set(facts["alignment"]["windows"]) < SOURCES
    page, recipe = (Path("out/evidence", name).read_text() for name in ("report.html", "recipe.yaml"))
    assert recipe.count("path: base\n") == 2
    (stored,) = work.glob("stages/write-*/stage.json")
    manifest = json.loads(stored.read_text())
    assert manifest["inputs"].keys() == {"base"} and f"{manifest['facts']['tokens']:,} tokens in " in page


def write_heldout():
    path = Path("heldout.jsonl")
    path.write_text("".join(json.dumps({"text": text, "source": "words"}) + "\n" for text in make_texts(30, seed=1)))
    return path


def test_a_table_that_was_named_and_is_missing_is_a_mistake(capsys, folder, work):
    given = ["compress", folder, "--method", "mka", *TARGET, "--output", "out"]
    assert "text table not found: no.jsonl" in run(capsys, *given, "--calibration", "no.jsonl", code=2).err
    default = "data/prepared/calibration.jsonl"
    assert f"text table not found: {default}" in run(capsys, *given, "--calibration", default, code=2).err
    assert not list(work.glob("stages/*"))


def test_a_table_that_is_there_is_read(capsys, folder, monkeypatch):
    Path("data/prepared").mkdir(parents=True)
    rows = [json.dumps({"text": text, "source": "words"}) + "\n" for text in make_texts(60)]
    Path("data/prepared/calibration.jsonl").write_text("".join(rows))
    said = run(
        capsys,
        "compress",
        folder,
        "--method",
        "mka",
        *TARGET,
        "--samples",
        60,
        "--output",
        "out",
        "--dry-run",
        "--no-evaluate",
    )
    assert said.err == "" and "by the base" not in said.out


def test_stages_on_their_own_take_base_for_a_table(capsys, folder, wide):
    calibration = ["--calibration", "base", "--samples", 60, "--max-tokens", 16]
    observed = json.loads(run(capsys, "observe", folder, *calibration, "--output", "s.safetensors", "--json").out)
    assert observed["texts"] == 60
    planned = run(capsys, "plan", folder, "--method", "sleb", *TARGET, *calibration, "--output", "plan.json", "--json")
    assert json.loads(planned.out)["layers_out"] == 5
    run(capsys, "plan", wide, "--method", "reference_code", *TARGET, "--output", "wide.json")
    merging = ["merge", wide, "--plan", "wide.json", "--align", "--align-tokens", 2048, "--alignment-table", "base"]
    merged = json.loads(run(capsys, *merging, "--output", "merged", "--json").out)
    windows = merged["alignment"]["windows"]
    assert merged["alignment"]["tokens"] == 2048 and set(windows) < SOURCES and set(windows.values()) == {1}


def test_a_comparison_whose_tables_are_the_base_s_own_text(capsys, tmp_path, monkeypatch, work):
    make_bench_folder(tmp_path)
    calibration = {"path": "base", "samples": 60, "max_tokens": 16, "search_tokens": 64}
    alignment = {"path": "base", "tokens": 512, "context": 16}
    methods = [{"name": "reference_code", "alignment": [True], "targets": [5]}, {"name": "sleb", "targets": [5]}]
    changes = {"calibration": calibration, "alignment": alignment, "methods": methods, "targets": [5]}
    recipe = write_bench_recipe(tmp_path, **changes)
    with monkeypatch.context() as patched:
        patched.setattr(mka.model.loading, "load_model", lambda *_: pytest.fail("the model was loaded"))
        assert json.loads(run(capsys, "bench", recipe, "--dry-run", "--json").out)["to_do"] == 3
    run(capsys, "bench", recipe)
    assert len(list(work.glob("stages/write-*/texts.jsonl"))) == 1
    assert json.loads(run(capsys, "bench", recipe, "--dry-run", "--json").out)["to_do"] == 0
