"""What state a version is in once a run has ended, what moves it, and which champion stands beside it."""

import shlex
from typing import Any

from mka.report.index import Recompression, format_bounds
from tasks.registry.index import History
from tasks.registry.record import Registration
from tasks.registry.tracking import CANDIDATE, CHAMPION, registered_address


def describe_state(registration: Registration, history: History) -> dict[str, Any]:
    """Return what last_run.json, the terminal and the run's page tell of a version; JSON-able.

    Returns:
        ``state`` ("champion", "candidate" or "none"), ``address`` of the very version (None where the gate refused it),
        ``champion`` in words, and the commands ``promote`` and ``rollback``, which are None where nothing was
        registered.
    """
    name, version = registration.name, registration.version
    if name is None or version is None:
        return {"state": "none", "address": None, "champion": None, "promote": None, "rollback": None}
    state = next((alias for alias in (CHAMPION, CANDIDATE) if alias in registration.aliases), "none")
    champion = next((row for row in history.rows if row.name == name and row.is_champion), None)
    return {
        "state": state,
        "address": registered_address(name, version),
        "champion": describe_champion(champion, version),
        "promote": f"mka promote {shlex.quote(name)} --version {version} --because TEXT",
        "rollback": f"mka rollback {shlex.quote(name)} --because TEXT",
    }


def describe_champion(champion: Recompression | None, version: str) -> str:
    """Say which version is champion, and what it keeps and takes."""
    if champion is None:
        return "none yet"
    which = "this version" if champion.version == version else f"version {champion.version}"
    told = [f"{which}: {champion.method}, {champion.layers_in} → {champion.layers_out} layers"]
    if champion.size is not None:
        told.append(f"{champion.size / 1e6:,.1f} MB")
    if (worst := champion.worst) is not None:
        told.append(f"keeps {worst.value:.3f} {format_bounds(worst)} of {worst.label}")
    return ", ".join(told)
