"""Recompress one model: data -> observe -> score -> plan -> merge -> quantize -> evaluate -> gate -> register.

mka run recipes/smollm2_135m.yaml
mka run recipes/smollm2_135m.yaml --set target.layers=26
"""

import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from flows.cli.console import run_program
from flows.run_log import Log, name_by_time, write_last_run
from flows.told import tell_outcome

if __name__ == "__main__":
    sys.exit(run_program("recompress", "run:run"))

from prefect import flow
from prefect.runtime import flow_run
from prefect.states import Completed

from mka.engines.loadable import check_engines
from mka.errors import GateRefused, GuardError, PromotionError
from mka.methods import resolve_method
from mka.pipeline.evaluate import open_reports
from mka.pipeline.job import Job, check_search, check_target, open_job
from mka.pipeline.pipeline import run as run_pipeline
from mka.pipeline.recipes import load_recipe
from mka.pipeline.stage import MODEL_FOLDER, PLAN_FILE, Found, Stage, find_model
from mka.recipe import Recipe
from mka.report.figures import collect_figures
from mka.report.verdict import tell_checks
from mka.store.products import Product
from tasks.base_model import fetch_base_model
from tasks.calibration import (
    open_inputs,
    select_alignment,
    select_calibration,
    select_healing,
    write_own_text,
)
from tasks.guards import guard
from tasks.machine.slots import compute_slot, hold_slot
from tasks.machine.workplace import Workplace, find_workplace
from tasks.pages import announce_verdict, print_summary, publish_artifacts
from tasks.provenance import describe_provenance
from tasks.refusing import name_refusals
from tasks.registry.assets import note_candidate, note_champion
from tasks.registry.challenge import promote_measured, require_pass
from tasks.registry.index import read_history, write_history
from tasks.registry.opened import keep_mlflow_run
from tasks.registry.promotion import find_reign, name_person, read_aliases, read_version
from tasks.registry.record import Registration, as_facts, reach_registry, register
from tasks.registry.state import describe_state
from tasks.registry.tracking import CHAMPION
from tasks.stages import Run, run_stage
from tasks.tables import Tables, read_tables


def name_run() -> str:
    """Name a run after its recipe."""
    return name_by_time(Path(str(flow_run.parameters.get("recipe", "recipe"))).stem)


