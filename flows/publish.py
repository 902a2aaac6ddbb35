"""Publish what a registry's alias points at on a model hub: a tag per version, and the alias as a branch.

python -m flows.publish smollm2-135m-mka@champion --to me/smollm2-135m-mka
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

from flows.command_line import run_command
from mka.outside.printable import make_printable
from tasks.machine.workplace import find_workplace


def publish(
    name: str, repo: str, *, base: str | None = None, private: bool = False, registry: str | None = None
) -> None:
    """Send the version that an alias points at, fetched from the registry and compared with its digest first.

    It goes to the branch that is called like the alias, the champion to ``main`` as well, and is tagged ``vVERSION``.

    Args:
        name: ``MODEL@ALIAS``; of a model alone, its champion.
        repo: the page, ``org/name``.
        base: the base model's id on the hub, where the card does not say it.
        private: make the page private.
        registry: MLflow store; default: `MLFLOW_TRACKING_URI`, else that of the work folder.

    Raises:
        MkaError: if the version cannot be had, or the hub does not take it.
    """
    # Imports MLflow, which takes seconds that --help need not cost.
    from mka.export.hub import MAIN, publish_page
    from mka.export.page import lay_out_page
    from mka.terminal import quiet_hub
    from tasks.registry.promotion import fetch_version, find_alias
    from tasks.registry.tracking import CHAMPION, registry_address

    place = find_workplace()
    place.prepare()
    uri = registry or registry_address(place)
    model, _, named = name.partition("@")
    alias = named or CHAMPION
    version = find_alias(uri, model, alias)
    branches = [MAIN, alias] if alias == CHAMPION else [alias]
    with fetch_version(place, version) as folder, quiet_hub():
        page = lay_out_page(folder, repo, base=base)
        tag, message = f"v{version.version}", f"{version.label}, {alias}"
        made = publish_page(page, branches=branches, tag=tag, private=private, message=message)
    said = "sent and compared" if made.sent else "was there already"
    print(make_printable(f"{version.label} {said}: {made.url}, {', '.join(branches)}, tag {made.tag}"))


def parse_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """Read the command line."""
    parser = ArgumentParser(
        prog="python -m flows.publish",
        description="Send a registered version to a model hub: tagged by its number, on a branch named by its alias. "
        "The token is that in HF_TOKEN or of `hf auth login`; HF_ENDPOINT names another hub.",
        epilog="example: python -m flows.publish smollm2-135m-mka@champion --to me/smollm2-135m-mka --private",
    )
    parser.add_argument("name", metavar="NAME[@ALIAS]", help="registered model; its champion if no alias is given")
    parser.add_argument("--to", dest="repo", required=True, metavar="ORG/NAME", help="the page; made if missing")
    parser.add_argument("--base", metavar="ORG/NAME", help="base model on the hub; default: what the card says")
    parser.add_argument("--private", action="store_true", help="make it private")
    parser.add_argument("--registry", metavar="URI", help="MLflow store; default as for runs")
    return vars(parser.parse_args(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """Publish; what is refused is one line on stderr and exit code 2."""
    given = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    return run_command("publish", lambda: publish(**given), is_flow=False)


if __name__ == "__main__":
    sys.exit(main())
