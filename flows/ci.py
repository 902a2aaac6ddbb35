"""A recompression as a job of CI: started on a server or run here, told stage by stage, its result in files CI reads.

mka ci recipes/smollm2_135m.yaml
"""

import io
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from flows.cli.console import run_program
from flows.told import Told, read_told
from mka.errors import GateRefused, GateUndecided, MkaError, ServerError
from mka.outside.printable import hide_passwords, make_printable, one_line
from mka.terminal import Outcome, align, describe_stage
from tasks.machine.deployments import find_deployment

POLL_SECONDS = 3.0
# For so long a server may be away, e.g. because it is started anew.
PATIENCE_SECONDS = 300.0
# Refusal of each verdict, which decides the exit code.
REFUSALS: Mapping[str, type[MkaError]] = {"fail": GateRefused, "undecided": GateUndecided}


@dataclass(frozen=True)
class Run:
    """A flow run that has ended.

    Attributes:
        name: what it is called.
        run_id: its id on the server.
        state: the name of its last state.
        message: what that says.
        page: its page, if a server was named.
        told: what it told.
    """

    name: str
    run_id: UUID
    state: str
    message: str
    page: str | None
    told: Told


def say_line(line: str) -> None:
    """Tell one line of progress on stderr."""
    print(make_printable(line), file=sys.stderr, flush=True)


def run_on_server(deployment: str, recipe: str, overrides: Mapping[str, Any]) -> Run:
    """Start a deployment on the server that PREFECT_API_URL names and wait for its end.

    Args:
        deployment: ``flow/deployment``.
        recipe: path of the recipe, relative to the project's root of the worker.
        overrides: dotted recipe keys and their values.

    Raises:
        WatchError: if there is no such deployment.
        ServerError: if the server is away for too long.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        found = find_deployment(client, deployment)
        parameters = {"recipe": recipe, "overrides": dict(overrides)}
        run = client.create_flow_run_from_deployment(found.id, parameters=parameters, tags=["ci"])
        page = find_page(run.id)
        say_line(f"{run.name}: started {deployment} for {recipe}; {page}")
        try:
            return follow(client, run.id, page, say_line)
        except KeyboardInterrupt:
            say_line(f"{run.name} goes on; `prefect flow-run cancel {run.id}` ends it")
            raise


def follow(client: Any, run_id: UUID, page: str | None, tell: Callable[[str], Any]) -> Run:
    """Wait for the end of a flow run; tell a line per stage as it ends, and of what it waits for.

    Args:
        client: Prefect's, synchronous.
        run_id: the run.
        page: its page.
        tell: called with each line.

    Raises:
        ServerError: if the server is away for too long.
    """
    shown, state, answered = 0, "Scheduled", time.monotonic()
    while True:
        try:
            # In this order: what a run that has ended told is whole.
            run, told = client.read_flow_run(run_id), read_told(client, run_id)
        except Exception as error:
            if not is_away(error):
                raise
            if time.monotonic() - answered > PATIENCE_SECONDS:
                raise ServerError(
                    f"the Prefect server does not answer any more: {error}; run {run_id} may go on, look at {page}"
                ) from None
            time.sleep(POLL_SECONDS)
            continue
        answered = time.monotonic()
        for stage in told.stages[shown:]:
            tell(describe_stage(stage["stage"], stage["seconds"], stage["reused"], stage["why"]))
        shown = max(shown, len(told.stages))
        ended = run.state is not None and run.state.is_final()
        name = run.state.name if run.state else "unknown"
        if ended:
            return Run(run.name, run_id, name, run.state.message or "", page, told)
        if name != state and name not in ("Scheduled", "Submitting", "Pending", "Running"):
            tell(f"{run.name}: {name}" + ("; no worker has taken it yet" if name == "Late" else ""))
        state = name
        time.sleep(POLL_SECONDS)


def is_away(error: Exception) -> bool:
    """Whether a server does not answer, or only with a fault of its own, as one that is starting does."""
    response = getattr(error, "response", None)
    if response is not None:
        return bool(response.status_code >= 500)
    return type(error).__module__.partition(".")[0] in ("httpx", "httpcore", "anyio")


def run_here(recipe: str, overrides: Mapping[str, Any]) -> Run:
    """Run the flow in this process; its log tells the stages.

    Args:
        recipe: path of the recipe.
        overrides: dotted recipe keys and their values.

    Raises:
        MkaError: what the run refuses before the gate has spoken.
    """
    from prefect.client.orchestration import get_client

    from flows.recompress import recompress

    with redirect_stdout(io.StringIO()):  # the table that it prints is printed here
        state: Any = recompress(recipe, dict(overrides), return_state=True)
    run_id = state.state_details.flow_run_id
    with get_client(sync_client=True) as client:
        run, told = client.read_flow_run(run_id), read_told(client, run_id)
    if not told.outcome and isinstance(error := state.result(raise_on_failure=False), BaseException):
        raise error
    return Run(run.name, run_id, state.name, state.message or "", find_page(run_id), told)


def find_page(run_id: UUID) -> str | None:
    """Return the address of a run's page; None without a server."""
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    if settings.api.url is None:
        return None
    shown = hide_passwords(str(settings.ui_url or settings.api.url))
    return f"{shown.removesuffix('/').removesuffix('/api')}/runs/flow-run/{run_id}"


