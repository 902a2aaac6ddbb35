"""Sign what the registry holds of a version, for recipes whose `registry.signature` asks for it.

python -m flows.sign smollm2-135m-mka --key private.pem
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.command_line import run_command
from mka.outside.printable import make_printable
from tasks.machine.workplace import find_workplace


def sign(model: str, key: Path, *, version: str | None = None, registry: str | None = None) -> None:
    """Fetch a version, compare it with its digest, sign it and keep the signature with its run.

    Args:
        model: registered model.
        key: private key, PEM.
        version: its version; default: the one "candidate" points at.
        registry: MLflow store; default: `MLFLOW_TRACKING_URI`, else that of the work folder.

    Raises:
        MkaError: if the version cannot be had, or the key cannot sign.
    """
    # Imports MLflow, which takes seconds that --help need not cost.
    from tasks.registry.promotion import find_candidate, read_version
    from tasks.registry.signature import sign_version
    from tasks.registry.tracking import registry_address

    place = find_workplace()
    place.prepare()
    uri = registry or registry_address(place)
    chosen = read_version(uri, model, version) if version else find_candidate(uri, model)
    sign_version(place, chosen, key)
    print(make_printable(f"{chosen.label} is signed"))


def parse_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """Read the command line."""
    parser = ArgumentParser(
        prog="python -m flows.sign",
        description="Sign what the registry holds of a version; promotion wants it where a recipe names a public key.",
        epilog="example: python -m flows.sign smollm2-135m-mka --key private.pem",
    )
    parser.add_argument("model", help="registered model")
    parser.add_argument("--key", required=True, type=Path, metavar="FILE", help="private key, PEM, an elliptic curve")
    parser.add_argument("--version", metavar="N", help="default: what the alias candidate points at")
    parser.add_argument("--registry", metavar="URI", help="MLflow store; default as for runs")
    return vars(parser.parse_args(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """Sign; what is refused is one line on stderr and exit code 2."""
    given = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    return run_command("sign", lambda: sign(**given), is_flow=False)


if __name__ == "__main__":
    sys.exit(main())
