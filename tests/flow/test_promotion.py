"""Promotion and rollback: what moves the champion, what does not, and what is left of a move."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.models import make_tiny_model, save_model

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server")]


def aliases(project, model="tiny"):
    found = project.client.get_registered_model(model).aliases
    return {alias: int(version) for alias, version in found.items()}


def moves(project, version, model="tiny"):
    tags = project.client.get_model_version(model, str(version)).tags
    return [json.loads(tags[name]) for name in sorted(tags) if name.startswith("move.")]


def promote(*arguments):
    from flows.promote import main

    return main(["tiny", "--because", "evidence read", *arguments])


def rollback(because="wrong answers"):
    from flows.rollback import main

    return main(["tiny", "--because", because])


def refusal(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_version_needs_its_approver_a_fresh_base_and_its_own_files(project, capsys):
    assert project.run() == 0
    assert aliases(project) == {"candidate": 1, "champion": 1}
    (first,) = moves(project, 1)
    assert (first["action"], first["from"], first["to"], first["why"]) == ("promote", None, "1", "gate passed")

    waiting = {"target__layers": 4, "gate__champion_recovery": 0.01, "registry__approvers": ["alice", "bob"]}
    assert project.run(**waiting) == 0
    assert aliases(project) == {"candidate": 2, "champion": 1}
    assert "waits for alice or bob" in project.last_run["promotion"]

    assert promote() == 1
    assert "alice, bob may" in refusal(capsys)
    assert promote("--approver", "mallory") == 1
    assert "given 'mallory'" in refusal(capsys)
    assert aliases(project) == {"candidate": 2, "champion": 1} and moves(project, 2) == []

    assert promote("--approver", "alice") == 0
    assert aliases(project) == {"candidate": 2, "champion": 2, "previous": 1}
    (moved,) = moves(project, 2)
    assert moved["who"].startswith("alice (run by ") and moved["from"] == "1" and moved["to"] == "2"
    assert moved["why"].startswith("evidence read (as good as version 1: ")
    assert promote("--approver", "alice") == 1
    assert "is champion already" in refusal(capsys)

    assert rollback() == 0
    assert aliases(project) == {"candidate": 2, "champion": 1, "previous": 2}
    back = moves(project, 1)[-1]
    assert back.pop("when") and back.pop("who")
    assert back == {"alias": "champion", "action": "rollback", "from": "2", "to": "1", "why": "wrong answers"}

    # What was rolled back does not come back by itself.
    recipe = {**waiting, "registry__approvers": []}
    assert project.run(**recipe) == 0
    assert aliases(project)["champion"] == 1
    assert "the same model is or was champion as version 2" in project.last_run["promotion"]
    assert aliases(project) == {"candidate": 3, "champion": 1, "previous": 2}

    # Altered in the registry after its gate.
    model_id = project.client.get_model_version("tiny", "3").source.rpartition("/")[2]
    (held,) = (project.work / "mlartifacts").rglob(f"{model_id}/artifacts/artifacts/model/config.json")
    as_registered = held.read_text()
    held.write_text(as_registered + " ")
    assert promote() == 2
    assert "tiny version 3 is not what was registered" in refusal(capsys)
    held.write_text(as_registered)

    save_model(make_tiny_model("llama", seed=7), project.base)
    assert promote() == 1
    assert "its evidence is stale" in refusal(capsys)
    assert aliases(project) == {"candidate": 3, "champion": 1, "previous": 2}


def test_a_candidate_that_is_worse_than_the_champion_stays_candidate(project, capsys):
    project.teach_base_its_own_text()
    assert project.run(target__layers=5) == 0
    assert project.run(target__layers=3, method__name="reference_code") == 0
    assert aliases(project) == {"candidate": 2, "champion": 1}
    assert "not proven as good as champion version 1: perplexity words 0." in project.last_run["promotion"]
    capsys.readouterr()
    assert promote() == 1
    assert "not proven as good" in refusal(capsys)
    assert promote("--without-comparison") == 0
    assert aliases(project) == {"candidate": 2, "champion": 2, "previous": 1}


def test_an_undecided_candidate_is_not_promoted(project, capsys):
    assert project.run(gate__perplexity_recovery=0.999, target__layers=4) == 3
    line = refusal(capsys)
    assert line.startswith("recompress: the gate is undecided (perplexity words") and "resume" not in line
    assert project.last_run["status"] == "completed"
    if project.last_run["verdict"] != "undecided":
        pytest.fail(f"the tiny model was meant to be undecided, it is {project.last_run['verdict']}")
    assert aliases(project) == {"candidate": 1}
    assert promote() == 1
    assert "the gate says undecided" in refusal(capsys)
    assert rollback() == 1
    assert "no previous champion" in refusal(capsys)


def test_a_version_that_has_to_beat_the_control_is_held_against_it_again(project, capsys):
    rules = [{"metric": "bytes", "better_than": "control"}, {"metric": "perplexity", "recovery": 0.01}]
    changes = {"gate": {"rules": rules}, "registry__promote": "manual"}
    assert project.run(**changes) == 0
    metrics = project.client.get_run(project.last_run["mlflow_run_id"]).data.metrics
    assert metrics["gate/bytes against control/value"] == metrics["candidate/bytes"]
    assert metrics["gate/bytes against control/control"] == metrics["control/bytes"]
    stored = {path.name for path in (project.work / "stages").glob("[!.]*")}
    assert promote() == 0 and aliases(project)["champion"] == 1
    # The same control, measured once; only the gate's own key may be new.
    made = {path.name for path in (project.work / "stages").glob("[!.]*")} - stored
    assert not [name for name in made if name.startswith(("control", "evaluate"))]

    # All layers kept: as small as the control, which is not smaller.
    assert project.run(**changes, target__layers=6) == 1
    assert project.last_run["status"] == "refused" and project.last_run["verdict"] == "fail"


@pytest.fixture
def registered(project):
    """Five versions without files, as a run leaves them; nobody is champion."""
    from tasks.registry.promotion import read_version
    from tasks.registry.tracking import connect_registry

    uri = f"sqlite:///{project.work / 'mlflow.db'}"
    with connect_registry(uri) as registry:
        registry.create_registered_model("tiny")
        for _ in range(5):
            version = registry.create_model_version("tiny", source=str(project.folder), run_id=None).version
            registry.set_model_version_tag("tiny", version, "mka.complete", "true")
    return [read_version(uri, "tiny", str(number)) for number in range(1, 6)]


def test_of_many_that_promote_at_once_against_one_champion_one_succeeds(project, registered):
    from tasks.registry.promotion import move_champion

    def move(version, expected):
        return move_champion(version, expected=expected, action="promote", who="a", why="b")

    assert move(registered[0], None) is not None
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda version: move(version, "1"), registered[1:]))
    (winner,) = [m for m in made if m is not None]
    assert aliases(project) == {"champion": int(winner.new), "previous": 1}
    assert [len(moves(project, n)) for n in range(1, 6)].count(1) == 2


def test_a_promotion_that_comes_second_is_held_against_the_new_champion(project, registered, monkeypatch):
    from tasks.registry import challenge
    from tasks.registry.promotion import move_champion

    first, second, third = registered[:3]
    move_champion(first, expected=None, action="promote", who="a", why="b")
    held = []

    def compare(job, champion, version, measured):
        held.append(champion.version)
        if len(held) == 1:  # somebody else is faster
            move_champion(second, expected="1", action="promote", who="other", why="b")
        return "as good"

    monkeypatch.setattr(challenge, "require_as_good", compare)
    move = challenge.promote_measured(None, third, None, who="a", why="b")
    assert held == ["1", "2"]
    assert (move.old, move.new) == ("2", "3")
    assert aliases(project) == {"champion": 3, "previous": 2}


@pytest.mark.parametrize("killed_at", ["previous", "champion"])
def test_a_move_killed_between_its_aliases_is_gone_back_from_and_on_with(project, registered, monkeypatch, killed_at):
    from mlflow import MlflowClient

    from tasks.registry.promotion import find_previous, move_champion

    first, second, third = registered[:3]
    uri, moved = first.uri, {"who": "a", "why": "b"}
    move_champion(first, expected=None, action="promote", **moved)
    move_champion(second, expected="1", action="promote", **moved)
    point = MlflowClient.set_registered_model_alias

    def die(client, name, alias, version):
        if alias == killed_at:
            raise KeyboardInterrupt
        point(client, name, alias, version)

    for target, action in ((third, "promote"), (first, "rollback")):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(MlflowClient, "set_registered_model_alias", die)
            move_champion(target, expected="2", action=action, **moved)
        assert aliases(project)["champion"] == 2
        champion, previous = find_previous(uri, "tiny")
        assert (champion, previous.version) == ("2", "1")
    move_champion(first, expected="2", action="rollback", **moved)
    assert aliases(project) == {"champion": 1, "previous": 2}


@pytest.mark.parametrize(
    ("name", "verdict", "met"),
    [
        ("perplexity words", "pass", True),
        ("perplexity words", "undecided", False),
        ("perplexity words", "fail", False),
        ("tasks", "pass", True),
        ("tasks", "undecided", True),
        ("tasks", "fail", False),
    ],
)
def test_perplexity_must_be_proven_tasks_must_not_be_disproven(name, verdict, met):
    from tasks.registry.challenge import is_met

    assert is_met({"name": name, "verdict": verdict}) is met


def test_a_version_that_was_never_finished_is_refused(project, registered, capsys):
    project.client.delete_model_version_tag("tiny", "5", "mka.complete")
    assert promote("--version", "5") == 2
    assert "was not registered to its end" in refusal(capsys)
    assert promote("--version", "6") == 2
    assert "versions: 1, 2, 3, 4, 5" in refusal(capsys)
