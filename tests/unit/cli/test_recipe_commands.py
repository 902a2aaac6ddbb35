"""`mka init` and `mka recipe`: what they write is read again, and means what it says."""

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator
from support.models import FAMILY_NAMES, make_texts, make_tiny_model, save_model

from mka.cli.main import main
from mka.methods import method_names
from mka.model.checkpoint import open_checkpoint
from mka.pipeline.draft import draft_recipe
from mka.pipeline.job import check_feasible, prepare
from mka.pipeline.recipes import load_recipe
from mka.pipeline.spelling import describe_sections, spell_recipe
from mka.recipe import ModelSource, Recipe
from mka.sections import parse_yaml

ROOT = Path(__file__).parents[3]
# Those of a comparison have keys of their own.
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if not path.name.startswith("bench"))


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(capsys, *given, code=0):
    capsys.readouterr()
    assert main([str(argument) for argument in given]) == code
    out, err = capsys.readouterr()
    assert (code == 0) == (err == "") and err.count("\n") <= 1
    return out or err


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_first_recipe_is_one_that_the_model_can_do(capsys, family):
    save_model(make_tiny_model(family), Path("base"))
    said = run(capsys, "init", "base")
    assert said.startswith("recipe.yaml\nnext: mka compress --recipe recipe.yaml --output ./base-5 --dry-run")
    recipe = load_recipe("recipe.yaml")
    assert recipe.model.folder == Path("base") and recipe.target.layers == 5
    # No table is here, and windows are no longer than 128 positions.
    assert {str(table.path) for table in (recipe.calibration, recipe.alignment, recipe.heal)} == {"base"}
    assert recipe.evaluation.text is None
    assert recipe.alignment.context == recipe.heal.context == recipe.evaluation.context == 128
    assert (recipe.quantize.scheme, recipe.quantize.group_size) == ("int8", 32)
    assert check_feasible(recipe, open_checkpoint("base")).layers_out == 5


def test_a_job_of_a_first_recipe_can_be_opened(capsys, work):
    save_model(make_tiny_model("llama"), Path("base"))
    run(capsys, "init", "base")
    # Tokens alone are fewer: standing in for as many as a real run reads takes minutes.
    fewer = {"heal.tokens": 2048, "alignment.tokens": 2048, "calibration.samples": 60}
    job = prepare(load_recipe("recipe.yaml", fewer), work, write=False)
    assert job.aim.layers_out == 5 and job.inputs.healing is not None and 0 < job.inputs.alignment.tokens <= 2048


def test_every_section_is_explained_in_its_own_words(capsys):
    save_model(make_tiny_model("llama"), Path("base"))
    run(capsys, "init", "base", "--output", "new/first.yaml")
    lines = Path("new/first.yaml").read_text().splitlines()
    told = describe_sections()
    for name in yaml.safe_load("\n".join(lines)):
        assert (
            told[name]
            and f"# {told[name]}" == lines[lines.index(next(x for x in lines if x.startswith(name + ":"))) - 1]
        )
    assert "llama, 6 layers" in lines[0] and any("No held-out table is here" in line for line in lines)
    # Nothing is told that a schema does not tell as well.
    assert all(len(line) <= 120 for line in lines)


def test_what_is_there_is_not_replaced_unless_it_is_asked_for(capsys):
    save_model(make_tiny_model("llama"), Path("base"))
    Path("recipe.yaml").write_text("mine")
    assert "recipe.yaml exists" in (said := run(capsys, "init", "base", code=2)) and "--force" in said
    shown = run(capsys, "init", "base", "--dry-run")
    assert Path("recipe.yaml").read_text() == "mine" and shown.endswith("dry run: nothing was written\n")
    run(capsys, "init", "base", "--force")
    assert load_recipe("recipe.yaml").name == "base"
    assert shown.startswith(Path("recipe.yaml").read_text())


