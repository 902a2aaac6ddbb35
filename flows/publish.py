"""Publish what a registry's alias points at on a model hub: a tag per version, and the alias as a branch.

mka registry-publish smollm2-135m-mka@champion --to me/smollm2-135m-mka
"""

import sys
from functools import partial
from typing import Any

from flows.cli.console import run_program
from mka.terminal import Outcome
from tasks.machine.workplace import find_workplace


def publish(
    name: str,
    repo: str,
    *,
    base: str | None = None,
    private: bool = False,
    registry: str | None = None,
    dry_run: bool = False,
) -> Outcome:
    """Send the version that an alias points at, fetched from the registry and compared with its digest first.

    It goes to the branch that is called like the alias, the champion to ``main`` as well, and is tagged ``vVERSION``.

    Args:
        name: ``MODEL@ALIAS``; of a model alone, its champion.
        repo: the page, ``org/name``.
        base: the base model's id on the hub, where the card does not say it.
        private: make the page private.
        registry: MLflow store; default: `MLFLOW_TRACKING_URI`, else that of the work folder.
        dry_run: send nothing.

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
    facts: dict[str, Any] = {"model": model, "version": version.version, "repo": repo, "branches": branches}
    tag = f"v{version.version}"
    with fetch_version(place, version) as folder, quiet_hub():
        page = lay_out_page(folder, repo, base=base)
        facts |= {"files": {file: found.sha256 for file, found in page.files.items()}, "bytes": page.nbytes}
        if dry_run:
            size = f"{len(page.files)} files, {page.nbytes / 1e6:,.1f} MB"
            told = f"{version.label}, {size}, would go to {repo}, {', '.join(branches)}, tag {tag}"
            return Outcome(facts | {"tag": tag, "sent": False}, f"{told}\ndry run: nothing was sent")
        message = f"{version.label}, {alias}"
        made = publish_page(page, branches=branches, tag=tag, private=private, message=message)
    said = "sent and compared" if made.sent else "was there already"
    told = f"{version.label} {said}: {made.url}, {', '.join(branches)}, tag {made.tag}"
    return Outcome(facts | {"tag": made.tag, "url": made.url, "sent": made.sent}, told)


main = partial(run_program, "publish", "registry_publish:registry_publish")

if __name__ == "__main__":
    sys.exit(main())
