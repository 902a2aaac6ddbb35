"""Commands of production on a real registry: what would be done, what is there, one document on stdout, a job of CI."""

import json

import pytest

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server")]


def call(module, *arguments):
    from importlib import import_module

    return import_module(f"flows.{module}").main([*arguments])


def aliases(project):
    found = project.client.get_registered_model("tiny").aliases
    return {name: int(version) for name, version in found.items()}


def test_a_run_is_foreseen_with_what_of_it_is_stored(project, capsys):
    recipe = str(project.write_recipe())
    assert call("recompress", recipe, "--dry-run", "--json") == 0
    before = json.loads(capsys.readouterr().out)
    assert set(before["stored"].values()) == {False} and before["registered_name"] == "tiny"
    assert before["candidate"]["layers"] == 5
    assert not project.work.joinpath("last_run.json").exists()

    assert call("recompress", recipe, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == project.last_run and facts["verdict"] == "pass"

    assert call("recompress", recipe, "--dry-run", "--json") == 0
    again = json.loads(capsys.readouterr().out)["stored"]
    assert again.keys() == facts["stages"].keys() - {"base model", "tables", "calibration", "register"}
    # Its page names the command, which is another one here.
    assert {name for name, there in again.items() if not there} <= {"report"}

    assert call("recompress", recipe, "--dry-run", "--set", "target.layers=4") == 0
    text = capsys.readouterr().out
    rows = dict(line.split(maxsplit=1) for line in text.splitlines() if line.endswith(("stored", "to be made")))
    assert {name: rows[name] for name in ("observe", "score", "plan", "merge")} == {
        **dict.fromkeys(("observe", "score"), "stored"),
        **dict.fromkeys(("plan", "merge"), "to be made"),
    }
    assert "evaluate base" in text and "dry run: nothing was computed or registered" in text
    assert call("recompress", recipe, "--dry-run", "--set", "target.layers=99") == 2
    assert capsys.readouterr().err.startswith("recompress: ")


def test_moves_are_foreseen_and_told_and_status_shows_them(project, capsys):
    assert project.run() == 0
    assert project.run(target__layers=4, registry__promote="manual", gate__champion_recovery=0.01) == 0
    capsys.readouterr()
    why = ("tiny", "--because", "evidence read")
    assert call("promote", *why, "--dry-run") == 0
    told = capsys.readouterr().out
    assert "champion would be version 2, before version 1" in told and "as good as version 1" in told
    assert aliases(project) == {"candidate": 2, "champion": 1}
    assert call("rollback", *why, "--dry-run") == 1
    assert "no previous champion" in capsys.readouterr().err

    assert call("promote", *why, "--json") == 0
    said = capsys.readouterr()
    move = json.loads(said.out)
    assert (move["action"], move["old"], move["new"]) == ("promote", "1", "2")
    assert "champion is version 2" in said.err
    assert call("promote", *why, "--dry-run") == 1
    assert "is champion already" in capsys.readouterr().err
    assert call("rollback", *why, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["moves"] == {"champion": ["2", "1"], "previous": ["1", "2"]}
    assert aliases(project) == {"candidate": 2, "champion": 2, "previous": 1}

    assert call("status", "tiny", "--json") == 0
    status = json.loads(capsys.readouterr().out)
    assert [row["version"] for row in status["versions"]] == ["2", "1"]
    assert set(status["versions"][0]["aliases"]) == {"candidate", "champion"}
    first, second = status["moves"][:2]
    assert (first["after"], second["after"]) == ("2", "1") and "evidence read" in first["why"]
    assert status["servers"] == [] and status["last_run"]["name"] == "tiny"
    assert call("status", "tiny") == 0
    text = capsys.readouterr().out
    assert "evidence read" in text and "servers: none run" in text and "last run: tiny" in text
    assert call("status", "tny") == 2
    assert "has no model 'tny' (did you mean 'tiny'?); it has: tiny" in capsys.readouterr().err


def test_a_job_of_ci_tells_stages_result_and_verdict_as_the_server_has_them(project, tmp_path, monkeypatch, capsys):
    from prefect.client.orchestration import get_client

    from flows.ci import follow

    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "output"))
    assert call("ci", str(project.write_recipe()), "--local", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    facts = project.last_run
    assert {row["stage"]: row["why"] for row in made["stages"]} == {n: s["why"] for n, s in facts["stages"].items()}
    assert made["verdict"] == facts["verdict"] == "pass" and made["version"] == "1" and made["model"] == "tiny"
    assert made["report"] == facts["report"] and made["results"][0]
    assert "version=1\n" in (tmp_path / "output").read_text()
    assert ": pass\n" in (tmp_path / "summary.md").read_text()

    # As from another machine: all of it is read from the server.
    lines = []
    with get_client(sync_client=True) as client:
        run = follow(client, made["flow_run_id"], None, lines.append)
    assert run.state == "Completed" and run.told.outcome["address"] == "models:/tiny/1"
    assert [line.split("  ")[0] for line in lines] == list(facts["stages"])

    project.teach_base_its_own_text()
    failing = {"gate__perplexity_recovery": 0.9, "target__layers": 3, "method__name": "reference_code"}
    recipe = str(project.write_recipe(**failing))
    assert call("ci", recipe, "--local") == 1
    said = capsys.readouterr()
    assert "verdict      fail" in said.out and said.err.splitlines()[-1].startswith("ci: the gate says fail")
    assert "verdict=fail\n" in (tmp_path / "output").read_text()
    assert call("recompress", recipe, "--json") == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["verdict"] == "fail" and "gate refused tiny" in said.err.splitlines()[-1]


def test_a_job_of_ci_without_a_server_or_a_deployment_says_what_to_do(project, monkeypatch, capsys):
    recipe = str(project.write_recipe())
    assert call("ci", recipe, "--deployment", "recompress/nosuch") == 2
    assert "no deployment 'recompress/nosuch'" in capsys.readouterr().err
    assert call("ci", recipe, "--local", "--set", "target.layers=99") == 2
    assert "ci: " in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr("tasks.machine.slots.is_on_server", lambda: False)
    assert call("ci", recipe) == 2
    assert "set PREFECT_API_URL, or run it here with --local" in capsys.readouterr().err
