"""`mka promote`: a registered version becomes champion."""

from dataclasses import asdict

import click

from flows.cli.console import carries_out
from flows.cli.options import approver_option, because_option, registry_option, version_option
from flows.command_line import prepare_flow
from mka.cli.console import examples
from mka.terminal import Outcome


@click.command(
    epilog=examples(
        'mka promote smollm2-135m-mka --approver alice --because "evidence read" --dry-run',
        'mka promote smollm2-135m-mka --approver alice --because "evidence read"',
    )
)
@click.argument("model")
@because_option
@approver_option
@version_option
@click.option(
    "--without-comparison", "compare", flag_value=False, default=True, help="Do not hold it against the champion."
)
@registry_option
@click.option("--dry-run", is_flag=True, help="Say which alias would move and what is asked; measure and move nothing.")
@carries_out()
def promote(
    model: str,
    because: str,
    approver: str | None,
    version: str | None,
    compare: bool,
    registry: str | None,
    dry_run: bool,
) -> Outcome:
    """Make a registered version of MODEL champion, if today's gate passes it and it is as good as the champion.

    The champion before it becomes `previous`. Exit code 1 if it may not be champion: stale, not approved, not signed
    where its recipe asks for that, undecided, failed, or worse than the champion.
    """
    from flows.promote import foresee_promotion
    from flows.promote import promote as run

    if dry_run:
        return foresee_promotion(model, version, approver, compare, registry)
    prepare_flow(registry)
    move = run(model, because, version=version, approver=approver, compare=compare, registry=registry)
    return Outcome(asdict(move), "")
