"""The control: one stored stage per base and rounding, measured and timed beside base and candidate."""

import json

import pytest
import yaml
from safetensors.torch import load_file
from support.bench import TINY, make_bench_folder

import mka.evaluation.speed
from mka.cli.main import main
from mka.evaluation.scores import EvalReport
from mka.model.checkpoint import open_checkpoint
from mka.pipeline.evaluate import open_report, open_reports
from mka.pipeline.job import prepare
from mka.pipeline.pipeline import foresee, run
from mka.pipeline.quantize import write_quantized
from mka.pipeline.recipes import validate_recipe
from mka.pipeline.stage import find_model
from mka.pipeline.transform import write_transformed
from mka.terminal import showing
from tasks.guards.doors import BEHIND

LOOKING = yaml.safe_load(TINY.read_text())["calibration"]
INT8 = {"scheme": "int8", "group_size": 16}
HALF = [{"name": "cast", "settings": {"dtype": "bfloat16"}}]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_bench_folder(tmp_path_factory.mktemp("control") / "root")


def make_raw(root, **changes):
    return {
        "name": "tiny",
        "model": {"folder": str(root / "base")},
        "calibration": {**LOOKING, "path": str(root / LOOKING["path"]), "rev": None},
        "method": {"name": "random_deletion"},
        "target": {"layers": 4, "protect_first": 1, "protect_last": 1},
        "quantize": INT8,
        "evaluation": {
            "text": str(root / "heldout.jsonl"),
            "overlap_index": None,
            "context": 32,
            "text_tokens": 128,
            "new_tokens": 4,
        },
        "gate": {"rules": [{"metric": "bytes", "better_than": "control"}]},
        **changes,
    }


def walk(root, until=None, evaluate=True, **changes):
    job = prepare(validate_recipe(make_raw(root, **changes)), root / "work", evaluate=evaluate)
    with showing(False):
        return job, run(job, lambda stage, job, found: stage.produce(job, found, root / "stages"), until=until)


def read_tensors(folder):
    return {name: tensor.tolist() for name, tensor in load_file(folder / "model.safetensors").items()}


def test_it_is_the_base_rounded_alike_and_shared_by_every_plan(root, tmp_path):
    _, first = walk(root)
    with showing(False):
        write_quantized(open_checkpoint(root / "base"), validate_recipe(make_raw(root)).quantize, tmp_path / "rounded")
    assert read_tensors(first["control"].folder / "model") == read_tensors(tmp_path / "rounded")
    assert first["control"].facts["layers"] == 6 and first["control"].facts["dtype"] == "int8 in groups of 16"
    # Another method, another target: the same control, measured once.
    _, second = walk(root, method={"name": "shortgpt"}, target={"layers": 5})
    assert second["quantize"].digest != first["quantize"].digest
    for name in ("control", "evaluate control"):
        assert second[name].reused and second[name].key == first[name].key
    _, coarser = walk(root, until="control", quantize={"scheme": "int8", "group_size": 32})
    assert coarser["control"].key != first["control"].key


def test_it_is_never_taken_for_the_candidate(root):
    job, found = walk(root)
    assert find_model(found) is found["quantize"] and found["quantize"].facts["layers"] == 4
    base, candidate, control = open_reports(job, found)
    assert [r.checkpoint["layers"] for r in (base, candidate, control)] == [6, 4, 6]
    assert control.checkpoint["treatment"] == "int8 in groups of 16"
    assert control.checkpoint["digest"] not in (base.checkpoint["digest"], candidate.checkpoint["digest"])
    assert {score.name for score in control.scores} == {score.name for score in base.scores}


