"""The whole flow on a tiny model: what it leaves, what it reuses, and what it refuses."""

import html
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.lines import split_stages
from support.models import make_texts

from mka.store.sums import file_sha256

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server")]


def run(project, **changes):
    return project.run(**changes)


def client(project):
    return project.client


def versions(project):
    return client(project).search_model_versions("name = 'tiny'")


def one_line(capsys):
    """The last line on stderr; every line before it must be a stage's."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert lines[-1].startswith("recompress: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


def test_a_run_leaves_a_stock_folder_evidence_and_a_version_that_mlflow_loads(project, capsys):
    assert run(project) == 0
    facts = project.last_run
    assert facts["status"] == "completed" and facts["verdict"] == "pass"
    assert set(facts["stages"]) >= {"base model", "observe", "score", "plan", "merge", "quantize", "gate", "register"}
    assert all(set(stage) == {"seconds", "reused", "why"} for stage in facts["stages"].values())
    output = capsys.readouterr().out
    assert "gate: pass" in output and facts["report"] in output and "mlflow server" in output
    assert "Against the control (same rounding, all layers kept): " in output
    assert output.lstrip().startswith("Saves ") and "A demonstration: its gate asks for 0.01 of the base" in output
    # The very version is named, by what no later run moves; of the alias the state is told.
    state = facts["registry"]
    assert (state["address"], state["state"]) == ("models:/tiny/1", "champion")
    assert state["champion"].startswith("this version: mka, 6 → 5 layers, ")
    assert "load_model('models:/tiny/1')" in output and "@candidate" not in output
    assert "mka rollback tiny --because TEXT" in output and state["promote"].startswith("mka promote tiny --version 1 ")

    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(facts["candidate"], output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.num_hidden_layers == 5

    (version,) = versions(project)
    assert set(client(project).get_model_version("tiny", version.version).aliases) == {"candidate", "champion"}
    assert version.tags["base_digest"] and version.tags["calibration_digest"] and version.tags["code_commit"]
    recorded = client(project).get_run(facts["mlflow_run_id"])
    assert recorded.data.params["target.layers"] == "5"
    layers = {role: recorded.data.metrics[f"{role}/layers"] for role in ("base", "control", "candidate")}
    assert layers == {"base": 6, "control": 6, "candidate": 5}
    assert recorded.data.tags["against_control"] in output
    contexts = {tag.value for item in recorded.inputs.dataset_inputs for tag in item.tags if "context" in tag.key}
    assert contexts == {"calibration", "evaluation"}
    held = {item.path for item in client(project).list_artifacts(facts["mlflow_run_id"])}
    assert {"recipe.yaml", "report", "plan", "scores", "evaluation", "checks"} <= held
    measured = {item.path for item in client(project).list_artifacts(facts["mlflow_run_id"], "evaluation")}
    assert measured == {f"evaluation/{role}" for role in ("base", "candidate", "control")}

    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{project.work / 'mlflow.db'}")
    # The report was written before it was registered, and finds that version all the same.
    page = html.unescape(Path(facts["report"]).read_text())
    (asked,) = re.findall(r'search_model_versions\(filter_string="([^"]+)"\)', page)
    assert [found.version for found in mlflow.search_model_versions(filter_string=asked)] == [version.version]
    assert "kept until <code>mka clean</code> takes it" in page and "mka status tiny" in page
    sizes = {name: recorded.data.metrics[f"candidate/{name}"] for name in ("bytes", "served_bytes")}
    assert 0 < sizes["served_bytes"] < sizes["bytes"]
    assert recorded.data.metrics["gate/perplexity words/threshold"] == 0.01
    served = mlflow.pyfunc.load_model("models:/tiny@champion")
    (text,) = served.predict(["w5 w6 w7"], params={"max_new_tokens": 3})
    assert isinstance(text, str)

    # Again: everything is reused, nothing registered twice.
    assert run(project) == 0
    assert all(stage["reused"] for stage in project.last_run["stages"].values())
    assert len(versions(project)) == 1
    assert project.last_run["mlflow_run_id"] == facts["mlflow_run_id"]

    # A deleted result is made again, and only what depends on nothing else.
    shutil.rmtree(facts["candidate"])
    assert run(project) == 0
    stages = project.last_run["stages"]
    assert not stages["quantize"]["reused"] and "gone" in stages["quantize"]["why"]
    assert stages["merge"]["reused"] and stages["evaluate base"]["reused"]
    assert load_file(f"{facts['candidate']}/model.safetensors")
    assert len(versions(project)) == 1


def test_shortgpt_and_the_reference_code_run_through_the_same_flow(project):
    for method in ("shortgpt", "reference_code"):
        assert run(project, method__name=method, quantize__scheme="off") == 0
        assert project.last_run["verdict"] == "pass"
        assert "quantize" not in project.last_run["stages"]
    assert len(versions(project)) == 2


def test_what_a_recipe_lists_is_done_checked_and_recorded(project):
    listed = [{"name": "cast", "settings": {"dtype": "bfloat16"}}]
    assert run(project, transforms=listed, quantize__scheme="off") == 0
    facts = project.last_run
    stages = list(facts["stages"])
    assert stages[stages.index("transform") - 1] == "merge"
    tensors = load_file(f"{facts['candidate']}/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    (version,) = versions(project)
    recorded = client(project).get_run(version.run_id).data.params
    assert "cast" in recorded["transforms"] and "bfloat16" in recorded["transforms"]


def test_what_a_method_fits_is_stored_with_its_plan_and_folded_in(project):
    assert run(project, method__name="replaceme", quantize__scheme="off") == 0
    (plan,) = project.work.glob("stages/plan-*/plan.json")
    folds = load_file(plan.with_name("plan.folds.safetensors"))
    made = json.loads(plan.read_text())
    assert made["folds"] == file_sha256(plan.with_name("plan.folds.safetensors"))
    ((name, fold),) = folds.items()
    (merged,) = project.work.glob("stages/merge-*/model/model.safetensors")
    before = load_file(project.base / "model.safetensors")
    kept = [layer["sources"][0] for layer in made["layers"]]
    source = name.replace(f".{made['removed'][0] - 1}.", f".{kept[made['removed'][0] - 1]}.")
    torch.testing.assert_close(load_file(merged)[name], fold @ before[source])
    assert not torch.equal(load_file(merged)[name], before[source])


def read_end(name):
    """The last state of a flow run, and what Prefect's server keeps of its log."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, LogFilter
    from prefect.logging.handlers import APILogHandler

    APILogHandler().flush()
    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate({"name": {"any_": [name]}}))
        chosen = LogFilter.model_validate({"flow_run_id": {"any_": [str(run.id)]}})
        return run.state, [log.message for log in client.read_logs(chosen, limit=200)]


