"""`mka publish`: a model's page on a hub."""

from pathlib import Path
from typing import Any

import click

from mka.cli.console import examples, reports
from mka.cli.options import FILE
from mka.terminal import Outcome, align


@click.command(
    epilog=examples(
        "mka publish ./smollm2-26 --to me/smollm2-26 --base HuggingFaceTB/SmolLM2-135M-Instruct --dry-run",
        "mka publish ./smollm2-26 --to me/smollm2-26 --private --tag v1",
    )
)
@click.argument("folder", type=FILE)
@click.option("--to", "repo", required=True, metavar="ORG/NAME", help="The page; made where there is none.")
@click.option("--revision", metavar="BRANCH", help="Branch to write; made where it is missing.  [default: main]")
@click.option("--tag", metavar="TAG", help="Tag to set once the hub holds every file.")
@click.option("--private", is_flag=True, help="Make it private; one that is there has to be.")
@click.option("--base", metavar="ORG/NAME", help="The base model on the hub.  [default: what the card says]")
@click.option(
    "--relation",
    type=click.Choice(["finetune", "merge", "quantized"]),
    help="What the model is to its base.  [default: what the card says]",
)
@click.option("--license", "license_name", metavar="ID", help="Licence.  [default: the base's, as the card says]")
@click.option("--card", type=FILE, metavar="FILE", help="Card that `mka report` wrote.  [default: the folder's]")
@click.option("--dry-run", is_flag=True, help="Say what would be sent, and send nothing.")
@reports
def publish(folder: Path, repo: str, revision: str | None, tag: str | None, dry_run: bool, **asked: Any) -> Outcome:
    """Send FOLDER to a model hub: card, weights and what belongs to them, and their checksums.

    What the hub then holds is compared with what was sent, file by file, and only then a tag is set. Where it ends
    early, the same command goes on. The token is that in HF_TOKEN or of `hf auth login`; HF_ENDPOINT names another hub.
    """
    from mka.errors import PublishError
    from mka.export.hub import MAIN, check_ref, publish_page
    from mka.export.page import lay_out_page
    from mka.terminal import quiet_hub

    private = asked.pop("private")
    for name, option in ((revision, "--revision"), (tag, "--tag")):
        if name is not None:
            check_ref(name, option)
    if asked["card"] is not None and not asked["card"].is_file():
        raise PublishError(f"--card {asked['card']}: no such file")
    with quiet_hub():
        page = lay_out_page(folder, repo, **asked)
    branch = revision or MAIN
    document: dict[str, Any] = {
        "repo": repo,
        "branch": branch,
        "tag": tag,
        "private": private,
        "card": dict(page.front),
    }
    document |= {"files": {name: file.sha256 for name, file in page.files.items()}, "bytes": page.nbytes}
    rows = [[name, f"{file.size / 1e6:,.3f} MB", file.sha256[:16]] for name, file in page.files.items()]
    lines = [align(rows, ["file", "size", "sha256"], "lr"), "", *_describe_card(page.front)]
    if dry_run:
        where = f"{repo}, branch {branch}{f', tag {tag}' if tag else ''}{', private' if private else ''}"
        return Outcome(
            document | {"sent": False}, "\n".join([*lines, "", f"would go to {where}", "dry run: nothing was sent"])
        )
    with quiet_hub():
        made = publish_page(page, branches=[branch], tag=tag, private=private, message=f"Publish {repo}")
    document |= {"url": made.url, "commits": dict(made.commits), "sent": made.sent}
    what = "sent and compared" if made.sent else "was there already"
    done = f"{made.files} files, {made.nbytes / 1e6:,.1f} MB {what}: commit {made.commits[branch][:12]}"
    return Outcome(document, "\n".join([*lines, "", done, *([f"tag {tag}"] if tag else []), made.url]))


def _describe_card(front: Any) -> list[str]:
    """Say what the hub will read of the card, and what it will miss."""
    told = [f"{key:<20} {front[key]}" for key in ("license", "base_model", "base_model_relation") if key in front]
    results = [result for entry in front.get("model-index", ()) for result in entry.get("results", ())]
    told.append(f"{'results':<20} {len(results)}")
    wanting = [option for key, option in (("license", "--license"), ("base_model", "--base")) if key not in front]
    return [*told, *(["the card lacks what would say: " + ", ".join(wanting)] if wanting else [])]
