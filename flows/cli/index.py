"""`mka index`: the page of all recompressions."""

import click

from flows.cli.console import carries_out
from flows.cli.options import registry_option
from mka.cli.console import examples
from mka.terminal import Outcome


@click.command(epilog=examples("mka index", "mka index --registry http://127.0.0.1:5000"))
@registry_option
@carries_out()
def index(registry: str | None) -> Outcome:
    """Write one page of all recompressions: what came out, what is in use, who moved an alias and why.

    It reads the registry, changes nothing there, writes index.html into the work folder and prints its path.
    """
    from flows.index import rebuild

    return rebuild(registry)
