"""`mka frontier`: a recipe laid out as bits alone, depth alone and both, run, and drawn."""

import json
import shlex
from pathlib import Path

import pytest
import yaml
from support.bench import make_bench_folder

from mka.bench.moves import choose_budgets, choose_rounding, lay_out_moves, list_texts
from mka.bench.recipe import load_bench
from mka.cli.main import main
from mka.errors import RecipeError
from mka.model.checkpoint import open_checkpoint
from mka.pipeline.recipes import validate_recipe
from mka.recipe import QuantizeSettings

LAYERS = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_bench_folder(tmp_path_factory.mktemp("moves"))


def raw(**changes):
    return {
        "name": "tiny",
        "model": {"folder": "base"},
        "calibration": {"path": "calibration.jsonl", "samples": 60, "max_tokens": 16, "rev": None},
        "method": {"name": "shortgpt"},
        "target": {"layers": 4, "protect_first": 1, "protect_last": 1},
        "alignment": {"enabled": False, "rev": None},
        "quantize": {"scheme": "int8", "group_size": 16},
        "evaluation": {"text": "heldout.jsonl", "context": 32, "text_tokens": 128, "overlap_index": None},
    } | changes


@pytest.fixture
def lay_out(place, monkeypatch):
    monkeypatch.chdir(place)
    base = open_checkpoint("base")

    def make(budgets=(), depths=(), **changes):
        return lay_out_moves(validate_recipe(raw(**changes)), base, budgets, depths, Path("out"))

    return make


def test_bits_alone_depth_alone_and_both_in_the_same_bytes(lay_out):
    made = lay_out([70_000.0, 60_000.0], [3, 5])
    cells = {(c.entry.label, c.layers, c.rounded.scheme, c.rounded.bytes) for c in made.cells}
    mixed = [("mixed", 70_000.0), ("mixed", 60_000.0)]
    wanted = {("bits alone", LAYERS, scheme, None) for scheme in ("int8", "int4", "int3")}
    wanted |= {("bits alone", LAYERS, *budget) for budget in mixed}
    wanted |= {("depth alone", layers, "off", None) for layers in (5, 3)}
    wanted |= {("depth and bits", layers, *budget) for layers in (5, 3) for budget in mixed}
    assert cells == wanted
    assert {c.rounded.rounding for c in made.cells if c.is_rounded} == {"gptaq"}
    assert {c.rounded.group_size for c in made.cells if c.is_rounded} == {16}
    assert {entry.label: entry.name for entry in made.methods}["depth and bits"] == "shortgpt"
    assert [entry.label for entry in made.methods if entry.ours] == ["depth and bits"]


def test_the_recipes_own_refit_healing_rounding_and_target_are_taken(lay_out):
    made = lay_out(
        method={"name": "uidl"},
        alignment={"enabled": True, "tokens": 512, "rev": None},
        heal={"mode": "distil", "tokens": 1024, "rev": None},
        quantize={"scheme": "int4", "group_size": 8, "rounding": "gptq", "tokens": 999},
    )
    depth = next(entry for entry in made.methods if entry.label == "depth alone")
    assert (depth.targets, depth.alignment, depth.heal) == ((4,), (True,), (1024,))
    assert made.alignment.tokens == 512
    rounded = {(c.rounded.rounding, c.rounded.tokens, c.rounded.group_size) for c in made.cells if c.is_rounded}
    assert rounded == {("gptq", 999, 8)}


def test_budgets_that_nobody_named_lie_between_numbers_of_bits(place):
    base, rounding = open_checkpoint(place / "base"), choose_rounding(QuantizeSettings(group_size=16))
    four_and_three, three_and_two = choose_budgets(base, rounding)
    linear = sum(info.parameters for name, info in base.tensors.items() if "_proj" in name)
    # A number of bits more is as many eighths of a byte; halves lie one number of bits apart.
    assert four_and_three - three_and_two == pytest.approx(linear / 8, abs=2)
    assert choose_budgets(base, rounding | {"serve_on": "cpu"}) == []


