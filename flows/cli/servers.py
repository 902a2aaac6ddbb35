"""`mka up` and `mka down`: the local servers."""

import click

from flows.cli.console import carries_out
from mka.cli.console import examples
from mka.terminal import Outcome


@click.command(epilog=examples("mka up --dry-run", "mka up"))
@click.option("--dry-run", is_flag=True, help="Say what would be started, and start nothing.")
@carries_out()
def up(dry_run: bool) -> Outcome:
    """Start a Prefect server, an MLflow server and a worker, on this machine's own address only.

    What runs already is left alone. The worker runs the deployments of prefect.yaml. Ports: MKA_PREFECT_PORT (4200),
    MKA_MLFLOW_PORT (5000). Logs and records lie in servers/ of the work folder.
    """
    from flows.servers import start_servers

    return start_servers(dry_run)


@click.command(epilog=examples("mka down"))
@click.option("--dry-run", is_flag=True, help="Say what would be stopped, and stop nothing.")
@carries_out()
def down(dry_run: bool) -> Outcome:
    """Stop exactly what `mka up` started, the worker first."""
    from flows.servers import stop_servers

    return stop_servers(dry_run)


@click.command(name="status", epilog=examples("python -m flows.servers status"))
@carries_out()
def list_running() -> Outcome:
    """Say which of the servers run."""
    from flows.servers import list_servers

    return list_servers()


@click.group(
    commands=[up, down, list_running], context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=False
)
def servers() -> None:
    """Start, stop or list the local servers: `mka up`, `mka down`, and in `mka status` what runs."""
