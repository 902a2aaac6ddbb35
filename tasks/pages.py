"""What a run shows at its end: artifacts on its Prefect page, an event, and a summary on the terminal."""

import base64
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.events import emit_event
from tabulate import tabulate

from mka.outside.printable import make_page, make_printable
from mka.pipeline.evaluate import open_reports
from mka.pipeline.report import find_fit, find_healing
from mka.pipeline.stage import Found
from mka.recipe import Recipe
from mka.report.alignment import summarise_alignment
from mka.report.control import tell_against_control
from mka.report.decision import tell_decision, tell_demonstration
from mka.report.healing import summarise_healing
from mka.report.markup import escape_markdown, make_table
from mka.report.speeds import warn_of_others
from mka.report.table import result_table
from mka.report.verdict import VERDICTS, describe_check, describe_decision
from tasks.registry.tracking import CHAMPION, find_page, find_version_page
from tasks.stages import Run


def publish_artifacts(run: Run, found: Found, facts: Mapping[str, Any]) -> None:
    """Put the result table, the verdict, where the report is and the similarity picture on the run's page."""
    recipe = run.job.recipe
    key = recipe.name.replace("_", "-").replace(".", "-")
    base, candidate, control = open_reports(run.job, found)
    rows, first = result_table(base, candidate, control), tell_first(run, found)
    shown = [{name: make_printable(str(value)) for name, value in row.items()} for row in rows]
    create_table_artifact(
        shown, key=f"{key}-results", description=make_printable(" ".join([f"{recipe.name}:", *first]))
    )
    gate = found["gate"].facts
    # The report is no link: no browser follows one from a served page to a file. MLflow's run has it too.
    told = [
        f"## {recipe.name}: {gate['verdict']}",
        "\n\n".join(first),
        f"{VERDICTS[gate['verdict']].capitalize()}. {tell_against_control(base, candidate, control)}",
        make_table([describe_check(check) for check in gate["checks"]]),
        f"- promotion: {escape_markdown(facts['promotion'])}",
        *tell_state(facts["registry"]),
        f"- report: `{facts['report']}`, and among the files of MLflow run `{facts['mlflow_run_id']}`",
        f"- again: `{facts['command']}`",
    ]
    page = make_page("\n\n".join(told[:4]) + "\n\n" + "\n".join(told[4:]))
    decided = f"{recipe.name}: gate, promotion, and where the evidence is"
    create_markdown_artifact(page, key=f"{key}-gate", description=decided)
    picture = found["report"].open() / "similarity.png"
    if picture.exists():
        encoded = base64.b64encode(picture.read_bytes()).decode()
        create_image_artifact(
            f"data:image/png;base64,{encoded}",
            key=f"{key}-similarity",
            description=f"{recipe.name}: similarity of layers, and what was merged",
        )


def announce_verdict(recipe: Recipe, verdict: str, evidence: str) -> None:
    """Say where the evidence is, in the log and as an event: whoever watches a remote run sees events only."""
    get_run_logger().info("evidence: %s", evidence)
    name = f"{recipe.registered_name}: evidence in {evidence}"
    resource = {"prefect.resource.id": f"mka.model.{recipe.registered_name}", "prefect.resource.name": name}
    emit_event(event=f"gate.{verdict}", resource=resource, payload={"recipe": recipe.name, "evidence": evidence})


def tell_first(run: Run, found: Found) -> list[str]:
    """Return what every account begins with: what is saved and lost, use it or not, a demonstration or not."""
    gate = found["gate"].facts
    told = tell_decision(*open_reports(run.job, found), gate), tell_demonstration(gate)
    return [line for line in told if line]


def tell_state(registry: Mapping[str, Any]) -> list[str]:
    """Return lines of Markdown: the version, its state, the champion beside it, and the commands that move it."""
    if registry["address"] is None:
        return ["- not registered: the gate refused it"]
    return [
        f"- `{registry['address']}`, state: **{registry['state']}**",
        f"- champion: {registry['champion']}",
        f"- promote: `{registry['promote']}`",
        f"- roll back: `{registry['rollback']}`",
    ]


