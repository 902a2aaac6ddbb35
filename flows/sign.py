"""Sign what the registry holds of a version, for recipes whose `registry.signature` asks for it.

mka registry-sign smollm2-135m-mka --key private.pem
"""

import sys
from functools import partial
from pathlib import Path

from flows.cli.console import run_program
from mka.terminal import Outcome
from tasks.machine.workplace import find_workplace


def sign(model: str, key: Path, *, version: str | None = None, registry: str | None = None) -> Outcome:
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
    return Outcome({"model": model, "version": chosen.version, "signed": True}, f"{chosen.label} is signed")


main = partial(run_program, "sign", "registry_sign:registry_sign")

if __name__ == "__main__":
    sys.exit(main())
