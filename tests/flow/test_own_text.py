"""A run whose tables the base writes itself: stored, guarded, reused and named in the record."""

import json

import pytest

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server")]
SECTIONS = {
    "calibration": {"path": "base", "samples": 60, "max_tokens": 16},
    "alignment": {"enabled": True, "path": "base", "tokens": 256, "context": 16},
}


def test_a_run_on_text_of_its_base_writes_it_once_guards_it_and_tells(project):
    from mka.texts.rows import digest_texts, read_texts

    assert project.run(**SECTIONS) == 0
    facts = project.last_run
    assert {"text of the base", "tables", "calibration", "alignment"} <= set(facts["stages"])
    (table,) = project.work.glob("stages/write-*/texts.jsonl")
    texts = read_texts(table)
    (calibration,) = project.work.glob("stages/calibration-*/stage.json")
    manifest = json.loads(calibration.read_text())
    assert manifest["facts"]["digest"] == digest_texts(texts[:60])
    assert set(manifest["inputs"]) == {"calibration", "heldout"}
    (alignment,) = project.work.glob("stages/alignment-*/table.jsonl")
    assert alignment.read_bytes() == table.read_bytes()
    page = next(project.work.glob("stages/report-*/report.html")).read_text()
    assert "written by the base" in page and f"in {len(texts)} texts, seed 0" in page
    inputs = project.client.get_run(facts["mlflow_run_id"]).inputs.dataset_inputs
    recorded = [{tag.key: tag.value for tag in item.tags} for item in inputs]
    (own,) = [tags for tags in recorded if tags["dvc_path"] == "base"]
    assert own["dvc_rev"] == "written by the base"

    assert project.run(**SECTIONS) == 0
    assert project.last_run["stages"]["text of the base"]["reused"]


def test_text_of_the_base_that_evaluation_uses_does_not_pass_the_guard(project, capsys):
    from mka.texts.rows import read_texts

    assert project.run(**SECTIONS) == 0
    (table,) = project.work.glob("stages/write-*/texts.jsonl")
    project.write_rows(project.heldout, [*read_texts(project.heldout), read_texts(table)[3]], "words")
    capsys.readouterr()
    assert project.run(**SECTIONS) == 2
    assert "calibration" in capsys.readouterr().err.splitlines()[-1]
