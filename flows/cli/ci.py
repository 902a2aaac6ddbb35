"""`mka ci`: a recompression as a job of CI."""

from pathlib import Path
from typing import Any

import click

from flows.cli.console import LIBRARIES, carries_out, require_libraries
from flows.cli.options import deployment_option, set_option
from flows.command_line import prepare_flow
from mka.cli.console import examples
from mka.errors import ServerError
from mka.terminal import Outcome


@click.command(
    epilog=examples(
        "mka ci recipes/smollm2_135m.yaml",
        "mka ci recipes/smollm2_135m.yaml --deployment recompress/default --set target.layers=26",
        "mka ci recipes/smollm2_135m.yaml --local",
    )
)
@click.argument("recipe")
@deployment_option
@set_option
@click.option("--local", is_flag=True, help="Run it here, in this process, instead of starting a deployment.")
@carries_out(needs=("prefect",))
def ci(recipe: str, deployment: str, overrides: dict[str, Any], local: bool) -> Outcome:
    """Recompress as RECIPE says and wait: a plain line per stage on stderr, then the table of results.

    A deployment is started on the Prefect server that PREFECT_API_URL names; RECIPE is a path as its worker has it.
    Where GITHUB_STEP_SUMMARY and GITHUB_OUTPUT are set, a summary and outputs are written: state, run, verdict, model,
    version, address, promotion, registry, mlflow_run, report. Exit codes: 0 the gate passed it, 1 failed it, 2 it was
    refused or ended early, 3 the gate is undecided, 130 interrupted, and a run on a server goes on then.
    """
    from flows.ci import conclude, run_here, run_on_server
    from tasks.machine.slots import is_on_server

    if local:
        require_libraries(LIBRARIES)
        prepare_flow()
        return conclude(run_here(str(Path(recipe).resolve()), overrides))
    if not is_on_server():
        raise ServerError("no Prefect server to start it on: set PREFECT_API_URL, or run it here with --local")
    prepare_flow()
    return conclude(run_on_server(deployment, recipe, overrides))
