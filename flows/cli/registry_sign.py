"""`mka registry-sign`: what the registry holds of a version, signed."""

from pathlib import Path

import click

from flows.cli.console import carries_out
from flows.cli.options import registry_option, version_option
from mka.cli.console import examples
from mka.cli.options import FILE
from mka.terminal import Outcome


@click.command(name="registry-sign", epilog=examples("mka registry-sign smollm2-135m-mka --key private.pem"))
@click.argument("model")
@click.option("--key", type=FILE, required=True, metavar="FILE", help="Private key, PEM, an elliptic curve.")
@version_option
@registry_option
@carries_out()
def registry_sign(model: str, key: Path, version: str | None, registry: str | None) -> Outcome:
    """Sign what the registry holds of a version of MODEL; promotion wants it where a recipe names a public key.

    The version is fetched and compared with its digest first; the signature is kept with its run. A folder is signed
    by `mka sign`.
    """
    from flows.sign import sign

    return sign(model, key, version=version, registry=registry)
