"""Deliveries of webhooks: is a request from who it says, and which base model does it tell of?

The Hugging Face hub sends its secret as it is (``X-Webhook-Secret``). MLflow signs: ``X-MLflow-Signature`` is ``v1,``
and the base64 of the HMAC-SHA256, under the secret, of delivery id, time and body with dots between them.
"""

import base64
import hashlib
import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mka.errors import WatchError
from mka.outside.reading import parse_json
from mka.recipe import Recipe

# Where the secrets are; never on a command line, where everybody on the machine reads them.
VARIABLES = {"hub": "MKA_HUB_WEBHOOK_SECRET", "MLflow": "MKA_MLFLOW_WEBHOOK_SECRET"}
LONGEST_BODY = 1 << 20
# A signed delivery is believed for so long, so that one that was overheard is not sent again next year.
SECONDS_VALID = 300
HUB_SECRET = "X-Webhook-Secret"
SIGNATURE, DELIVERY, TIME = "X-MLflow-Signature", "X-MLflow-Delivery-Id", "X-MLflow-Timestamp"
HEADERS = (HUB_SECRET, SIGNATURE, DELIVERY, TIME)


class BadDelivery(Exception):
    """A request that is not acted upon.

    Attributes:
        status: HTTP's word for it, 400 or 401.
    """

    def __init__(self, status: int, reason: str) -> None:
        """Keep both; the reason holds nothing of the request."""
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Delivery:
    """What a webhook told: this model has changed.

    Attributes:
        source: who told.
        model: ``org/name`` of the hub, or the name of a registered model.
    """

    source: Literal["hub", "MLflow"]
    model: str

    def concerns(self, recipe: Recipe) -> bool:
        """Whether a recipe's base is this model."""
        if self.source == "hub":
            return recipe.model.hub == self.model
        named = (recipe.model.registered or "").removeprefix("models:/")
        return named.replace("@", "/").partition("/")[0] == self.model


def read_secrets() -> dict[str, bytes]:
    """Return the secrets that are set: who tells -> secret.

    Raises:
        WatchError: if there is none, or one is too short to be one.
    """
    given = {source: os.environ.get(name, "") for source, name in VARIABLES.items()}
    secrets = {source: secret.encode() for source, secret in given.items() if secret}
    if not secrets:
        raise WatchError(f"no secret to check webhooks with: set {' or '.join(VARIABLES.values())}")
    for source, secret in secrets.items():
        if len(secret) < 16:
            raise WatchError(f"{VARIABLES[source]} is shorter than 16 characters; make one: openssl rand -hex 32")
    return secrets


def read_delivery(headers: Mapping[str, str], body: bytes, secrets: Mapping[str, bytes], now: float) -> Delivery | None:
    """Check who sent a request and read which model it tells of.

    Args:
        headers: of the request, those of `HEADERS` that it has.
        body: of the request.
        secrets: of `read_secrets`.
        now: seconds since the epoch.

    Returns:
        The model that changed; None if it tells of something else, e.g. a discussion.

    Raises:
        BadDelivery: 401 if it is not from who it says, 400 if it cannot be read.
    """
    if headers.get(HUB_SECRET) is not None:
        _check_hub(headers, secrets)
        return _read_hub(_parse(body))
    if headers.get(SIGNATURE) is not None:
        _check_mlflow(headers, body, secrets, now)
        return _read_mlflow(_parse(body))
    raise BadDelivery(401, f"neither {HUB_SECRET} nor {SIGNATURE}")


def _check_hub(headers: Mapping[str, str], secrets: Mapping[str, bytes]) -> None:
    given, secret = headers[HUB_SECRET].encode("utf-8", "surrogateescape"), secrets.get("hub")
    if secret is None or not hmac.compare_digest(given, secret):
        raise BadDelivery(401, "not the hub's secret" if secret else f"{VARIABLES['hub']} is not set")


def _check_mlflow(headers: Mapping[str, str], body: bytes, secrets: Mapping[str, bytes], now: float) -> None:
    secret = secrets.get("MLflow")
    if secret is None:
        raise BadDelivery(401, f"{VARIABLES['MLflow']} is not set")
    delivery, sent = headers.get(DELIVERY, ""), headers.get(TIME, "")
    signed = f"{delivery}.{sent}.".encode("utf-8", "surrogateescape") + body
    right = base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest())
    if not hmac.compare_digest(headers[SIGNATURE].encode("utf-8", "surrogateescape"), b"v1," + right):
        raise BadDelivery(401, "not MLflow's signature")
    if not (sent.isascii() and sent.isdecimal() and len(sent) < 20) or abs(now - int(sent)) > SECONDS_VALID:
        raise BadDelivery(401, f"signed more than {SECONDS_VALID} s ago, or by another clock")


def _parse(body: bytes) -> dict[str, Any]:
    try:
        found = parse_json(body)
    except ValueError:
        raise BadDelivery(400, "the body is no JSON") from None
    if not isinstance(found, dict):
        raise BadDelivery(400, "the body is no JSON object")
    return found


def _read_hub(body: Mapping[str, Any]) -> Delivery | None:
    try:
        kind, name, scope = body["repo"]["type"], body["repo"]["name"], body["event"]["scope"]
    except (LookupError, TypeError):
        raise BadDelivery(400, "the body lacks repo.type, repo.name or event.scope") from None
    if kind != "model" or not str(scope).startswith("repo.content"):
        return None
    return Delivery("hub", str(name))


def _read_mlflow(body: Mapping[str, Any]) -> Delivery | None:
    try:
        entity, name = body["entity"], body["data"]["name"]
    except (LookupError, TypeError):
        raise BadDelivery(400, "the body lacks entity or data.name") from None
    return Delivery("MLflow", str(name)) if str(entity).startswith("model_version") else None
