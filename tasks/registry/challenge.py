"""What a version has to get through before it becomes champion."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from mka.errors import GuardError, PromotionError, RecipeError
from mka.evaluation.metrics import read_check
from mka.evaluation.rules import asks_control, asks_engines, asks_speed, rules_against_champion
from mka.model.checkpoint import Checkpoint, describe_checkpoint, open_checkpoint
from mka.outside.reading import UnreadableError
from mka.pipeline.control import CONTROL
from mka.pipeline.evaluate import (
    BASE,
    CANDIDATE,
    EVALUATE_BASE,
    EVALUATE_CONTROL,
    SPEED,
    evaluate_stage,
    speed_stage,
)
from mka.pipeline.job import Job
from mka.pipeline.judge import GATE, confirm_gate
from mka.pipeline.recipes import validate_recipe
from mka.pipeline.serve import SERVE, serve_stage
from mka.pipeline.stage import Found
from mka.recipe import Recipe
from mka.report.verdict import tell_checks
from mka.sections import parse_yaml
from mka.store.products import Product
from tasks.base_model import pin_base_model
from tasks.machine.workplace import Workplace
from tasks.registry.promotion import Move, RegisteredVersion, fetch_version, move_champion, read_aliases, read_version
from tasks.registry.tracking import CHAMPION, connect_registry
from tasks.stages import Run, run_stage


def read_recipe(version: RegisteredVersion) -> Recipe:
    """Return the recipe a version was made by, as its run recorded it.

    Raises:
        RegistryError: if the record cannot be had.
        RecipeError: if recipes have changed since so that it is no longer valid.
    """
    with connect_registry(version.uri):
        import mlflow

        text = mlflow.artifacts.load_text(f"runs:/{version.run_id}/recipe.yaml")
    where = f"recipe of {version.label}"
    try:
        return validate_recipe(parse_yaml(text), where)
    except UnreadableError as error:
        raise RecipeError(
            f"{where} cannot be read: {error}; it was changed in the registry, run its recipe again"
        ) from None


def refuse_unapproved(recipe: Recipe, approver: str | None) -> None:
    """Refuse a move that none of the recipe's approvers stands for.

    Raises:
        PromotionError: naming who may.
    """
    allowed = recipe.registry.approvers
    if allowed and approver not in allowed:
        given = f"given {approver!r}" if approver else "none was given"
        raise PromotionError(f"{recipe.registered_name}: an approver must be named, {given}; {', '.join(allowed)} may")


@task(task_run_name="pin {recipe.model.label}", cache_policy=NO_CACHE)
def refuse_stale(place: Workplace, recipe: Recipe, version: RegisteredVersion) -> None:
    """Refuse a version of a base that has changed since.

    Raises:
        PromotionError: naming both revisions.
        CheckpointError: if the base cannot be found.
    """
    for tag, now in pin_base_model(place, recipe).items():
        then = version.tags.get(tag, "unknown")
        if then != now:
            raise PromotionError(
                f"{version.label} was made from {recipe.model.label} at {then[:40]}, which is now at {now[:40]}: its "
                f"evidence is stale; recompress first"
            )


def measure_version(
    run: Run, name: str, version: RegisteredVersion, fetch: Callable[[], Path], *, held_against_base: bool = False
) -> Product:
    """Measure a registered version.

    Args:
        run: says on what.
        name: of the stage.
        version: named by the digest it was registered with.
        fetch: brings its files here; called only if its measurement is not stored.
        held_against_base: whether metrics that are a distance from the base are measured too.
    """

    def open_model(job: Job, found: Found) -> tuple[Checkpoint, dict[str, Any]]:
        checkpoint = open_checkpoint(fetch(), verify=False)
        return checkpoint, describe_checkpoint(checkpoint)

    digest = version.tags["candidate_digest"]
    stage = evaluate_stage(name, lambda job, found: digest, open_model, held_against_base=held_against_base)
    return run_stage(run, stage, {})


def require_pass(run: Run, version: RegisteredVersion) -> Product:
    """Decide the gate anew on today's tables and the files in the registry; return the version's measurement.

    The decision is made from the reports each time, whatever decision is stored.

    Raises:
        PromotionError: if the gate does not pass it.
    """
    before = run_stage(run, EVALUATE_BASE, {})
    # Fetched whether it has been measured or not: what becomes champion is what the registry holds now.
    with fetch_version(run.place, version) as folder:
        measured = measure_version(run, CANDIDATE, version, lambda: folder, held_against_base=True)
        found = {BASE: before, CANDIDATE: measured}
        gate = run.job.recipe.gate
        # Its run timed the version in turns with the control: with it, that timing is found again.
        if CONTROL.wanted(run.job) and (asks_control(gate) or asks_speed(gate)):
            found[CONTROL.name] = run_stage(run, CONTROL, found)
            found[EVALUATE_CONTROL.name] = run_stage(run, EVALUATE_CONTROL, found)
        if asks_speed(gate):
            found[SPEED.name] = run_stage(run, speed_stage(version.tags["candidate_digest"], folder), found)
        if asks_engines(gate):
            found[SERVE.name] = run_stage(run, serve_stage(version.tags["candidate_digest"], folder), found)
    found[GATE.name] = run_stage(run, GATE, found)
    decided = confirm_gate(run.job, found)
    if decided["verdict"] != "pass":
        raise PromotionError(f"{version.label}: the gate says {decided['verdict']}; {tell_checks(decided)}")
    return measured


def require_as_good(run: Run, champion: RegisteredVersion, version: RegisteredVersion, measured: Product) -> str:
    """Hold a measured version against the current champion on the same windows and items; return what was found.

    Raises:
        PromotionError: if it is not proven as good, or the two cannot be compared.
    """
    with ExitStack() as stack:
        fetched = fetch_version(run.place, champion)
        before = measure_version(run, "evaluate champion", champion, lambda: stack.enter_context(fetched))
    thresholds = rules_against_champion(run.job.recipe.gate)
    held_to = replace(run.job, recipe=run.job.recipe.model_copy(update={"gate": thresholds}))
    try:
        found = {BASE: before, CANDIDATE: measured}
        found[GATE.name] = run_stage(replace(run, job=held_to), GATE, found, "compare with champion")
        held = confirm_gate(held_to, found)
    except GuardError as error:
        raise PromotionError(
            f"{version.label} cannot be held against champion version {champion.version}: {error}; to promote it "
            f"all the same: mka promote {version.model} --without-comparison --because TEXT"
        ) from None
    if not all(is_met(check) for check in held["checks"]):
        raise PromotionError(
            f"{version.label} is not proven as good as champion version {champion.version}: {tell_checks(held)}"
        )
    return f"as good as version {champion.version}: {tell_checks(held)}"


def is_met(check: Mapping[str, Any]) -> bool:
    """Whether one recovery against the champion lets a version through.

    What is resampled over windows has to be proven good enough. Task items decide too coarsely for that, so they only
    stop what they prove to be worse.
    """
    metric = read_check(check["name"])
    return bool(check["verdict"] != "fail" if metric and metric.is_coarse else check["verdict"] == "pass")


def promote_measured(
    run: Run, version: RegisteredVersion, measured: Product, *, who: str, why: str, compare: bool = True
) -> Move:
    """Make a version champion that the gate passed, if it is as good as the champion there is.

    Should another promotion come first, the version is held against the new champion.

    Raises:
        PromotionError: if it is not as good, or is champion already.
    """
    while True:
        current = read_aliases(version.uri, version.model).get(CHAMPION)
        if current == version.version:
            raise PromotionError(f"{version.label} is champion already")
        found = ""
        if current is not None and compare:
            champion = read_version(version.uri, version.model, current)
            found = require_as_good(run, champion, version, measured)
        reason = f"{why} ({found})" if found else why
        if (move := move_champion(version, expected=current, action="promote", who=who, why=reason)) is not None:
            return move
