"""`mka registry-publish`: what an alias points at, on a model hub."""

import click

from flows.cli.console import carries_out
from flows.cli.options import registry_option
from mka.cli.console import examples
from mka.terminal import Outcome


@click.command(
    name="registry-publish",
    epilog=examples("mka registry-publish smollm2-135m-mka@champion --to me/smollm2-135m-mka --private"),
)
@click.argument("name", metavar="MODEL[@ALIAS]")
@click.option("--to", "repo", required=True, metavar="ORG/NAME", help="The page; made where there is none.")
@click.option("--base", metavar="ORG/NAME", help="The base model on the hub.  [default: what the card says]")
@click.option("--private", is_flag=True, help="Make it private; one that is there has to be.")
@registry_option
@click.option("--dry-run", is_flag=True, help="Fetch and compare the version, say what would be sent, send nothing.")
@carries_out()
def registry_publish(
    name: str, repo: str, base: str | None, private: bool, registry: str | None, dry_run: bool
) -> Outcome:
    """Send a registered version to a model hub: tagged by its number, on a branch named by its alias.

    The champion, if no alias is given, goes to main as well. The token is that in HF_TOKEN or of `hf auth login`;
    HF_ENDPOINT names another hub. A folder is sent by `mka publish`.
    """
    from flows.publish import publish

    return publish(name, repo, base=base, private=private, registry=registry, dry_run=dry_run)
