"""Webhooks: who is believed, what is looked at, and what a stranger can do."""

import http.client
import json
import time
from types import SimpleNamespace

import pytest

from flows.listen import Receiver, listen, receiving
from mka.errors import WatchError
from tasks.machine.workplace import Workplace
from tasks.webhooks import LONGEST_BODY, BadDelivery, Delivery, read_delivery, read_secrets

SECRETS = {"hub": b"the hub's own secret", "MLflow": b"the secret of MLflow"}
PUSHED = {"event": {"action": "update", "scope": "repo.content"}, "repo": {"type": "model", "name": "org/base"}}
MOVED = {"entity": "model_version_alias", "action": "created", "data": {"name": "base", "alias": "champion"}}


def encode(body) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def from_hub(body=PUSHED, secret="the hub's own secret"):
    return {"X-Webhook-Secret": secret}, encode(body)


def from_mlflow(body=MOVED, secret="the secret of MLflow", sent=None, signed=None):
    """As MLflow itself signs."""
    from mlflow.webhooks.delivery import _generate_hmac_signature

    sent = str(int(time.time())) if sent is None else sent
    signature = _generate_hmac_signature(secret, "d-1", sent, encode(signed or body).decode())
    headers = {"X-MLflow-Signature": signature, "X-MLflow-Delivery-Id": "d-1", "X-MLflow-Timestamp": sent}
    return headers, encode(body)


def read(request):
    return read_delivery(*request, SECRETS, time.time())


def test_the_hub_and_mlflow_are_believed_and_read():
    assert read(from_hub()) == Delivery("hub", "org/base")
    assert read(from_mlflow()) == Delivery("MLflow", "base")
    assert read(from_hub(PUSHED | {"event": {"action": "create", "scope": "discussion.comment"}})) is None
    assert read(from_hub(PUSHED | {"repo": {"type": "dataset", "name": "org/base"}})) is None
    assert read(from_mlflow({"entity": "prompt", "action": "created", "data": {"name": "base"}})) is None


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (lambda: ({}, encode(PUSHED)), 401),
        (lambda: from_hub(secret="the hub's own secreT"), 401),
        (lambda: from_hub(secret=""), 401),
        (lambda: from_hub(secret="gehéim"), 401),
        (lambda: from_mlflow(secret="the hub's own secret"), 401),
        (lambda: from_mlflow(signed={"entity": "model_version", "data": {"name": "other"}}), 401),
        (lambda: from_mlflow(sent=str(int(time.time()) - 3600)), 401),
        (lambda: from_mlflow(sent="soon"), 401),
        (lambda: from_hub(b"\xff{"), 400),
        (lambda: from_hub(b"[" * 100_000), 400),
        (lambda: from_hub([]), 400),
        (lambda: from_hub({"repo": "org/base"}), 400),
        (lambda: from_mlflow({"entity": "model_version", "data": None}), 400),
    ],
)
def test_others_are_not(request_, status):
    with pytest.raises(BadDelivery) as refused:
        read(request_())
    assert refused.value.status == status
    assert not any(secret.decode() in str(refused.value) for secret in SECRETS.values())


def test_a_sender_whose_secret_is_not_set_is_not_believed():
    headers, body = from_mlflow()
    with pytest.raises(BadDelivery, match="MKA_MLFLOW_WEBHOOK_SECRET is not set"):
        read_delivery(headers, body, {"hub": SECRETS["hub"]}, time.time())


