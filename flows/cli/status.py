"""`mka status`: a registered model, the servers, the last run."""

import click

from flows.cli.console import carries_out
from flows.cli.options import registry_option
from mka.cli.console import examples
from mka.terminal import Outcome


@click.command(epilog=examples("mka status", "mka status smollm2-135m-mka"))
@click.argument("model", required=False)
@registry_option
@carries_out()
def status(model: str | None, registry: str | None) -> Outcome:
    """Show a registered MODEL: versions, aliases, who moved the champion when and why; then servers and the last run.

    Without MODEL, of each model the newest version and the champion. It only reads.
    """
    from flows.status import read_status

    return read_status(model, registry)