def conclude(run: Run) -> Outcome:
    """Say what came of a run, and write it where CI reads it.

    Raises:
        MkaError: if the run ended before the gate spoke.
    """
    outcome = run.told.outcome
    document = {"run": run.name, "flow_run_id": str(run.run_id), "state": run.state, "page": run.page}
    document |= outcome
    write_github(run)
    if not outcome:
        said = one_line(run.message, 400) or "it says nothing"
        raise MkaError(
            f"run {run.name} ended as {run.state} before the gate spoke: {said}; see {run.page or 'its log'}"
        )
    refusal = REFUSALS.get(outcome["verdict"])
    where = outcome.get("report", "its page")
    error = refusal(f"the gate says {outcome['verdict']}; evidence: {where}") if refusal else None
    rows = [list(row.values()) for row in run.told.results]
    headers = list(run.told.results[0]) if run.told.results else []
    lines = [align(rows, headers, "lrrrr"[: len(headers)]), ""] if rows else []
    lines += [f"{name:<12} {value}" for name, value in outcome.items()]
    lines += [f"{'run':<12} {run.page or run.name}"]
    return Outcome(document | {"stages": run.told.stages, "results": run.told.results}, "\n".join(lines), error)


def write_github(run: Run) -> None:
    """Append a summary and outputs to the files that GitHub's variables name, where they do.

    Raises:
        OSError: if one cannot be written.
    """
    outputs = {"state": run.state, "run": run.page or run.name, **run.told.outcome}
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        _append(Path(summary), make_summary(run))
    if output := os.environ.get("GITHUB_OUTPUT"):
        # One line each: a value with a line break would set another output.
        _append(Path(output), "".join(f"{name}={one_line(value, 1000)}\n" for name, value in outputs.items()))


def make_summary(run: Run) -> str:
    """Lay out a run as Markdown: verdict, results, where everything is, stages."""
    outcome = run.told.outcome
    parts = [f"## {_cell(run.name)}: {_cell(outcome.get('verdict', run.state))}"]
    if not outcome:
        parts.append(_cell(one_line(run.message, 1000)))
    parts.append(_table(run.told.results))
    rows = [{"": name, " ": value} for name, value in outcome.items() if name != "verdict"]
    parts.append(_table([*rows, {"": "run", " ": run.page or run.name}]))
    stages = [
        {"stage": s["stage"], "seconds": "reused" if s["reused"] else f"{s['seconds']:.1f}", "why": s["why"]}
        for s in run.told.stages
    ]
    if stages:
        parts.append(f"<details><summary>{len(stages)} stages</summary>\n\n{_table(stages)}\n\n</details>")
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)


def _cell(value: object) -> str:
    """Return text that is nothing but text in Markdown."""
    told = make_printable(str(value)).replace("\\", "\\\\")
    for mark in "|<>`*_[]":
        told = told.replace(mark, f"\\{mark}" if mark not in "<>" else {"<": "&lt;", ">": "&gt;"}[mark])
    return told


def _append(file: Path, text: str) -> None:
    with file.open("a", encoding="utf-8") as opened:
        opened.write(text)


main = partial(run_program, "ci", "ci:ci")

if __name__ == "__main__":
    sys.exit(main())
