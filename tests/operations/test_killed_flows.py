"""Flows killed at operations on files and in the registry's database, then asked again: as if they had never been.

MKA_KILLS=200 kills more often than CI does.
"""

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient
from support.killing import draw_kills, run_killed
from support.project import Project
from support.servers import fresh_environment

pytestmark = [pytest.mark.operations, pytest.mark.timeout(7200)]

KILLS = int(os.environ.get("MKA_KILLS", "20"))
SHARES = {"recompress": 0.2, "promote": 0.1, "rollback": 0.1}


class Killed:
    """A project whose commands are killed, and what they left is put back."""

    def __init__(self, folder: Path) -> None:
        self.project = Project(folder)
        self.kept, self.reads = folder / "kept", 0
        self.log = folder / "command.log"
        self.environment = fresh_environment(self.project.work)

    def run(self, *command: str, at: int | None = None) -> tuple[int, list[str]]:
        return run_killed(command, [self.project.work], at, self.log, self.environment)

    def must(self, *command: str) -> list[str]:
        code, operations = self.run(*command)
        assert code == 0, self.log.read_text()
        return operations

    def keep(self) -> None:
        shutil.copytree(self.project.work, self.kept, symlinks=True)

    def put_back(self) -> None:
        shutil.rmtree(self.project.work)
        if self.kept.exists():
            shutil.copytree(self.kept, self.project.work, symlinks=True)

    def read(self) -> tuple[dict[str, str], list, Counter]:
        """The aliases, the versions and the states of all runs."""
        # A copy under a name of its own: MLflow keeps files open, and would read on in one that was removed since.
        self.reads += 1
        copy = self.log.with_name(f"mlflow-{self.reads}.db")
        shutil.copyfile(self.project.work / "mlflow.db", copy)
        client = MlflowClient(f"sqlite:///{copy}")
        if not client.search_registered_models():
            return {}, [], Counter()
        aliases = {name: str(at) for name, at in client.get_registered_model("tiny").aliases.items()}
        runs = client.search_runs([client.get_experiment_by_name("mka").experiment_id])
        return aliases, client.search_model_versions("name = 'tiny'"), Counter(run.info.status for run in runs)

    def refuse_leftovers(self) -> None:
        places = [*self.project.work.glob("stages/.*.partial-*"), *self.project.work.glob("registry/.*")]
        assert [left.name for left in places if left.is_dir()] == []


def tell(capsys, name: str, operations: list[str], killed: Counter) -> None:
    with capsys.disabled():
        told = ", ".join(f"{count} at {kind}" for kind, count in sorted(killed.items()))
        print(f"\n{name}: {sum(killed.values())} kills among {len(operations)} operations: {told}")


def count_kills(name: str) -> int:
    return max(1, round(KILLS * SHARES[name]))


def test_a_killed_run_is_registered_once_and_as_if_it_had_never_been_killed(tmp_path, capsys):
    killed = Killed(tmp_path)
    command = ("flows.recompress", str(killed.project.write_recipe()))
    operations = killed.must(*command)
    wanted = killed.read()[1][0].tags["candidate_digest"]
    seen: Counter[str] = Counter()
    for at, kind in draw_kills(operations, count_kills("recompress")):
        killed.put_back()
        code, came_to = killed.run(*command, at=at)
        assert code == -9, f"operation {at} of {len(operations)} was not reached: {killed.log.read_text()}"
        seen[came_to[-1]] += 1
        killed.must(*command)
        aliases, versions, states = killed.read()
        where = f"killed at operation {at} ({kind})"
        complete = [v for v in versions if v.tags.get("mka.complete") == "true"]
        assert [v.tags["candidate_digest"] for v in complete] == [wanted], where
        assert aliases["candidate"] == aliases["champion"] == str(complete[0].version), where
        assert states["RUNNING"] == 0 and states["FINISHED"] == 1, f"{where}: {states}"
        killed.refuse_leftovers()
    tell(capsys, "recompress", operations, seen)


@pytest.mark.parametrize("name", ["promote", "rollback"])
def test_a_killed_move_leaves_a_champion_and_is_ended_by_asking_again(tmp_path, capsys, name):
    killed = Killed(tmp_path)
    promote = ("flows.promote", "tiny", "--because", "evidence read", "--version")
    changes = {"registry__promote": "manual", "gate__champion_recovery": 0.01}
    for layers in (5, 4):
        killed.must("flows.recompress", str(killed.project.write_recipe(target__layers=layers, **changes)))
    killed.must(*promote, "1")
    command = (*promote, "2")
    if name == "rollback":
        killed.must(*promote, "2")
        command = ("flows.rollback", "tiny", "--because", "too slow")
    before, after = ("1", "2") if name == "promote" else ("2", "1")
    killed.keep()
    operations = killed.must(*command)
    assert killed.read()[0] | {"candidate": ""} == {"candidate": "", "champion": after, "previous": before}
    seen: Counter[str] = Counter()
    for at, kind in draw_kills(operations, count_kills(name)):
        killed.put_back()
        code, came_to = killed.run(*command, at=at)
        assert code == -9, f"operation {at} of {len(operations)} was not reached: {killed.log.read_text()}"
        seen[came_to[-1]] += 1
        where = f"killed at operation {at} ({kind})"
        aliases, _, _ = killed.read()
        assert aliases["champion"] in (before, after), where
        if aliases["champion"] == before:
            killed.must(*command)
        aliases, versions, _ = killed.read()
        assert (aliases["champion"], aliases["previous"]) == (after, before), where
        moved = next(v for v in versions if str(v.version) == after)
        assert any(tag.startswith("move.") for tag in moved.tags), where
        killed.refuse_leftovers()
    tell(capsys, name, operations, seen)
