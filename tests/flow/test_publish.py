"""A registered version signed, promoted and on a hub: no champion without a signature; tags, aliases as branches."""

import pytest
import yaml
from support.hub import TOKEN
from support.keys import make_keys

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server")]


def call(module, *arguments):
    from importlib import import_module

    return import_module(f"flows.{module}").main([*arguments])


def refusal(capsys, program):
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith(f"{program}: ")]
    assert TOKEN not in said and "Traceback" not in said
    return line


def test_versions_become_tags_and_aliases_branches(project, hub, capsys):
    assert project.run() == 0
    capsys.readouterr()
    assert call("publish", "tiny@nobody", "--to", "me/tiny") == 2
    told = refusal(capsys, "publish")
    assert "tiny has no alias 'nobody'; aliases: candidate = version 1, champion = version 1" in told
    assert call("publish", "tiny@candidate", "--to", "me/tiny", "--dry-run") == 0
    assert "would go to me/tiny, candidate, tag v1" in capsys.readouterr().out
    assert hub.repos == {}
    assert call("publish", "tiny@candidate", "--to", "me/tiny") == 0
    assert "tag v1" in capsys.readouterr().out
    repo = hub.repos["me/tiny"]
    assert repo.branches.keys() == {"main", "candidate"} and repo.files("main") == {}
    assert call("publish", "tiny", "--to", "me/tiny") == 0
    assert repo.branches.keys() == {"main", "candidate", "champion"} and repo.tags.keys() == {"v1"}
    assert repo.files("main") == repo.files("champion") == repo.files("v1") == repo.files("candidate")
    front = yaml.safe_load(repo.files("v1")["README.md"].decode().split("---\n")[1])
    (entry,) = front["model-index"]
    measured = {result["dataset"]["type"]: result["metrics"][0] for result in entry["results"]}
    assert measured and all(row["args"]["n"] >= 2 and row["value"] > 0 for row in measured.values())
    sent = len(repo.messages)
    assert call("publish", "tiny", "--to", "me/tiny") == 0 and len(repo.messages) == sent
    hub.fail("GET /api/models/.*/refs", 500)
    assert call("publish", "tiny", "--to", "me/tiny") == 2
    assert "the hub failed" in refusal(capsys, "publish")


def test_no_version_becomes_champion_without_the_signature_its_recipe_wants(project, tmp_path, capsys):
    pytest.importorskip("model_signing", reason="needs the extra sign")
    (private, public), (other, _) = make_keys(tmp_path), make_keys(tmp_path, "other")
    assert project.run(registry__signature=str(public)) == 0
    assert "waits for a signature: mka registry-sign tiny --version 1" in project.last_run["promotion"]
    asked = ("tiny", "--because", "evidence read")
    capsys.readouterr()
    assert call("promote", *asked) == 1
    told = refusal(capsys, "promote")
    assert "tiny version 1 is not signed, and registry.signature asks for it" in told
    assert call("sign", "tiny", "--key", str(other)) == 0
    assert call("promote", *asked) == 1
    assert f"tiny version 1 is not signed by {public}" in refusal(capsys, "promote")
    assert call("sign", "tiny", "--key", str(public)) == 2
    assert "none in PEM" in refusal(capsys, "sign")
    assert call("sign", "tiny", "--key", str(private)) == 0
    assert call("promote", *asked) == 0
    assert str(project.client.get_registered_model("tiny").aliases["champion"]) == "1"
