"""What there is: a registered model's versions and who moved its champion, the servers, the last run. It only reads."""

import sys
from dataclasses import asdict
from functools import partial
from typing import Any

from flows.cli.console import run_program
from mka.errors import RegistryError, nearest
from mka.outside.reading import read_json
from mka.report.index import AliasMove, Recompression
from mka.terminal import Outcome, align
from tasks.machine.servers import Servers
from tasks.machine.workplace import Workplace, find_workplace
from tasks.registry.index import read_history
from tasks.registry.tracking import CHAMPION, registry_address


def read_status(model: str | None, registry: str | None = None) -> Outcome:
    """Say what the registry knows of a model, which servers run, and what the last run came to.

    Args:
        model: registered model; None: all of them, with the newest version and the champion of each.
        registry: MLflow store; default: `MLFLOW_TRACKING_URI`, else that of the work folder.

    Raises:
        RegistryError: if the registry cannot be read, or has no such model.
    """
    place = find_workplace()
    uri = registry or registry_address(place)
    history = read_history(place, uri)
    rows = [row for row in history.rows if row.version is not None]
    names = sorted({row.name for row in rows})
    if model is not None and model not in names:
        known = ", ".join(names) or "none"
        raise RegistryError(f"registry {uri} has no model {model!r}{nearest(model, names)}; it has: {known}")
    shown = [row for row in rows if row.name == model] if model else keep_newest(rows)
    shown.sort(key=lambda row: (row.name, -int(row.version or 0)))
    moves = sorted((move for move in history.moves if move.name == model), key=when_moved, reverse=True)
    servers, last = Servers(place).read(), read_last_run(place)
    document = {
        "registry": uri,
        "versions": [describe_version(row) for row in shown],
        "moves": [asdict(move) for move in moves],
        "servers": [asdict(server) for server in servers],
        "last_run": last,
    }
    parts = [tabulate_versions(shown, with_name=model is None) if shown else f"nothing is registered in {uri}"]
    parts += [tabulate_moves(moves)] if moves else []
    running = [[server.name, server.address, f"pid {server.pid}"] for server in servers]
    parts.append(f"servers\n{align(running, ['server', 'address', ''])}" if running else "servers: none run")
    parts.append(describe_last(last))
    return Outcome(document, "\n\n".join(parts))


def keep_newest(rows: list[Recompression]) -> list[Recompression]:
    """Keep of each model its newest version and its champion."""
    newest: dict[str, Recompression] = {}
    for row in sorted(rows, key=lambda row: int(row.version or 0)):
        newest[row.name] = row
    return [row for row in rows if newest[row.name] is row or CHAMPION in row.aliases]


def when_moved(move: AliasMove) -> float:
    """Return when an alias was moved, in seconds since the epoch; what has no date came first."""
    return move.when.timestamp() if move.when else 0.0


def describe_version(row: Recompression) -> dict[str, Any]:
    """Return one version for machines."""
    names = ("name", "version", "aliases", "when", "verdict", "method", "layers_in", "layers_out", "size_ratio")
    told = {name: getattr(row, name) for name in (*names, "base_model", "base_revision", "run_id", "complete")}
    recoveries = {recovery.name: recovery.value for recovery in row.recoveries}
    return {**told, "when": row.when.isoformat(timespec="seconds"), "recoveries": recoveries, "page": row.page}


def tabulate_versions(rows: list[Recompression], *, with_name: bool) -> str:
    """Lay out versions, the newest first."""
    headers = ["version", "aliases", "made", "gate", "layers", "bytes", "kept", "method", "base"]
    told = []
    for row in rows:
        kept = f"{row.recoveries[0].value:.3f} {row.recoveries[0].label}" if row.recoveries else ""
        size = "" if row.size_ratio is None else f"{100 * (1 - row.size_ratio):.0f} %"
        layers = "" if row.layers_out is None else f"{row.layers_in} -> {row.layers_out}"
        label = f"{row.name} {row.version}" if with_name else str(row.version)
        unfinished = [] if row.complete else ["not registered to its end"]
        aliases = ", ".join([*row.aliases, *unfinished])
        told.append([label, aliases, f"{row.when:%Y-%m-%d %H:%M}", row.verdict, layers, size, kept, row.method])
        told[-1].append(row.base_model)
    return align(told, headers, "lllllr")


def tabulate_moves(moves: list[AliasMove]) -> str:
    """Lay out who moved an alias, when and why, the newest move first."""
    told = []
    for move in moves:
        way = f"{move.before or 'none'} -> {move.after or 'none'}"
        when = f"{move.when:%Y-%m-%d %H:%M}" if move.when else ""
        told.append([when, move.action, f"{move.alias} {way}", move.who, move.why])
    return align(told, ["moved", "", "alias", "who", "why"])


def read_last_run(place: Workplace) -> dict[str, Any] | None:
    """Return the facts of the last run; None if there was none, or its file cannot be read."""
    try:
        facts = read_json(place.last_run)
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def describe_last(facts: dict[str, Any] | None) -> str:
    """Say what the last run here came to."""
    if facts is None:
        return "last run: none"
    what = f"{facts.get('name') or facts.get('recipe', '?')}, begun {facts.get('started', '?')}"
    verdict = f", gate {facts['verdict']}" if "verdict" in facts else ""
    why = f": {facts['error']}" if "error" in facts else ""
    report = f"\n  report {facts['report']}" if "report" in facts else ""
    return f"last run: {what}: {facts.get('status', 'unknown')}{verdict}{why}{report}"


main = partial(run_program, "status", "status:status")

if __name__ == "__main__":
    sys.exit(main())