def test_a_refusal_is_one_line_of_the_log_and_an_undecided_gate_says_so_in_its_state(project, capsys):
    assert run(project, target__layers=99) == 2
    state, logged = read_end(project.last_run["run"])
    assert state.name == "Failed" and not any("Traceback" in message for message in logged)
    assert sum("allowed: 1 to 6" in message for message in logged if not message.startswith("Finished")) == 1
    run(project, gate__perplexity_recovery=0.999, target__layers=4)
    assert project.last_run["verdict"] == "undecided"
    state, _ = read_end(project.last_run["run"])
    assert state.name == "Completed" and state.message == f"undecided: {project.last_run['decision']}"
    assert state.message.startswith("undecided: perplexity words ")


def test_a_refusing_gate_registers_nothing_and_keeps_the_evidence(project, capsys):
    project.teach_base_its_own_text()
    changes = {"gate__perplexity_recovery": 0.9, "target__layers": 3, "method__name": "reference_code"}
    assert run(project, **changes) == 1
    line = one_line(capsys)
    assert "gate refused tiny" in line and "perplexity words" in line and "needed ≥ 0.9" in line
    facts = project.last_run
    state, logged = read_end(facts["run"])
    assert (state.type.value, state.name) == ("FAILED", "Refused")
    assert line.endswith(state.message)
    assert not any("Traceback" in message for message in logged)
    assert facts["status"] == "refused" and facts["verdict"] == "fail"
    assert facts["registered_version"] is None and versions(project) == []
    assert (facts["registry"]["state"], facts["registry"]["address"]) == ("none", None)
    assert client(project).get_run(facts["mlflow_run_id"]).data.tags["verdict"] == "fail"
    # Refused once, refused again: the same run is found, none is added.
    assert run(project, **changes) == 1
    assert project.last_run["mlflow_run_id"] == facts["mlflow_run_id"]


def test_calibration_that_evaluation_uses_stops_at_the_guard(project, capsys):
    shared = make_texts(60, seed=1)
    project.write_rows(project.heldout, [*make_texts(58, seed=2), *shared[:2]], "words")
    assert run(project) == 2
    line = one_line(capsys)
    assert "guard 'calibration'" in line and "found_in_evaluation" in line and shared[0][:20] in line
    assert "observe" not in project.last_run["stages"]
    assert versions(project) == []


