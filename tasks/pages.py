"""What a run shows at its end: artifacts on its Prefect page, and a summary on the terminal."""

import base64
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from tabulate import tabulate

from mka.outside.printable import make_page, make_printable
from mka.pipeline.evaluate import open_reports
from mka.pipeline.report import find_fit, find_healing
from mka.pipeline.stage import Found
from mka.report.alignment import summarise_alignment
from mka.report.control import tell_against_control
from mka.report.decision import tell_decision, tell_demonstration
from mka.report.healing import summarise_healing
from mka.report.speeds import warn_of_others
from mka.report.table import result_table
from mka.report.verdict import describe_decision
from tasks.registry.tracking import CHAMPION
from tasks.stages import Run


def publish_artifacts(run: Run, found: Found, facts: Mapping[str, Any]) -> None:
    """Put the result table, the verdict, where the report is and the similarity picture on the run's page."""
    recipe = run.job.recipe
    key = recipe.name.replace("_", "-").replace(".", "-")
    base, candidate, control = open_reports(run.job, found)
    rows, first = result_table(base, candidate, control), tell_first(run, found)
    shown = [{name: make_printable(str(value)) for name, value in row.items()} for row in rows]
    create_table_artifact(shown, key=f"{key}-results", description=make_printable(" ".join(first)))
    lines = "\n".join(describe_decision(found["gate"].facts))
    # Not a link: no browser follows one from a served page to a file, and the MLflow run has the report too.
    places = (
        f"Report: `{facts['report']}`, and in MLflow run `{facts['mlflow_run_id']}`. Promotion: {facts['promotion']}."
    )
    against, registered = tell_against_control(base, candidate, control), "\n".join(tell_state(facts["registry"]))
    told = make_page("\n\n".join([*first, f"```\n{lines}\n```", against, registered, places]))
    create_markdown_artifact(told, key=f"{key}-gate", description="Gate")
    picture = found["report"].open() / "similarity.png"
    if picture.exists():
        encoded = base64.b64encode(picture.read_bytes()).decode()
        create_image_artifact(
            f"data:image/png;base64,{encoded}", key=f"{key}-similarity", description="Layer similarity and merges"
        )


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
    if registration["name"]:
        version = f"{registration['name']} version {registration['version']}"
        where = f"{version}, aliases {', '.join(registration['aliases']) or 'none'}"
        where += " (already there)" if registration["reused"] else ""
    else:
        where = "not registered: the gate refused it"
    lines.append(
        tabulate(
            [
                ("candidate", facts["candidate"]),
                ("report", facts["report"]),
                ("plan", facts["plan"]),
                ("registered", where),
                ("promotion", facts["promotion"]),
                *_list_moves(registration),
                ("load it", _load_command(registration)),
                ("MLflow pages", _mlflow_command(registration["tracking_uri"])),
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


def _mlflow_command(tracking_uri: str) -> str:
    """Say how to look at a store: start a server on a database, open the address of one that runs."""
    if tracking_uri.startswith("http"):
        return tracking_uri
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
