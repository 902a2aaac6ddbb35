"""`mka watch`: have base models changed?"""

from pathlib import Path

import click

from flows.cli.console import carries_out
from flows.cli.options import deployment_option
from flows.command_line import prepare_flow
from mka.cli.console import examples
from mka.terminal import Outcome


@click.command(
    epilog=examples(
        "mka watch recipes/smollm2_135m.yaml --dry-run",
        "MKA_HUB_WEBHOOK_SECRET=... mka watch recipes/smollm2_135m_hub.yaml --listen --port 4300",
    )
)
@click.argument("recipes", nargs=-1, required=True, metavar="RECIPE...")
@deployment_option
@click.option("--initial", is_flag=True, help="Start the first recompression of a model, too.")
@click.option("--dry-run", is_flag=True, help="Only say what has changed.")
@click.option("--listen", "listens", is_flag=True, help="Go on, and look again whenever a webhook says so.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=4300, show_default=True, help="Port to listen on.")
@carries_out()
def watch(
    recipes: tuple[str, ...],
    deployment: str,
    initial: bool,
    dry_run: bool,
    listens: bool,
    host: str,
    port: int,
) -> Outcome | None:
    """Compare the base model of each RECIPE with the one its champion was made from; start what is due.

    A recompression is started once per base revision and recipe, however often and wherever this runs, on the Prefect
    server that PREFECT_API_URL names.

    With --listen it takes webhooks until interrupted: the Hugging Face hub's, whose secret is in
    MKA_HUB_WEBHOOK_SECRET, and MLflow's, whose secret is in MKA_MLFLOW_WEBHOOK_SECRET. A request without the right
    secret or signature is answered 401. In front of it belongs a proxy that speaks TLS.
    """
    from flows.watch import watch_base_models
    from tasks.machine.workplace import find_workplace

    place = find_workplace()
    named = [str(place.relative(Path(recipe).resolve())) for recipe in recipes]
    if listens:
        from flows.listen import listen
        from tasks.webhooks import read_secrets

        secrets = read_secrets()
        prepare_flow()
        listen(place, named, lambda some: watch_base_models(some, deployment, dry_run, initial), (host, port), secrets)
        return None
    prepare_flow()
    return Outcome({"recipes": watch_base_models(named, deployment, dry_run, initial)}, "")
