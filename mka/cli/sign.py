"""`mka sign` and `mka verify`: a folder's signature, made with a key and held against one."""

from pathlib import Path

import click

from mka.cli.console import examples, reports
from mka.cli.options import FILE
from mka.terminal import Outcome

_signature = click.option("--signature", type=FILE, metavar="FILE", help="The signature.  [default: FOLDER/model.sig]")


@click.command(epilog=examples("mka sign ./smollm2-26 --key private.pem"))
@click.argument("folder", type=FILE)
@click.option("--key", type=FILE, required=True, metavar="FILE", help="Private key, PEM, an elliptic curve.")
@_signature
@reports
def sign(folder: Path, key: Path, signature: Path | None) -> Outcome:
    """Sign FOLDER with a private key; its files stay as they are.

    All files are signed but the card, SHA256SUMS and the folder `evidence`. The signature is in the format of OpenSSF's
    model-signing, whose own tool verifies it too. A key is made by
    `openssl ecparam -name prime256v1 -genkey -noout -out private.pem`, its public half by
    `openssl ec -in private.pem -pubout -out public.pem`.
    """
    from mka.store.signing import sign_folder

    place = sign_folder(folder, key, signature)
    return Outcome({"folder": str(folder), "signature": str(place)}, f"signed: {place}")


@click.command(epilog=examples("mka verify ./smollm2-26 --key public.pem"))
@click.argument("folder", type=FILE)
@click.option("--key", type=FILE, required=True, metavar="FILE", help="Public key, PEM.")
@_signature
@reports
def verify(folder: Path, key: Path, signature: Path | None) -> Outcome:
    """Hold FOLDER against its signature: nothing changed, nothing missing, nothing beside it."""
    from mka.store.signing import verify_folder

    place = verify_folder(folder, key, signature)
    return Outcome({"folder": str(folder), "signature": str(place), "verified": True}, f"as signed: {folder}")
