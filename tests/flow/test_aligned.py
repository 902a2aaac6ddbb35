"""Aligned merging through the flow: keyed by what decides it, guarded, and told in the report."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.models import make_texts

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server")]
METHOD = {"name": "aligned", "settings": {"tokens": 256, "heldout_tokens": 64, "context": 16}}


def run(project, **changes):
    from flows.recompress import main

    return main([str(project.write_recipe(**changes))])


@pytest.fixture
def aligned(project):
    """Changes of the recipe that align on a table of two sources."""
    rows = [
        json.dumps({"source": source, "text": text})
        for source, count, seed in (("one", 40, 5), ("two", 25, 6))
        for text in make_texts(count, seed=seed)
    ]
    table = project.folder / "alignment.jsonl"
    table.write_text("\n".join(rows) + "\n")
    section = {"enabled": True, "path": str(table), "rev": None, "tokens": 256, "context": 16}
    return {"method": METHOD, "alignment": section}


def test_a_run_aligns_reuses_and_tells(project, aligned, capsys):
    assert run(project, **aligned) == 0
    facts = project.last_run
    assert {"alignment", "plan", "merge", "quantize", "report"} <= set(facts["stages"])
    assert "aligned on 256 tokens of 2 sources" in capsys.readouterr().out
    (stored,) = project.work.glob("stages/merge-*/stage.json")
    manifest = json.loads(stored.read_text())
    fit = manifest["facts"]["alignment"]
    assert fit["tokens"] == 256 and fit["probes"]["source"] == "two"
    assert set(manifest["inputs"]) == {"base", "plan", "alignment"}
    assert set(manifest["settings"]) == {"tokens", "context", "copies", "penalty", "heldout_source", "dtype", "version"}
    (report,) = project.work.glob("stages/report-*")
    written = json.loads((report / "alignment.json").read_text())
    assert written["format"] == "mka-alignment/1" and written["layers"] == fit["layers"]
    assert written["table_digest"] == manifest["inputs"]["alignment"]
    page = (report / "report.html").read_text()
    assert 'id="alignment"' in page and written["table_digest"] in page

    (plan,) = project.work.glob("stages/plan-*/plan.json")
    layers = json.loads(plan.read_text())["layers"]
    (group,) = (layer for layer in layers if layer["verb"] == "take")
    before, after = load_file(project.base / "model.safetensors"), load_file(stored.parent / "model/model.safetensors")
    place, name = layers.index(group), "mlp.down_proj.weight"
    for position, layer in enumerate(layers):
        source = layer.get("attention", layer["sources"])[0]
        same = torch.equal(after[f"model.layers.{position}.{name}"], before[f"model.layers.{source}.{name}"])
        assert same == (position < place)

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project.work / 'mlflow.db'}")
    recorded = client.get_run(facts["mlflow_run_id"])
    contexts = {tag.value for item in recorded.inputs.dataset_inputs for tag in item.tags if "context" in tag.key}
    assert contexts == {"calibration", "alignment", "evaluation"}
    assert recorded.data.tags["alignment_digest"] == written["table_digest"]

    assert run(project, **aligned) == 0
    assert all(stage["reused"] for stage in project.last_run["stages"].values())
    # Another penalty is another merge of the same plan; without alignment, nothing of the keys differs from before.
    changed = {**aligned, "alignment": {**aligned["alignment"], "penalty": 0.3}}
    assert run(project, **changed) == 0
    stages = project.last_run["stages"]
    assert stages["plan"]["reused"] and not stages["merge"]["reused"]
    assert run(project, method={"name": "mka"}) == 0
    assert "alignment" not in project.last_run["stages"]
    plain = [json.loads(path.read_text()) for path in project.work.glob("stages/merge-*/stage.json")]
    assert {} in [manifest["settings"] for manifest in plain]


def test_an_alignment_text_that_evaluation_uses_stops_at_the_guard(project, aligned, capsys):
    shared = make_texts(25, seed=6)[7]
    project.write_rows(project.heldout, [*make_texts(58, seed=2), shared], "words")
    assert run(project, **aligned) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "guard 'alignment'" in line and "found_in_evaluation" in line and shared[:20] in line
    assert "observe" not in project.last_run["stages"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alignment__path": "nowhere.jsonl"}, "table not found: nowhere.jsonl"),
        ({"alignment__heldout_source": "tow"}, "'tow' has no window (did you mean 'two'?)"),
        ({"alignment__context": 256, "alignment__tokens": 512}, "the model has 128 positions"),
        ({"alignment__enabled": False}, "needs alignment: {enabled: true}"),
        ({"method": {"name": "linearpatch"}}, "fits its own correction"),
        (
            {"alignment__rev": "no-such-revision", "alignment__path": "data/prepared/alignment.jsonl"},
            "as alignment.rev, or null",
        ),
    ],
)
def test_refusals_are_one_line_and_come_before_the_model_is_looked_at(project, aligned, capsys, changes, message):
    assert run(project, **{**aligned, **changes}) == 2
    line = [line for line in capsys.readouterr().err.splitlines() if line.strip()][-1]
    assert line.startswith("recompress: ") and message in line
    assert not list(project.work.glob("stages/observe-*"))


def test_two_tables_of_one_name_are_each_read_for_what_they_are(project, aligned, capsys):
    table = project.folder / "other" / project.calibration.name
    table.parent.mkdir()
    table.write_bytes((project.folder / "alignment.jsonl").read_bytes())
    # Its sources are told, and not the calibration table's.
    assert run(project, **{**aligned, "alignment__path": str(table), "alignment__heldout_source": "tow"}) == 2
    assert "'tow' has no window (did you mean 'two'?)" in capsys.readouterr().err
    (copies,) = project.work.glob("stages/tables-*")
    assert len(list(copies.rglob(table.name))) == 2
