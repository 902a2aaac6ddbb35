"""What a recipe's `transforms` list is done in order between merge and quantize, keyed, foreseen and recorded."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.bench import TINY, make_bench_folder
from support.models import make_tiny_model, save_model

from mka.cli.main import main
from mka.errors import RecipeError
from mka.model.checkpoint import open_checkpoint
from mka.pipeline.foresee import candidate_nbytes
from mka.pipeline.job import prepare
from mka.pipeline.pipeline import PIPELINE, foresee, run
from mka.pipeline.recipes import validate_recipe
from mka.pipeline.transform import apply_transform, write_transformed
from mka.recipe import QuantizeSettings, TransformChoice
from mka.terminal import showing
from mka.transforms import Transform, resolve_transforms
from tasks.guards.doors import BEHIND

HALVES = ("float16", "bfloat16")
LOOKING = yaml.safe_load(TINY.read_text())["calibration"]


def cast_to(dtype):
    return {"name": "cast", "settings": {"dtype": dtype}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_bench_folder(tmp_path_factory.mktemp("transforms") / "root")


def make_recipe(root, *transforms, **changes):
    raw = {
        "name": "tiny",
        "model": {"folder": str(root / "base")},
        "calibration": {**LOOKING, "path": str(root / LOOKING["path"]), "rev": None},
        "method": {"name": "random_deletion"},
        "target": {"layers": 4, "protect_first": 1, "protect_last": 1},
        "transforms": list(transforms),
        "evaluation": {"text": None, "overlap_index": None},
    }
    return validate_recipe(raw | changes)


def walk(root, *transforms, until="quantize", **changes):
    job = prepare(make_recipe(root, *transforms, **changes), root / "work", evaluate=False)
    with showing(False):
        found = run(job, lambda stage, job, found: stage.produce(job, found, root / "stages"), until=until)
    return job, found


def read_tensors(product):
    return load_file(product.folder / "model/model.safetensors")


def test_a_recipe_without_transforms_has_no_such_stage(root):
    job, found = walk(root)
    assert "transform" not in found and foresee(job, root / "out")["transforms"] == ""


def test_transforms_are_done_in_the_order_listed(root):
    (_, there), (_, back) = (walk(root, *map(cast_to, order)) for order in (HALVES, HALVES[::-1]))
    merged = read_tensors(there["merge"])
    for found, dtypes in ((there, HALVES), (back, HALVES[::-1])):
        expected = {name: tensor.to(getattr(torch, dtypes[0])) for name, tensor in merged.items()}
        expected = {name: tensor.to(getattr(torch, dtypes[1])) for name, tensor in expected.items()}
        written = read_tensors(found["transform"])
        assert all(torch.equal(written[name], expected[name]) for name in merged)
        # What lay between is gone.
        assert sorted(path.name for path in found["transform"].folder.iterdir()) == ["model", "stage.json"]
    assert back["merge"].reused
    assert there["transform"].key != back["transform"].key


def test_three_in_a_row_leave_one_folder(root):
    _, found = walk(root, *map(cast_to, ("float16", "float32", "bfloat16")))
    assert [path.name for path in found["transform"].folder.glob("model*")] == ["model"]
    written, merged = read_tensors(found["transform"]), read_tensors(found["merge"])
    assert all(torch.equal(written[name], merged[name].half().float().bfloat16()) for name in merged)


def test_the_same_list_is_found_again_and_another_is_not(root):
    keys = {dtype: walk(root, cast_to(dtype))[1]["transform"] for dtype in HALVES}
    assert keys["float16"].key != keys["bfloat16"].key
    again = walk(root, cast_to("float16"))[1]["transform"]
    assert again.reused and again.key == keys["float16"].key


def test_the_key_holds_name_settings_version_and_the_model_it_reads(root):
    job, found = walk(root, cast_to("float16"))
    (stage,) = [stage for stage in PIPELINE if stage.name == "transform"]
    entry = {"name": "cast", "version": 1, "settings": {"dtype": "float16"}}
    before = {name: product for name, product in found.items() if name != "transform"}
    assert stage.settings(job) == {"transforms": [entry]}
    assert stage.reads(job, before) == {"model": found["merge"].digest}


def test_what_is_foreseen_is_what_is_written(root):
    """Layers of the tiny model are alike, so that the mean layer is each of them."""
    w8a8 = {"scheme": "w8a8", "embeddings": "int8"}
    for changes in ({}, {"quantize": {"scheme": "int8", "group_size": 16}}, {"quantize": w8a8}):
        job, found = walk(root, cast_to("bfloat16"), **changes)
        last = list(found.values())[-1]
        assert candidate_nbytes(job) == last.facts["bytes"]
        facts = foresee(job, root / "out")
        assert facts["transforms"] == "cast to bfloat16" and facts["candidate"]["bytes"] == last.facts["bytes"]
        assert facts["stages"]["transform"]["disk_bytes"] == found["transform"].facts["bytes"]


def test_a_dry_run_the_card_and_the_guard_know_of_it(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MKA_WORK", str(tmp_path / "work"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(make_recipe(root, cast_to("bfloat16")).model_dump(mode="json")))
    command = ["compress", "--recipe", str(recipe), "--output", str(tmp_path / "out"), "--no-evaluate"]
    assert main([*command, "--dry-run"]) == 0
    assert "transformed  cast to bfloat16" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["candidate"]["dtype"] == "BF16"
    assert "cast to bfloat16" in (tmp_path / "out/README.md").read_text()
    assert "transform" in BEHIND


@pytest.mark.parametrize(
    ("transforms", "said"),
    [
        ([{"name": "casts"}], "transforms.0: unknown transform 'casts' (did you mean 'cast'?); transforms: "),
        ([{"name": "merge"}], "transforms.0: unknown transform 'merge'"),
        ([cast_to("float16"), {"name": "cast"}], "transforms.1: settings of transform 'cast': missing key 'dtype'"),
        ([{"name": "cast", "settings": {"dtipe": "float16"}}], "unknown key 'dtipe' (did you mean 'dtype'?)"),
        ([cast_to("int3")], "'dtype': Input should be 'bfloat16', 'float16' or 'float32', got 'int3'"),
        ([{"name": "cast", "setting": {}}], "unknown key 'transforms.0.setting' (did you mean 'settings'?)"),
    ],
)
def test_a_recipe_is_refused_where_a_transform_cannot_be_had(root, transforms, said):
    with pytest.raises(RecipeError) as refused:
        make_recipe(root, *transforms)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_evidence_that_is_not_there_is_asked_for_in_one_line(tmp_path):
    source = open_checkpoint(save_model(make_tiny_model("llama"), tmp_path / "base"))
    seen = []
    looking = Transform(
        "looking",
        "look",
        lambda checkpoint, settings: None,
        lambda checkpoint, settings: 1,
        lambda checkpoint, settings, evidence, output, **options: seen.append(evidence),
        frozenset({"grams"}),
    )
    with pytest.raises(RecipeError, match="transforms: looking looks at grams; none given"):
        apply_transform(looking, None, source, {"base": 1}, tmp_path / "out", asked="transforms")
    apply_transform(looking, None, source, {"base": 1, "grams": 2}, tmp_path / "out", asked="transforms")
    assert seen == [{"grams": 2}]


def test_a_section_says_that_its_stage_reads_the_calibration_texts(root, monkeypatch):
    assert prepare(make_recipe(root), root / "work").inputs.calibration is None
    monkeypatch.setattr(QuantizeSettings, "reads_calibration", property(lambda section: section.group_size == 16))
    assert prepare(make_recipe(root), root / "work").inputs.calibration is None
    recipe = make_recipe(root, quantize={"group_size": 16})
    assert prepare(recipe, root / "work").inputs.calibration is not None


def test_outside_the_pipeline(tmp_path):
    source = open_checkpoint(save_model(make_tiny_model("llama"), tmp_path / "base"))
    with showing(False):
        found = write_transformed(resolve_transforms([TransformChoice(**cast_to("float16"))]), source, tmp_path / "out")
    assert found["dtype"] == "F16" and found["generation_mismatches"] == 0
