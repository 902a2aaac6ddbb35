"""Who is champion: the alias moves of a registered model, each with who, when and why.

`candidate` is what was registered last, `champion` what is in use, `previous` the champion before that. A move is
written as a tag ``move.TIME`` of the version it leads to, and announced as a Prefect event ``model.promoted`` or
``model.rolled-back`` of the resource ``mka.model.NAME``.
"""

import getpass
import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from mka.errors import PromotionError, RegistryError
from tasks.machine.workplace import Workplace
from tasks.registry.held import fetch_back
from tasks.registry.tracking import CANDIDATE, CHAMPION, COMPLETE, PREVIOUS, connect_registry, hold_registered

MOVE = "move."


@dataclass(frozen=True)
class Move:
    """One move of the alias "champion".

    Attributes:
        action: what was asked for.
        model: registered model.
        old: champion before; None if there was none.
        new: champion after.
        who: who asked.
        when: UTC, ISO 8601.
        why: the reason given, or what the gate said.
    """

    action: Literal["promote", "rollback"]
    model: str
    old: str | None
    new: str
    who: str
    when: str
    why: str


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of a registered model.

    Attributes:
        uri: the store.
        model: registered model.
        version: its number.
        run_id: the MLflow run that holds its evidence.
        tags: what it came from (`tasks.registry.record`).
    """

    uri: str
    model: str
    version: str
    run_id: str
    tags: Mapping[str, str]

    @property
    def label(self) -> str:
        """What a person calls it."""
        return f"{self.model} version {self.version}"


def read_aliases(uri: str, model: str) -> dict[str, str]:
    """Return alias -> version of a registered model.

    Raises:
        RegistryError: if the store cannot be reached or has no such model.
    """
    with connect_registry(uri) as client:
        return _read_aliases(client, model)


def _read_aliases(client: Any, model: str) -> dict[str, str]:
    found = client.search_registered_models(f"name = '{model}'")
    if not found:
        known = sorted(m.name for m in client.search_registered_models(max_results=20))
        raise RegistryError(
            f"registry {client.tracking_uri} has no model {model!r}; it has: {', '.join(known) or 'none'}"
        )
    # The search leaves aliases out in some stores; reading one model never does.
    return {name: str(version) for name, version in client.get_registered_model(model).aliases.items()}


def read_version(uri: str, model: str, version: str) -> RegisteredVersion:
    """Return a registered version.

    Raises:
        RegistryError: if it is not there, or was never completely registered.
    """
    with connect_registry(uri) as client:
        found = {str(v.version): v for v in client.search_model_versions(f"name = '{model}'")}
        if version not in found:
            known = ", ".join(sorted(found, key=int)) or "none"
            raise RegistryError(f"{model} has no version {version} in registry {uri}; versions: {known}")
        tags = dict(found[version].tags)
        if tags.get(COMPLETE) != "true":
            raise RegistryError(f"{model} version {version} was not registered to its end; run its recipe again")
        return RegisteredVersion(uri, model, version, found[version].run_id, tags)


def find_alias(uri: str, model: str, alias: str) -> RegisteredVersion:
    """Return the version that an alias points at.

    Raises:
        RegistryError: if there is no such model or alias, or its version was never completely registered.
    """
    aliases = read_aliases(uri, model)
    if alias not in aliases:
        known = ", ".join(f"{name} = version {number}" for name, number in sorted(aliases.items())) or "none"
        raise RegistryError(f"{model} has no alias {alias!r}; aliases: {known}")
    return read_version(uri, model, aliases[alias])


def find_reign(version: RegisteredVersion) -> str | None:
    """Return the newest version that holds the same model and was champion once; None if it never was.

    Raises:
        RegistryError: if the store cannot be reached.
    """
    digest = version.tags.get("candidate_digest")
    with connect_registry(version.uri) as client:
        found = client.search_model_versions(f"name = '{version.model}'")
    same = [v for v in found if v.tags.get("candidate_digest") == digest and any(t.startswith(MOVE) for t in v.tags)]
    return str(max(same, key=lambda v: int(v.version)).version) if same else None


@contextmanager
def fetch_version(place: Workplace, version: RegisteredVersion) -> Iterator[Path]:
    """Yield a local folder with the model of a version, compared with the digest it was registered under.

    Raises:
        RegistryError: if it cannot be had, or is altered.
    """
    with ExitStack() as kept:
        with connect_registry(version.uri):
            digest = version.tags.get("candidate_digest", "")
            fetched = kept.enter_context(fetch_back(place, version.model, version.version, digest))
        yield fetched


def name_person(approver: str | None = None) -> str:
    """Say who asks: who stands for it, if somebody was named, and user and machine that run this."""
    runner = f"{getpass.getuser()}@{socket.gethostname()}"
    return f"{approver} (run by {runner})" if approver else runner


def move_champion(
    version: RegisteredVersion,
    *,
    expected: str | None,
    action: Literal["promote", "rollback"],
    who: str,
    why: str,
) -> Move | None:
    """Point "champion" at a version and "previous" at the one before, and leave a record of it.

    Args:
        version: the champion to be.
        expected: the champion the decision was made against; None if there was none.
        action: what was asked for.
        who: who asked.
        why: the reason.

    Returns:
        The move; None if the champion is no longer the expected one, and then nothing was changed.

    Raises:
        RegistryError: if the store cannot be reached.
    """
    with hold_registered(version.uri, version.model, "promotion"), connect_registry(version.uri) as client:
        if _read_aliases(client, version.model).get(CHAMPION) != expected:
            return None
        now = datetime.now(UTC)
        move = Move(action, version.model, expected, version.version, who, now.isoformat(timespec="seconds"), why)
        record = {"alias": CHAMPION, "action": action, "from": expected, "to": version.version}
        record |= {"who": who, "when": move.when, "why": why}
        # The record first: killed between the two, the champion is where it was and the record says who tried.
        client.set_model_version_tag(
            version.model, version.version, f"{MOVE}{now:%Y%m%dT%H%M%S.%fZ}", json.dumps(record)
        )
        if expected is not None:
            client.set_registered_model_alias(version.model, PREVIOUS, expected)
        client.set_registered_model_alias(version.model, CHAMPION, version.version)
    announce(move)
    return move


def announce(move: Move) -> None:
    """Emit the Prefect event that says so."""
    from prefect.events import emit_event

    emit_event(
        event="model.promoted" if move.action == "promote" else "model.rolled-back",
        resource={"prefect.resource.id": f"mka.model.{move.model}", "prefect.resource.name": move.model},
        payload=asdict(move),
    )


def find_previous(uri: str, model: str) -> tuple[str, RegisteredVersion]:
    """Return the champion and the version it replaced.

    Raises:
        PromotionError: if there is nothing to go back to.
    """
    aliases = read_aliases(uri, model)
    champion, previous = aliases.get(CHAMPION), aliases.get(PREVIOUS)
    if champion is not None and previous == champion:
        # A move was killed between its two aliases; what made the champion one knows whom it replaced.
        previous = _read_replaced(read_version(uri, model, champion))
    if champion is None or previous is None:
        known = ", ".join(f"{alias} = version {number}" for alias, number in sorted(aliases.items())) or "no alias"
        raise PromotionError(f"{model} has no previous champion to go back to ({known}); promote a version instead")
    return champion, read_version(uri, model, previous)


def _read_replaced(champion: RegisteredVersion) -> str | None:
    """Return the version that was champion before; None if there was none, or no record says so."""
    moves = sorted(name for name in champion.tags if name.startswith(MOVE))
    replaced = json.loads(champion.tags[moves[-1]]).get("from") if moves else None
    return replaced if replaced != champion.version else None


def find_candidate(uri: str, model: str) -> RegisteredVersion:
    """Return the version "candidate" points at.

    Raises:
        PromotionError: if there is none.
    """
    aliases = read_aliases(uri, model)
    if CANDIDATE not in aliases:
        raise PromotionError(f"{model} has no candidate; name a version, or run its recipe")
    return read_version(uri, model, aliases[CANDIDATE])