def test_all_three_are_timed_in_turns(root, monkeypatch):
    turns, time_rounds = [], mka.evaluation.speed._time_rounds

    def note(models, call, tokens, repeats):
        return time_rounds(models, lambda model: (turns.append(id(model)), call(model))[1], tokens, repeats)

    monkeypatch.setattr(mka.evaluation.speed, "_time_rounds", note)
    _, found = walk(root, seed=1)
    assert set(found["compare speed"].facts) == {"base", "candidate", "control", "timing"}
    assert len(set(turns[:3])) == 3 and turns == turns[:3] * (len(turns) // 3)
    assert open_report(found, "control").speed == found["compare speed"].facts["control"]


def test_the_gate_holds_the_candidate_against_it(root):
    _, found = walk(root)
    (check,) = found["gate"].facts["checks"]
    sizes = [found[name].facts["bytes"] for name in ("quantize", "control")]
    assert [check["value"], check["threshold"]] == sizes and found["gate"].facts["verdict"] == "pass"


def test_where_nothing_is_done_to_the_weights_the_base_is_the_control(root):
    rules = [{"metric": "bytes", "better_than": "control"}, {"metric": "parameters", "better_than": "control"}]
    job, found = walk(root, quantize={"scheme": "off"}, gate={"rules": rules})
    assert not {"control", "evaluate control"} & set(found)
    base, _, control = open_reports(job, found)
    assert control == base and set(found["compare speed"].facts) == {"base", "candidate", "timing"}
    size, parameters = found["gate"].facts["checks"]
    assert size["threshold"] == base.checkpoint["bytes"] and parameters["threshold"] == base.checkpoint["parameters"]
    assert found["gate"].facts["verdict"] == "pass" and foresee(job, root / "out")["control"] is None


def test_transforms_alone_and_before_rounding(root, tmp_path):
    job, cast = walk(root, until="control", transforms=HALF, quantize={"scheme": "off"})
    with showing(False):
        write_transformed(job.treatments, open_checkpoint(root / "base"), tmp_path / "cast")
        write_quantized(open_checkpoint(tmp_path / "cast"), validate_recipe(make_raw(root)).quantize, tmp_path / "both")
    assert read_tensors(cast["control"].folder / "model") == read_tensors(tmp_path / "cast")
    job, both = walk(root, transforms=HALF)
    assert read_tensors(both["control"].folder / "model") == read_tensors(tmp_path / "both")
    assert [path.name for path in both["control"].folder.glob("model*")] == ["model"]
    assert open_reports(job, both)[2].checkpoint["treatment"] == "cast to bfloat16, int8 in groups of 16"


@pytest.mark.parametrize(
    "changes",
    [{}, {"transforms": HALF}, {"transforms": HALF, "quantize": {"scheme": "off"}}, {"quantize": {"scheme": "off"}}],
)
def test_what_is_foreseen_counts_it(root, changes):
    job, found = walk(root, until="control", **changes)
    facts = foresee(job, root / "out")
    if "control" not in found:
        assert facts["control"] is None and "control" not in facts["stages"]
        return
    assert facts["control"]["bytes"] == found["control"].facts["bytes"] and facts["control"]["layers"] == 6
    assert facts["stages"]["control"]["disk_bytes"] >= facts["control"]["bytes"]
    # Three models are loaded at once where two were.
    off = prepare(validate_recipe(make_raw(root, quantize={"scheme": "off"})), root / "work")
    assert facts["stages"]["compare speed"]["memory_bytes"] * 2 == (
        3 * foresee(off, root / "out")["stages"]["compare speed"]["memory_bytes"]
    )
    assert str(root / "out/evidence/control.json") in facts["files"]


def test_nothing_measured_no_control(root):
    _, found = walk(root, evaluate=False)
    assert "control" not in found and find_model(found) is found["quantize"]


def test_its_written_folder_is_held_against_all_layers(root):
    job, found = walk(root, until="control")
    _, table, suite = BEHIND["control"](job, found["control"].folder, found["control"].facts)
    assert table["layers"].tolist() == [6]
    assert next(e.value_set for e in suite if getattr(e, "value_set", None)) == [6]


def test_a_command_tells_it_before_and_after(root, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MKA_WORK", str(root / "work"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(make_raw(root)))
    command = ["compress", "--recipe", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "out")]
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "control      int8 in groups of 16, all 6 layers, about" in said and "base, candidate and control" in said
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["against_control"].startswith("Against the control (same rounding, all layers kept): ")
    assert all(set(row) == {"quantity", "base", "control", "candidate", "ratio"} for row in told["results"])
    assert told["control"]["layers"] == 6
    evidence = EvalReport.load(tmp_path / "out/evidence/control.json")
    assert evidence.checkpoint["layers"] == 6
    # The same decision from the files alone; without the control's, what is missing is named.
    files = [f"--{name}={tmp_path}/out/evidence/{name}.json" for name in ("plan", "base", "candidate")]
    again = ["report", *files, "--recipe", str(tmp_path / "recipe.yaml")]
    assert main([*again, "--output", str(tmp_path / "no")]) == 2
    assert "compares with the control, of which there is no report" in capsys.readouterr().err
    beside = f"--control={tmp_path}/out/evidence/control.json"
    assert main([*again, beside, "--output", str(tmp_path / "page"), "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert read["against_control"] == told["against_control"] and read["gate"] == told["gate"]
