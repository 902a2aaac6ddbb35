"""Deployments of the Prefect server; light, so that who only asks for a run needs nothing of what runs it."""

from typing import Any

from mka.errors import WatchError

# What a recompression is started by, of prefect.yaml.
RECOMPRESS = "recompress/default"


def find_deployment(client: Any, deployment: str) -> Any:
    """Return a deployment of the Prefect server.

    Args:
        client: Prefect's, synchronous.
        deployment: ``flow/deployment``.

    Raises:
        WatchError: if there is no such deployment.
    """
    from prefect.exceptions import ObjectNotFound

    try:
        return client.read_deployment_by_name(deployment)
    except ObjectNotFound:
        raise WatchError(
            f"the Prefect server has no deployment {deployment!r}; `prefect deploy --all` makes it, `mka up` does"
        ) from None