def test_secrets_are_those_of_the_environment(monkeypatch):
    for name in ("MKA_HUB_WEBHOOK_SECRET", "MKA_MLFLOW_WEBHOOK_SECRET"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(WatchError, match="set MKA_HUB_WEBHOOK_SECRET or MKA_MLFLOW_WEBHOOK_SECRET"):
        read_secrets()
    monkeypatch.setenv("MKA_HUB_WEBHOOK_SECRET", "short")
    with pytest.raises(WatchError, match="shorter than 16") as refused:
        read_secrets()
    assert "short;" not in str(refused.value)
    monkeypatch.setenv("MKA_HUB_WEBHOOK_SECRET", "x" * 32)
    assert read_secrets() == {"hub": b"x" * 32}


@pytest.mark.parametrize(
    ("model", "delivery", "expected"),
    [
        ({"hub": "org/base"}, Delivery("hub", "org/base"), True),
        ({"hub": "org/base-2"}, Delivery("hub", "org/base"), False),
        ({"registered": "models:/base@champion"}, Delivery("MLflow", "base"), True),
        ({"registered": "models:/base/3"}, Delivery("MLflow", "base"), True),
        ({"registered": "models:/base-2@champion"}, Delivery("MLflow", "base"), False),
        ({"registered": "models:/base@champion"}, Delivery("hub", "base"), False),
        ({"hub": "org/base"}, Delivery("MLflow", "org/base"), False),
    ],
)
def test_a_delivery_concerns_the_recipes_of_its_model(model, delivery, expected):
    recipe = SimpleNamespace(model=SimpleNamespace(**{"hub": None, "registered": None, **model}))
    assert delivery.concerns(recipe) is expected


def post(receiver: Receiver, headers, body, *, method="POST"):
    connection = http.client.HTTPConnection(*receiver.server_address[:2], timeout=10)
    try:
        connection.request(method, "/", body, headers)
        return connection.getresponse().status
    finally:
        connection.close()


def test_a_server_answers_and_says_one_line_of_what_it_refuses(capsys):
    with receiving(("127.0.0.1", 0), SECRETS) as receiver:
        assert post(receiver, *from_hub()) == 202
        assert receiver.deliveries.get(timeout=5) == Delivery("hub", "org/base")
        assert post(receiver, *from_hub(PUSHED | {"event": {"scope": "discussion"}})) == 200
        assert capsys.readouterr().err == ""
        assert post(receiver, *from_hub(secret="wrong")) == 401
        (line,) = capsys.readouterr().err.splitlines()
        assert line == "webhook from 127.0.0.1: 401, not the hub's secret"
        assert post(receiver, {**from_hub()[0], "Content-Length": str(LONGEST_BODY + 1)}, b"") == 400
        assert post(receiver, from_hub()[0], b"{") == 400
        assert post(receiver, {}, b"", method="GET") == 501
        for _ in range(receiver.deliveries.maxsize):
            receiver.deliveries.put(Delivery("hub", "org/base"))
        assert post(receiver, *from_hub()) == 503


def test_what_a_webhook_concerns_is_looked_at_and_a_look_that_fails_stops_nothing(monkeypatch, tmp_path, capsys):
    bases = {"a.yaml": "org/base", "b.yaml": "org/other"}
    monkeypatch.setattr(
        "flows.listen.load_recipe",
        lambda path: SimpleNamespace(model=SimpleNamespace(hub=bases[path.name], registered=None)),
    )
    looked, servers = [], []
    monkeypatch.setattr(Receiver, "server_activate", lambda self: (servers.append(self), self.socket.listen())[0])

    def look(recipes):
        looked.append(recipes)
        if len(looked) == 1:
            assert post(servers[0], *from_hub()) == 202
            assert post(servers[0], *from_hub(PUSHED | {"repo": {"type": "model", "name": "org/unknown"}})) == 202
            assert post(servers[0], *from_hub(PUSHED | {"repo": {"type": "model", "name": "org/other"}})) == 202
        elif len(looked) == 2:
            raise WatchError("the registry is away")
        else:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        listen(Workplace(tmp_path, tmp_path), list(bases), look, ("127.0.0.1", 0), SECRETS)
    assert looked == [["a.yaml", "b.yaml"], ["a.yaml"], ["b.yaml"]]
    said = capsys.readouterr().err
    assert "the registry is away" in said and "hub says that org/unknown has changed: 0 recipes concerned" in said