def test_an_unreachable_registry_is_found_before_any_work(project, capsys):
    assert run(project, registry__tracking_uri="http://127.0.0.1:9") == 2
    assert "registry http://127.0.0.1:9 cannot be used" in one_line(capsys)
    assert project.last_run.get("stages") is None
    assert not (project.work / "stages").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target__layers": 99}, "allowed: 1 to 6"),
        ({"target__layers": 0}, "allowed: 1 to 6"),
        ({"quantize__group_size": 24}, "does not divide"),
        ({"calibration__samples": 61}, "has 60 distinct texts"),
        ({"calibration__rev": "no-such-revision", "calibration__path": "data/prepared/calibration.jsonl"}, "revision"),
    ],
)
def test_refusals_are_one_line_and_register_nothing(project, capsys, changes, message):
    assert run(project, **changes) == 2
    assert message in one_line(capsys)
    assert versions(project) == []
    assert project.last_run["status"] == "failed"


def test_a_broken_recipe_is_refused_before_anything_starts(project, capsys):
    shutil.rmtree(project.work)
    assert run(project, targett={"layers": 5}) == 2
    assert "did you mean 'target'" in one_line(capsys)
    assert not project.work.exists()


@pytest.mark.parametrize("module", ["recompress", "sweep", "promote", "rollback", "watch"])
def test_a_prefect_server_that_does_not_answer_is_one_line_and_nothing_is_begun(project, module, monkeypatch, capsys):
    import importlib

    from prefect.settings import PREFECT_API_URL, temporary_settings

    recipe = str(project.write_recipe())
    arguments = {
        "recompress": [recipe],
        "sweep": [recipe],
        "promote": ["tiny", "--because", "x"],
        "rollback": ["tiny", "--because", "x"],
        "watch": [recipe],
    }
    # A sweep's recipe is of another kind; what it is does not matter before the server has answered.
    monkeypatch.setattr("flows.sweep.load_bench", lambda path: None)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert importlib.import_module(f"flows.{module}").main(arguments[module]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"{module}: Prefect server http://127.0.0.1:9/api does not answer: ")
    assert "unset that to run without one" in line
    assert not (project.work / "stages").exists()


@pytest.mark.parametrize(("cancelled", "status"), [(True, "cancelled"), (False, "interrupted")])
def test_a_run_that_was_ended_says_so(project, capsys, monkeypatch, cancelled, status):
    from prefect.client.orchestration import get_client
    from prefect.exceptions import TerminationSignal
    from prefect.runtime import flow_run
    from prefect.states import Cancelling

    def end(*_):
        if cancelled:
            with get_client(sync_client=True) as client:
                client.set_flow_run_state(flow_run.id, Cancelling(), force=True)
        raise TerminationSignal(signal=15)

    monkeypatch.setattr("flows.recompress.walk", end)
    assert run(project) == 130
    assert "interrupted; finished stages are kept; resume: mka run" in one_line(capsys)
    assert project.last_run["status"] == status and project.last_run["error"]


def test_a_run_tells_its_stages_in_a_line_each_and_its_figures_in_a_file(project, capsys):
    assert run(project) == 0
    told, rest = split_stages(capsys.readouterr().err)
    facts = project.last_run
    assert told == list(facts["stages"]) and len(told) > 10 and rest == ""
    assert facts["gate"]["verdict"] == "pass" and facts["gate"]["checks"][0]["threshold"] == 0.01
    candidate, control = facts["figures"]["candidate"], facts["figures"]["control"]
    assert (candidate["layers"], control["layers"]) == (5, 6) and candidate["bytes"] < control["bytes"]
    (score,) = candidate["scores"]
    assert score["lower"] <= score["value"] <= score["upper"] and score["n"] == 8
    recorded = client(project).get_run(facts["mlflow_run_id"]).data.metrics
    assert score["value"] in recorded.values() and candidate["speed"].keys() == control["speed"].keys() != set()
    # Another target: what is made anew says which result is near, and in what it differs.
    assert run(project, target__layers=4) == 0
    why = project.last_run["stages"]["plan"]["why"]
    assert why.startswith("plan-") and why.endswith("the nearest stored, has another aim.layers_out (5, now 4)")
    assert "has another input merged" in project.last_run["stages"]["quantize"]["why"]


def test_what_the_method_cannot_reach_is_refused_before_a_table_is_read(project, capsys):
    assert run(project, target={"layers": 2, "protect_first": 1, "protect_last": 1}) == 2
    assert "target of 2 layers cannot be reached" in one_line(capsys)
    assert set(project.last_run["stages"]) == {"base model"}
    assert run(project, target__layers=6, quantize={"scheme": "off"}) == 2
    assert "nothing to do: all 6 layers remain" in one_line(capsys)