def test_tables_of_the_project_are_used_where_they_are(capsys):
    save_model(make_tiny_model("llama"), Path("base"))
    prepared = Path("data/prepared")
    (prepared / "evaluation").mkdir(parents=True)
    for name in ("calibration", "alignment", "heldout"):
        rows = [json.dumps({"text": text, "source": "words"}) for text in make_texts(60)]
        (prepared / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    (prepared / "evaluation" / "piqa.jsonl").write_text("{}\n")
    run(capsys, "init", "base")
    recipe = load_recipe("recipe.yaml")
    assert recipe.calibration.path == prepared / "calibration.jsonl"
    assert recipe.alignment.path == recipe.heal.path == prepared / "alignment.jsonl"
    assert recipe.evaluation.text == prepared / "heldout.jsonl" and recipe.evaluation.tasks == {"piqa": 40}


def test_a_recipe_fits_model_and_machine(llama_folder, tmp_path):
    base, source = open_checkpoint(llama_folder), ModelSource(folder=llama_folder)
    assert [draft_recipe(base, source, memory).heal.mode for memory in (10**12, 0)] == ["distil", "off"]
    odd = make_tiny_model("llama", hidden_size=40, intermediate_size=72, head_dim=10, num_hidden_layers=2)
    recipe = draft_recipe(open_checkpoint(save_model(odd, tmp_path / "odd")), source, 10**12)
    assert recipe.quantize.scheme == "off"
    # Two layers cannot keep three protected ones.
    assert (recipe.target.layers, recipe.target.protect_first, recipe.target.protect_last) == (1, 0, 0)


def test_a_single_layer_is_refused(capsys):
    save_model(make_tiny_model("llama", num_hidden_layers=1), Path("one"))
    assert "1 layer, and none can go" in run(capsys, "init", "one", code=2)
    assert not Path("recipe.yaml").exists()


def test_the_schema_takes_every_recipe_there_is_and_refuses_what_loading_refuses(capsys):
    schema = json.loads(run(capsys, "recipe", "--schema"))
    assert schema == json.loads(run(capsys, "recipe", "--schema", "--json"))
    Draft202012Validator.check_schema(schema)
    check = Draft202012Validator(schema)
    assert len(RECIPES) > 5
    for path in RECIPES:
        assert not list(check.iter_errors(yaml.safe_load(path.read_text())))
    sound = {"name": "x", "model": {"hub": "a/b"}, "target": {"bytes": "90MB"}}
    assert check.is_valid(sound)
    assert check.is_valid(sound | {"method": {"name": "mka", "settings": {"coordinates": 3}}})
    for wrong in (
        {"target": {"layerz": 3}},
        {"method": {"name": "mkaa"}},
        {"method": {"name": "mka", "settings": {"coordinates": "many"}}},
        {"method": {"name": "shortgpt", "settings": {"coordinates": 3}}},
        {"transforms": [{"name": "cast", "settings": {"dtype": "int3"}}]},
        {"seed": -1},
    ):
        assert not check.is_valid(sound | wrong), wrong
    assert schema["$defs"]["MethodChoice"]["properties"]["name"]["enum"] == method_names()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_is_shown_is_the_same_recipe_with_nothing_left_out(capsys, path):
    shown = run(capsys, "recipe", "--show", path)
    Path("shown.yaml").write_text(shown)
    again, first = load_recipe("shown.yaml"), load_recipe(path)
    settings = again.method.settings
    assert (
        again.model_copy(update={"method": first.method}) == first and first.method.settings.items() <= settings.items()
    )
    body = parse_yaml(shown)
    assert body.keys() == set(Recipe.model_fields)
    assert all(body[name].keys() == set(type(getattr(first, name)).model_fields) for name in ("heal", "gate", "target"))


def test_what_is_not_the_default_is_marked_with_it(capsys):
    recipe = "name: x\nmodel: {hub: a/b}\ntarget: {layers: 4}\nmethod: {name: mka, settings: {coordinates: 3}}\n"
    Path("r.yaml").write_text(recipe + "gate: {rules: [{metric: bytes, most: 1MB}]}\n")
    given = ["--set", "seed=7", "--set", "quantize.scheme=int8"]
    lines = run(capsys, "recipe", "--show", "r.yaml", *given).splitlines()
    marked = {line.split(":")[0].strip(): line.partition("  # default: ")[2] for line in lines if "# default" in line}
    assert marked == {
        **{"hub": "null", "layers": "null", "name": '"uidl"', "coordinates": marked["coordinates"]},
        **{"scheme": '"off"', "seed": "0", "rules": "[]"},
    }
    assert "seed: 7  # default: 0" in lines and "    - {metric: bytes, most: 1000000.0}" in lines
    document = json.loads(run(capsys, "recipe", "--show", "r.yaml", *given, "--json"))
    assert document["recipe"]["seed"] == 7 and document["defaults_of_changed"]["seed"] == 0
    # Where no method is named, more than the file says is done, and that is marked.
    Path("r.yaml").write_text("name: x\nmodel: {hub: a/b}\ntarget: {layers: 4}\n")
    assert "  enabled: true  # default: false" in run(capsys, "recipe", "--show", "r.yaml")


def test_show_refuses_as_loading_does(capsys):
    Path("r.yaml").write_text("name: x\nmodel: {hub: a/b}\ntarget: {layers: 4}\n")
    show = ("recipe", "--show", "r.yaml", "--set")
    assert "unknown key 'target.layer' (did you mean 'layers'?)" in run(capsys, *show, "target.layer=3", code=2)
    assert "unknown method 'mkaa'" in run(capsys, *show, "method.name=mkaa", code=2)
    assert "recipe not found: gone.yaml" in run(capsys, "recipe", "--show", "gone.yaml", code=2)
    for given in ([], ["--schema", "--show", "r.yaml"], ["--schema", "--set", "seed=1"]):
        run(capsys, "recipe", *given, code=2)


def test_values_are_spelled_so_that_they_are_read_again():
    values = {"a": {"b": "off", "c": {"d": [1, "x: y", None, 1e-05], "e": {}}}, "f": "#no", "g": True, "h": "1e3"}
    text = spell_recipe(values, {"a": "why " * 60}, {"a.b": "behind"})
    assert parse_yaml(text) == values and text.count("# why") == 3 and "  b: 'off'  # behind" in text
