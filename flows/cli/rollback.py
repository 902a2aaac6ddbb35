"""`mka rollback`: the champion before is champion again."""

from dataclasses import asdict

import click

from flows.cli.console import carries_out
from flows.cli.options import approver_option, because_option, registry_option
from flows.command_line import prepare_flow
from mka.cli.console import examples
from mka.terminal import Outcome


@click.command(epilog=examples('mka rollback smollm2-135m-mka --because "answers in the wrong language"'))
@click.argument("model")
@because_option
@approver_option
@registry_option
@click.option("--dry-run", is_flag=True, help="Say which aliases would move, and move none.")
@carries_out()
def rollback(model: str, because: str, approver: str | None, registry: str | None, dry_run: bool) -> Outcome:
    """Make the previous champion of MODEL champion again. Nothing is measured; running it twice undoes it."""
    from flows.rollback import foresee_rollback
    from flows.rollback import rollback as run

    if dry_run:
        return foresee_rollback(model, registry)
    prepare_flow(registry)
    return Outcome(asdict(run(model, because, approver=approver, registry=registry)), "")