def print_summary(run: Run, found: Found, facts: Mapping[str, Any]) -> None:
    """Print base, control and candidate side by side, which of them wins, the verdict, and where everything is."""
    job = run.job
    base, candidate, control = open_reports(job, found)
    rows = result_table(base, candidate, control)
    sides = ("left", *["right"] * (len(rows[0]) - 1))
    table = tabulate(rows, headers="keys", tablefmt="simple", colalign=sides, disable_numparse=True)
    lines = ["", *tell_first(run, found), "", table]
    subset = " Tasks are seeded subsets of n items." if any(job.recipe.evaluation.tasks.values()) else ""
    lines.append(f"± is one standard error.{subset}")
    if (fit := find_fit(found)) is not None:
        lines.append(summarise_alignment(fit))
    if (healing := find_healing(found)) is not None:
        lines.append(summarise_healing(healing))
    if busy := warn_of_others(candidate):
        lines.append(busy)
    lines += [tell_against_control(base, candidate, control), "", *describe_decision(found["gate"].facts), ""]
    registration = facts["registry"]
    lines.append(
        tabulate(
            [
                ("candidate", facts["candidate"]),
                ("report", facts["report"]),
                ("plan", facts["plan"]),
                ("registered", _describe_registered(registration)),
                ("promotion", facts["promotion"]),
                *_list_moves(registration),
                ("load it", _load_command(registration)),
                ("MLflow pages", _find_mlflow(registration)),
                ("Prefect pages", f"PREFECT_HOME={run.place.work / 'prefect'} {_command('prefect')} server start"),
                ("all of them", f"{_command('python')} -m webbrowser {facts['index']}"),
                ("data checks", f"{_command('python')} -m webbrowser {facts['checks']}"),
            ],
            tablefmt="plain",
        )
    )
    print(make_page("\n".join(lines)))


def _command(name: str) -> str:
    """Name a program of this environment so that it can be typed as printed."""
    program = Path(sys.prefix) / "bin" / name
    return str(program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program)


def _describe_registered(registration: Mapping[str, Any]) -> str:
    if not registration["name"]:
        return "not registered: the gate refused it"
    version = f"{registration['name']} version {registration['version']}"
    where = f"{version}, aliases {', '.join(registration['aliases']) or 'none'}"
    return where + (" (already there)" if registration["reused"] else "")


def _find_mlflow(registration: Mapping[str, Any]) -> str:
    """Say how to look at what was recorded: start a server on a database, open the page of one that runs."""
    tracking_uri, name = registration["tracking_uri"], registration["name"]
    version = find_version_page(tracking_uri, name, registration["version"]) if name else None
    if page := version or find_page(tracking_uri, "experiments"):
        return page
    # MLflow's background jobs cost eight more processes and nothing here uses them.
    return (
        f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {_command('mlflow')} server --backend-store-uri {tracking_uri} -w 1"
    )


def _list_moves(registration: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List the champion, and the command that moves the version from the state it is in."""
    if registration["address"] is None:
        return []
    command = ("roll back", "rollback") if registration["state"] == CHAMPION else ("promote", "promote")
    return [("champion", registration["champion"]), (command[0], registration[command[1]])]


def _load_command(registration: Mapping[str, Any]) -> str:
    """Say how this very version is loaded, or the folder if the gate refused it."""
    if registration["address"] is None:
        return "AutoModelForCausalLM.from_pretrained(the candidate folder above), kept until `mka clean` takes it"
    loaded = f"mlflow.pyfunc.load_model('{registration['address']}')"
    code = f"import mlflow; print({loaded}.predict(['The capital of France is']))"
    return f'MLFLOW_TRACKING_URI={registration["tracking_uri"]} {_command("python")} -c "{code}"'