@flow(name="recompress", flow_run_name=name_run, validate_parameters=False)
@name_refusals
def recompress(recipe: str, overrides: dict[str, Any] | None = None) -> Any:
    """Recompress the model a recipe names.

    Args:
        recipe: path of the recipe, relative to the project's root or absolute.
        overrides: dotted recipe keys and their values, e.g. ``{"target.layers": 26}``.

    Returns:
        The facts of the run, as written to ``data/work/last_run.json``; its state has the verdict in its message.

    Raises:
        MkaError: if anything is refused; nothing is registered then.
        GateRefused: if the candidate was measured and does not keep enough of its base.
    """
    place = find_workplace()
    place.prepare()
    log = Log(
        {
            "recipe": recipe,
            "command": describe_command(place, recipe, overrides),
            "run": str(flow_run.name),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    )
    started = time.perf_counter()
    try:
        walk(place, load_recipe(place.path(Path(recipe)), overrides), log)
        log.facts["status"] = "completed"
    except BaseException as error:
        log.end(error)
        raise
    finally:
        log.facts["seconds"] = round(time.perf_counter() - started, 3)
        write_last_run(place, log.facts)
    return Completed(message=f"{log.facts['verdict']}: {log.facts['decision']}", data=log.facts)


def describe_command(place: Workplace, recipe: str, overrides: dict[str, Any] | None) -> str:
    """Return the command line that does the same again, with a path relative to the project where it can be."""
    shown = place.relative(place.path(Path(recipe)))
    # Of a deployment's parameters anything may come; what is no mapping is refused when the recipe is read.
    changed = overrides.items() if isinstance(overrides, Mapping) else ()
    options = "".join(f" --set {shlex.quote(f'{key}={value}')}" for key, value in changed)
    return f"mka run {shown}{options}"


def walk(place: Workplace, recipe: Recipe, log: Log) -> None:
    """Every stage, top to bottom; every stage is stored and reused by content."""
    log.facts["name"] = recipe.name
    reach_registry(place, recipe)
    check_engines(recipe)
    command, flow_run_id = str(log.facts["command"]), str(flow_run.id)
    with keep_mlflow_run(place, recipe, str(flow_run.name), command, flow_run_id) as opened:
        log.facts["mlflow_run_id"] = opened
        carry_out(place, recipe, log)


def carry_out(place: Workplace, recipe: Recipe, log: Log) -> None:
    """What is computed, registered and promoted, while the MLflow run is open."""
    base = fetch_base_model(place, recipe)
    log.facts["base"] = str(base.checkpoint.path)
    log.stage("base model", base.seconds, base.reused, f"{recipe.model.label} at {base.revision}")
    check_target(recipe, resolve_method(recipe.method), base.checkpoint)
    versions, tables = read_tables(place, recipe)
    log.product("tables", tables)
    name = str(flow_run.name)
    with hold_slot(compute_slot()):
        own_text = write_own_text(place, recipe, base.checkpoint)
    if own_text is not None:
        log.product("text of the base", own_text)
    texts = select_calibration(place, recipe, versions, tables, own_text, name)
    start = {"calibration": log.product("calibration", texts)}
    if recipe.alignment.enabled:
        texts = select_alignment(place, recipe, base.checkpoint, versions, tables, own_text, name)
        start["alignment"] = log.product("alignment", texts)
    if recipe.heal.mode != "off":
        texts = select_healing(place, recipe, base.checkpoint, versions, tables, own_text, name)
        start["healing"] = log.product("healing", texts)
    job = open_job(
        recipe,
        resolve_method(recipe.method),
        base.checkpoint,
        base.revision,
        open_inputs(recipe, Tables(versions, tables, own_text), start),
        command=log.facts["command"],
        registered=recipe.registered_name,
        provenance=describe_provenance(recipe, versions, place.root),
    )
    require_judged(job)
    check_search(job)
    run = Run(place, job, name, versions, tables)
    with hold_slot(compute_slot()):
        found = compress(run, start, log)
    log.facts["figures"] = collect_figures(*open_reports(job, found), seed=recipe.seed)
    log.facts["report"] = str(found["report"].folder / "report.html")
    log.facts["checks"] = str(open_checks(place, log))
    verdict = log.facts["verdict"]

    clock = time.perf_counter()
    registration = register(run, found, log.facts["mlflow_run_id"])
    why = "found in the registry" if registration.reused else f"verdict {verdict}"
    log.stage("register", round(time.perf_counter() - clock, 3), registration.reused, why)
    log.facts["mlflow_run_id"] = registration.run_id
    log.facts |= {"registered_name": registration.name, "registered_version": registration.version}
    if registration.version is not None and not registration.reused:
        note_candidate(run, registration.tracking_uri, registration.version, f"{verdict}: {log.facts['decision']}")
    log.facts["promotion"], registration = promote_on_pass(run, found, registration)
    history = read_history(place, registration.tracking_uri)
    log.facts["registry"] = as_facts(registration) | describe_state(registration, history)
    log.facts["index"] = str(write_history(place, history))
    publish_artifacts(run, found, log.facts)
    tell_outcome(log.facts)
    print_summary(run, found, log.facts)
    announce_verdict(recipe, verdict, f"{log.facts['report']} and MLflow run {registration.run_id}")
    if verdict == "fail":
        figures = tell_checks(found["gate"].facts, "fail")
        raise GateRefused(
            f"gate refused {recipe.name}; nothing was registered: {figures}. Evidence: {log.facts['report']}"
        )


def require_judged(job: Job) -> None:
    """Refuse a run whose gate would have nothing to decide on.

    Raises:
        GuardError: saying what it could have.
    """
    if not job.judged:
        raise GuardError("the gate has nothing to decide on; evaluate on held-out text or on tasks, or give it rules")


def compress(run: Run, start: Mapping[str, Product], log: Log) -> dict[str, Product]:
    """Walk the pipeline, a task per stage; returns every product."""

    def walk_stage(stage: Stage, job: Job, found: Found) -> Product:
        product = run_stage(run, stage, found)
        if stage.name == "plan":
            log.facts["plan"] = str(product.folder / PLAN_FILE)
        if stage.name == "gate":
            log.facts |= {"verdict": product.facts["verdict"], "decision": tell_checks(product.facts)}
            log.facts["gate"] = dict(product.facts)
        return product

    found = run_pipeline(run.job, walk_stage, start=start, tell=log.product)
    log.facts["candidate"] = str(find_model(found).folder / MODEL_FOLDER)
    return found


def promote_on_pass(run: Run, found: Found, registration: Registration) -> tuple[str, Registration]:
    """Promote what the gate passed, where the recipe leaves that to the run; return what came of it, in words.

    As by hand: what the registry holds is fetched, and the gate is decided again.
    """
    settings = run.job.recipe.registry
    if registration.name is None or registration.version is None:
        return "none: nothing was registered", registration
    chosen = read_version(registration.tracking_uri, registration.name, registration.version)
    by_hand = f"mka promote {registration.name} --version {registration.version} --because TEXT"
    if found["gate"].facts["verdict"] != "pass":
        said = "none: the gate is undecided"
    elif CHAMPION in registration.aliases:
        said = "is champion"
    elif (before := find_reign(chosen)) is not None:
        said = f"none: the same model is or was champion as version {before}; by hand: {by_hand}"
    elif settings.approvers:
        said = f"waits for {' or '.join(settings.approvers)}: {by_hand} --approver NAME"
    elif settings.signature is not None:
        signing = f"mka registry-sign {registration.name} --version {registration.version} --key PRIVATE.pem"
        said = f"waits for a signature: {signing}; then {by_hand}"
    elif settings.promote == "manual":
        said = f"waits for a person: {by_hand}"
    else:
        try:
            with hold_slot(compute_slot()):
                measured = require_pass(run, chosen)
                move = promote_measured(run, chosen, measured, who=name_person(), why="gate passed")
            note_champion(chosen.uri, move)
            said = f"became champion, before version {move.old}" if move.old else "became champion, the first"
        except PromotionError as error:
            said = f"none: {error}"
    aliases = read_aliases(registration.tracking_uri, registration.name)
    now = tuple(sorted(alias for alias, version in aliases.items() if version == registration.version))
    return said, replace(registration, aliases=now)


def open_checks(place: Workplace, log: Log) -> Path:
    """Return the page of data checks, rebuilt if anything was checked in this run."""
    page = place.checks / guard.PAGE
    if page.exists() and all(stage["reused"] for stage in log.facts["stages"].values()):
        return page
    return guard.build_docs(place.checks)


main = partial(run_program, "recompress", "run:run")
