"""Several at the same moment, from nothing: flows, identical ones among them, promoters and watchers.

`MKA_ROUNDS=20` repeats each program; the figures are printed (`-s` shows them).
"""

import collections
import os
import subprocess
import sys

import pytest
import yaml
from support.project import Project
from support.servers import ROOT, fresh_environment

ROUNDS = range(int(os.environ.get("MKA_ROUNDS", "1")))
SECONDS = 900
PROMOTERS = 8
WATCHERS = 3

pytestmark = [pytest.mark.operations, pytest.mark.timeout(2 * SECONDS)]


def make_environment(project):
    return fresh_environment(project.work) | {"MKA_SLOTS": str(PROMOTERS)}


def run_together(environment, commands):
    """Start commands of this project in processes of their own, all at once; returns what came of each."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    try:
        ended = [(process, *process.communicate(timeout=SECONDS)) for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
    return [subprocess.CompletedProcess(process.args, process.returncode, out, err) for process, out, err in ended]


def refuse_tracebacks(done):
    for one in done:
        assert "Traceback" not in one.stdout + one.stderr, one.stderr[-3000:]


def write_recipe(project, stem, **changes):
    path = project.folder / f"{stem}.yaml"
    path.write_text(yaml.safe_dump(project.recipe(**changes)))
    return str(path)


def read_registry(project):
    """Every version of every model, and the states of all runs."""
    client = project.client
    versions = client.search_model_versions()
    experiment = client.get_experiment_by_name("mka")
    runs = client.search_runs([experiment.experiment_id])
    return versions, collections.Counter(run.info.status for run in runs)


def count_keys(versions):
    assert all(version.tags.get("mka.complete") == "true" for version in versions)
    return collections.Counter((version.name, version.tags["mka.key"]) for version in versions)


@pytest.mark.parametrize("number", ROUNDS)
def test_flows_that_start_at_once_from_nothing_all_end_and_make_one_version_of_one_key(tmp_path, number):
    project = Project(tmp_path)
    same = write_recipe(project, "same")
    recipes = [
        same,
        same,
        write_recipe(project, "fewer", target__layers=4, gate__champion_recovery=0.01),
        write_recipe(project, "other", name="other"),
    ]
    done = run_together(make_environment(project), [["flows.recompress", recipe] for recipe in recipes])
    refuse_tracebacks(done)
    versions, states = read_registry(project)
    keys = count_keys(versions)
    print(f"\nround {number}: exit codes {[one.returncode for one in done]}, versions {len(versions)}, runs {states}")
    assert [one.returncode for one in done] == [0] * 4, "\n".join(one.stderr[-500:] for one in done)
    assert set(keys.values()) == {1}
    assert collections.Counter(name for name, _ in keys) == {"tiny": 2, "other": 1}
    assert states == {"FINISHED": 3}
    for name in ("tiny", "other"):
        assert {"candidate", "champion"} <= set(project.client.get_registered_model(name).aliases)


@pytest.mark.parametrize("number", ROUNDS)
def test_four_identical_runs_make_one_version(tmp_path, number):
    project = Project(tmp_path)
    done = run_together(make_environment(project), [["flows.recompress", write_recipe(project, "same")]] * 4)
    refuse_tracebacks(done)
    versions, states = read_registry(project)
    print(f"\nround {number}: exit codes {[one.returncode for one in done]}, versions {len(versions)}, runs {states}")
    assert [one.returncode for one in done] == [0] * 4, "\n".join(one.stderr[-500:] for one in done)
    assert list(count_keys(versions).values()) == [1] and states == {"FINISHED": 1}


@pytest.mark.parametrize("number", ROUNDS)
def test_of_first_promoters_at_once_each_moves_the_champion_or_is_refused_in_one_line(tmp_path, number):
    project = Project(tmp_path)
    changes = {"registry__promote": "manual", "gate__champion_recovery": 0.01}
    recipes = [write_recipe(project, f"layers-{layers}", target__layers=layers, **changes) for layers in (5, 4)]
    refuse_tracebacks(run_together(make_environment(project), [["flows.recompress", recipe] for recipe in recipes]))
    assert "champion" not in project.client.get_registered_model("tiny").aliases
    command = ["flows.promote", "tiny", "--because", "evidence read", "--version"]
    done = run_together(make_environment(project), [[*command, str(1 + turn % 2)] for turn in range(PROMOTERS)])
    refuse_tracebacks(done)
    codes = collections.Counter(one.returncode for one in done)
    tags = [version.tags for version in project.client.search_model_versions("name = 'tiny'")]
    moves = sum(name.startswith("move.") for found in tags for name in found)
    champion = project.client.get_registered_model("tiny").aliases["champion"]
    print(f"\nround {number}: exit codes {dict(codes)}, moves {moves}, champion {champion}")
    assert set(codes) <= {0, 1} and moves == codes[0] >= 1
    for one in done:
        if one.returncode:
            line = one.stderr.strip().splitlines()[-1]
            assert line.startswith("promote: tiny version ") and "is champion already" in line


@pytest.mark.parametrize("number", ROUNDS)
def test_of_watchers_at_once_one_starts_the_recompression(stack, tmp_path, number):
    from prefect.client.orchestration import SyncPrefectClient

    recipe = write_recipe(Project(tmp_path), "watched", name=f"watched-{number}")
    done = run_together(
        stack.environment | {"PYTHONPATH": str(ROOT)}, [["flows.watch", recipe, "--initial"]] * WATCHERS
    )
    refuse_tracebacks(done)
    assert [one.returncode for one in done] == [0] * WATCHERS, "\n".join(one.stderr[-500:] for one in done)
    with SyncPrefectClient(f"{stack.prefect}/api") as client:
        runs = [run for run in client.read_flow_runs() if run.parameters.get("recipe") == recipe and run.deployment_id]
    said = [line for one in done for line in one.stdout.splitlines() if recipe in line or "started" in line]
    print(f"\nround {number}: {len(runs)} run, {said}")
    assert len(runs) == 1
    assert sum("; started " in line for line in said) == 1
    assert sum("was started for it before" in line for line in said) == WATCHERS - 1