def test_sources_are_measured_each_and_known_ones_are_told(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    (tmp_path / "two.jsonl").write_text(
        "".join(json.dumps({"text": f"w{n} w3", "source": source}) + "\n" for n, source in enumerate(["words", "news"]))
    )
    (tmp_path / "calibration.jsonl").write_text(json.dumps({"text": "w1 w2", "source": "words"}) + "\n")
    changes = {"calibration": {"path": str(tmp_path / "calibration.jsonl"), "rev": None}}
    recipe = validate_recipe(raw(**changes, evaluation={"text": str(tmp_path / "two.jsonl")}))
    assert [(text["name"], text["seen"]) for text in list_texts(recipe)] == [("words", True), ("news", False)]
    plain = validate_recipe(raw(**changes, evaluation={"text": "prose.txt"}))
    assert list_texts(plain) == [{"name": "prose", "path": "prose.txt", "seen": False}]


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        (([], [6]), {}, "6 layers: the model has 6; depths are 1 to 5"),
        (([1000.0], []), {}, r"quantize\.bytes 1 kB cannot be reached: with 4 layers it is"),
        (([], []), {"evaluation": {"text": None}}, "evaluation.text: quality is measured on it"),
        (([], []), {"transforms": [{"name": "cast", "settings": {"dtype": "float16"}}]}, "transforms are no move"),
    ],
)
def test_what_makes_no_frontier_is_refused(lay_out, given, changes, message):
    with pytest.raises(RecipeError, match=message):
        lay_out(*given, **changes)


def test_a_budget_that_only_fewer_layers_reach_has_no_row_of_all(lay_out, place):
    base = open_checkpoint(place / "base")
    nbytes = base.nbytes - sum(base.layer_nbytes) + 20_000.0
    made = lay_out([nbytes], [3])
    assert {(c.entry.label, c.layers) for c in made.cells if c.rounded.bytes} == {("depth and bits", 3)}


def test_the_page_is_written_and_the_same_comparison_can_be_run_again(place, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(place)
    monkeypatch.setenv("MKA_WORK", str(tmp_path / "work"))
    Path("recipe.yaml").write_text(yaml.safe_dump(raw()))
    asked = ["frontier", "recipe.yaml", "--layers", "5", "--bytes", "75kB", "--output", "out"]
    assert main([*asked, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "7 of 7 to do" in said and not Path("out").exists()  # and nothing was written
    assert main(asked) == 0
    page = Path("out/frontier.md").read_text()
    assert f"Written by `{shlex.join(['mka', *asked])}` on" in page
    assert "## Quality against bytes and time" in page and "| depth and bits, mixed 75 kB in all" in page
    assert {path.name for path in Path("out").iterdir()} == {
        *("frontier.md", "frontier.yaml", "frontier.png", "frontier-bytes.png")
    }
    sizes = [line.split(" | ") for line in page.partition("## Sizes")[2].partition("\n## ")[0].splitlines()]
    mixed = [cell for row in sizes for cell in row[1:] if "75 kB" in row[0] and cell.strip("| –")]
    assert mixed and all(float(cell.split()[0]) <= 0.1 for cell in mixed)
    assert main(["bench", "out/frontier.yaml", "--dry-run"]) == 0
    assert "0 of 7 to do" in capsys.readouterr().out
    assert load_bench("out/frontier.yaml").name == "tiny-frontier"


@pytest.mark.parametrize("size", ["x", "0", "-3MB", "nan", "inf"])
def test_what_is_no_size_is_refused(size, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    Path("recipe.yaml").write_text(yaml.safe_dump(raw()))
    assert main(["frontier", "recipe.yaml", "--bytes", size, "--output", "out"]) == 2
    assert f"'{size}' is no size, e.g. 80MB" in capsys.readouterr().err
