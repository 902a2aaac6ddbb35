"""The table of transforms: what costs a new one, and what the stages ask of every one."""

import subprocess
import sys
from types import ModuleType
from typing import get_args

import pytest
from support.models import make_tiny_model, save_model

import mka.transforms
from mka.cli.main import main
from mka.errors import CheckpointError, RecipeError
from mka.model.checkpoint import open_checkpoint
from mka.pipeline.quantize import write_quantized
from mka.plan.plan import MergePlan, identity_layers
from mka.recipe import QuantizeSettings
from mka.transforms import CALIBRATION, SCHEMES, Transform, cast, get_quantizer, get_transform

SETTINGS = QuantizeSettings(scheme="int8", group_size=16)


def test_every_scheme_a_recipe_may_name_has_a_row_and_no_other():
    # What "auto" stands for is settled when the recipe is read.
    assert {"off", "auto", "mixed", *SCHEMES} == set(get_args(QuantizeSettings.model_fields["scheme"].annotation))
    assert {name: row.bits for name, row in SCHEMES.items()} == {**{f"int{n}": n for n in range(2, 9)}, "w8a8": 8}


def test_every_rounding_a_recipe_may_name_has_a_transform_and_no_other():
    roundings = get_args(QuantizeSettings.model_fields["rounding"].annotation)
    assert roundings == tuple(mka.transforms._ROUNDINGS)
    names = [get_quantizer(QuantizeSettings(scheme="int4", rounding=rounding)).name for rounding in roundings]
    assert names == ["rtn", "gptq", "gptq"]


def test_every_row_holds_the_transform_of_its_name():
    for name in mka.transforms._TRANSFORMS:
        assert get_transform(name).name == name


def test_the_table_imports_no_transform_before_it_is_asked_for():
    program = "import sys, mka.transforms; print('torch' in sys.modules, 'mka.transforms.rtn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    "name, settings",
    [
        ("rtn", SETTINGS),
        ("rtn", QuantizeSettings(scheme="w8a8", embeddings="int8")),
        ("merge", MergePlan("t", "", 6, identity_layers(6)[:4])),
        ("cast", cast.Settings(dtype="float16")),
    ],
)
def test_what_is_foreseen_is_what_is_written_and_told(name, settings, tmp_path):
    source, ticks = open_checkpoint(save_model(make_tiny_model("llama"), tmp_path / "base")), []
    transform = get_transform(name)
    transform.check(source, settings)
    out = tmp_path / "out"
    found = transform.apply(source, settings, {}, out, verify=lambda folder: "seen", on_tensor=ticks.append)
    assert found == "seen"
    assert transform.foresee(source, settings) == sum(ticks) == open_checkpoint(out).nbytes


def test_a_calibrated_quantizer_is_a_module_and_a_row(tmp_path, monkeypatch):
    """It is handed the evidence it needs, and refused in one line where there is none."""
    handed = []

    def apply(source, settings, evidence, output, **options):
        handed.append(evidence)
        return get_transform("rtn").apply(source, settings, evidence, output, **options)

    rtn = get_transform("rtn")
    module = ModuleType("calibrated")
    module.TRANSFORM = Transform("calibrated", "round", rtn.check, rtn.foresee, apply, frozenset({"grams"}))
    monkeypatch.setitem(sys.modules, "calibrated", module)
    monkeypatch.setitem(mka.transforms._TRANSFORMS, "calibrated", "calibrated")
    monkeypatch.setitem(mka.transforms._ROUNDINGS, "nearest", "calibrated")
    source = open_checkpoint(save_model(make_tiny_model("llama"), tmp_path / "base"))
    with pytest.raises(RecipeError, match=r"quantize\.scheme int8: calibrated looks at grams; none given"):
        write_quantized(source, SETTINGS, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    facts = write_quantized(source, SETTINGS, tmp_path / "out", {"grams": "G"})
    assert facts["generation_mismatches"] == 0 and handed == [{"grams": "G"}]


def test_a_stage_refuses_before_it_begins(tmp_path):
    source = open_checkpoint(save_model(make_tiny_model("llama"), tmp_path / "base"))
    with pytest.raises(RecipeError, match="does not divide"):
        write_quantized(source, QuantizeSettings(scheme="int8", group_size=24), tmp_path / "out")
    write_quantized(source, SETTINGS, tmp_path / "once")
    with pytest.raises(CheckpointError, match="already quantized"):
        write_quantized(open_checkpoint(tmp_path / "once"), SETTINGS, tmp_path / "twice")


def test_evidence_a_command_cannot_give_is_missed_before_anything_is_written(tmp_path, monkeypatch, capsys):
    rtn = get_transform("rtn")
    module = ModuleType("calibrated")
    module.TRANSFORM = Transform("calibrated", "round", rtn.check, rtn.foresee, rtn.apply, frozenset({CALIBRATION}))
    monkeypatch.setitem(sys.modules, "calibrated", module)
    monkeypatch.setitem(mka.transforms._TRANSFORMS, "calibrated", "calibrated")
    monkeypatch.setitem(mka.transforms._ROUNDINGS, "nearest", "calibrated")
    base = save_model(make_tiny_model("llama"), tmp_path / "base")
    (tmp_path / "plan.json").write_text(MergePlan("t", "", 6, identity_layers(6)[:4]).to_json())
    monkeypatch.setattr("mka.pipeline.merge.write_merged", lambda *_: pytest.fail("merged"))
    told = ["merge", str(base), "--plan", str(tmp_path / "plan.json"), "--output", str(tmp_path / "out")]
    assert main([*told, "--quantize", "int8", "--group-size", "16"])
    assert "quantize.scheme int8: calibrated looks at calibration; none given" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
