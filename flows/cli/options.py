"""Options that commands of production share."""

import click

from mka.cli.options import read_settings
from tasks.machine.deployments import RECOMPRESS

registry_option = click.option(
    "--registry",
    metavar="URI",
    help="MLflow store, e.g. http://127.0.0.1:5000 or sqlite:////full/path/mlflow.db.  [default: MLFLOW_TRACKING_URI, "
    "else mlflow.db in the work folder (MKA_WORK, or data/work)]",
)
because_option = click.option("--because", required=True, metavar="TEXT", help="Why, for the record.")
approver_option = click.option("--approver", metavar="NAME", help="Who stands for it; a recipe may want one.")
version_option = click.option(
    "--version", metavar="N", help="Version of the model.  [default: what the alias candidate points at]"
)
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    callback=read_settings,
    help="Set a key of the recipe, e.g. target.layers=26; may be repeated.",
)
deployment_option = click.option(
    "--deployment", default=RECOMPRESS, show_default=True, metavar="FLOW/NAME", help="What to start."
)
