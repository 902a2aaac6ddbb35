"""The page of all recompressions: what the registry remembers, read and laid out. It only reads."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from mka.errors import RegistryError
from mka.evaluation.speed import LEAST, MOST
from mka.report.index import AliasMove, Recompression, Recovery, order_recoveries, write_index
from tasks.machine.workplace import Workplace
from tasks.registry.promotion import MOVE
from tasks.registry.tracking import COMPLETE, EXPERIMENT, connect_registry, find_database, find_page, registry_address

PAGE = "index.html"
# Rows asked for at a time; every search of MLflow's stores allows it.
BATCH = 100
_GATE = re.compile(r"gate/(?P<check>.+)/(?P<part>recovery|lower|upper|threshold)")


@dataclass(frozen=True)
class History:
    """What the registry remembers.

    Attributes:
        rows: every recompression that ended, registered or not.
        moves: every move of an alias that is on record.
    """

    rows: tuple[Recompression, ...] = ()
    moves: tuple[AliasMove, ...] = ()


def write_index_page(place: Workplace, tracking_uri: str | None = None) -> Path:
    """Read the registry and write ``index.html`` into the work folder; returns the page.

    Args:
        place: where the project keeps its things.
        tracking_uri: the MLflow store; if None, the one `tasks.registry.tracking.registry_address` names.

    Raises:
        RegistryError: if the registry cannot be read; the page stays as it was.
        OutputError: if the page cannot be written.
    """
    return write_history(place, read_history(place, tracking_uri))


def write_history(place: Workplace, history: History) -> Path:
    """Write what was read of a registry into the work folder; returns the page.

    Raises:
        OutputError: if the page cannot be written.
    """
    return write_index(history.rows, place.work / PAGE, history.moves)


def read_history(place: Workplace, tracking_uri: str | None = None) -> History:
    """Collect recompressions and alias moves from an MLflow store.

    A recompression is a finished run of the experiment; a version is joined to it by the run's id. A version whose run
    is gone is told by its own tags. Versions and runs of other projects in the same store are left out.

    Raises:
        RegistryError: if the registry cannot be read.
    """
    uri = tracking_uri or registry_address(place)
    if (file := find_database(uri)) is not None and not file.exists():
        # Opening it would make it; a store of one's own that nothing was ever written to is no fault.
        if uri == place.tracking_uri:
            return History()
        raise RegistryError(f"registry {uri} cannot be read: no such file; check the address")
    with connect_registry(uri) as client:
        return _collect(client)


def _collect(client: Any) -> History:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    found = [] if experiment is None else [experiment.experiment_id]
    runs = {
        run.info.run_id: run for run in _read_all(client.search_runs, found, "attributes.status = 'FINISHED'") if found
    }
    versions = [v for v in _read_all(client.search_model_versions) if v.run_id in runs or "mka.key" in v.tags]
    # A search for versions does not tell their aliases.
    aliases = {name: client.get_registered_model(name).aliases for name in {v.name for v in versions}}
    rows, moves = [], []
    for version in versions:
        own = sorted(alias for alias, at in aliases[version.name].items() if str(at) == str(version.version))
        rows.append(_describe(client, runs.get(version.run_id), version, tuple(own)))
        moves += _read_moves(version)
    registered = {version.run_id for version in versions}
    rows += [_describe(client, run, None, ()) for run_id, run in runs.items() if run_id not in registered]
    # The same move may be written on the version it left and on the one it came to.
    return History(tuple(rows), tuple(dict.fromkeys(moves)))


def _read_all(search: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
    """Yield what a search finds, page by page."""
    token = None
    while True:
        page = search(*arguments, max_results=BATCH, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _describe(client: Any, run: Any, version: Any, aliases: tuple[str, ...]) -> Recompression:
    """Make one row of a run, a version, or both; what neither has stays open."""
    tags = {**(run.data.tags if run else {}), **(version.tags if version else {})}
    metrics: Mapping[str, float] = run.data.metrics if run else {}
    params: Mapping[str, str] = run.data.params if run else {}
    chosen = params.get("registry.name")
    # What is None in a recipe is the word "None" among MLflow's parameters.
    intended = chosen if chosen and chosen != "None" else params.get("name") or tags.get("recipe", "unknown")
    return Recompression(
        base_model=tags.get("base_model", "unknown"),
        base_revision=_revision(tags),
        name=version.name if version else intended,
        version=str(version.version) if version else None,
        aliases=aliases,
        when=datetime.fromtimestamp((run.info.start_time if run else version.creation_timestamp) / 1000, UTC),
        method=tags.get("method", "unknown"),
        recipe=tags.get("recipe", ""),
        verdict=tags.get("verdict", ""),
        layers_in=_whole(metrics.get("base/layers")),
        layers_out=_whole(metrics.get("candidate/layers")),
        layer_ratio=metrics.get("layer_ratio"),
        **_read_sizes(metrics),
        decode=_read_speed(metrics, "candidate"),
        base_decode=_read_speed(metrics, "base"),
        command=_read_command(tags),
        recoveries=_read_recoveries(metrics),
        run=(run.info.run_name or run.info.run_id) if run else "",
        run_id=run.info.run_id if run else "",
        complete=version is None or tags.get(COMPLETE) == "true",
        report=_find_report(run) if run else None,
        page=_find_page(client.tracking_uri, run) if run else None,
    )


def _read_recoveries(metrics: Mapping[str, float]) -> tuple[Recovery, ...]:
    checks: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        if match := _GATE.fullmatch(key):
            checks.setdefault(match["check"], {})[match["part"]] = value
    known = ((name, parts) for name, parts in checks.items() if "recovery" in parts)
    return order_recoveries(
        Recovery(n, p["recovery"], p.get("lower"), p.get("upper"), p.get("threshold")) for n, p in known
    )


def _read_sizes(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Bytes of candidate and base, both as served or both as stored, and what is saved of them."""
    for kind in ("served_bytes", "bytes"):
        size, base_size = metrics.get(f"candidate/{kind}"), metrics.get(f"base/{kind}")
        if size and base_size:
            return {"size": size, "base_size": base_size, "size_ratio": 1 - size / base_size}
    return {"size": metrics.get("candidate/bytes"), "base_size": None, "size_ratio": metrics.get("size_ratio")}


def _read_speed(metrics: Mapping[str, float], role: str) -> tuple[float, float, float] | None:
    name = f"{role}/decode_tokens_per_second"
    if not (rate := metrics.get(name)):
        return None
    return metrics.get(name + LEAST, rate), rate, metrics.get(name + MOST, rate)


def _read_command(tags: Mapping[str, str]) -> str:
    """What was typed, where the run kept it: MLflow's own entry is the path of a program."""
    told = tags.get("mlflow.source.name", "")
    return told if told.startswith(("mka ", "python -m ")) else ""


def _read_moves(version: Any) -> list[AliasMove]:
    """Read the moves written on a version; one that cannot be read is shown as what it is, not left out."""
    moves = []
    for key, value in version.tags.items():
        if not key.startswith(MOVE):
            continue
        try:
            told = json.loads(value)
            texts = {name: None if told.get(name) is None else str(told[name]) for name in told}
        except (ValueError, AttributeError, TypeError):
            texts = {"action": "unreadable record", "why": value}
        known = {name: texts.get(name) or "–" for name in ("alias", "action", "who", "why")}
        before, after = texts.get("from"), texts.get("to")
        moves.append(AliasMove(version.name, before=before, after=after, when=_read_time(texts.get("when")), **known))
    return moves


def _read_time(text: str | None) -> datetime | None:
    """Read an ISO time; one without a zone is UTC."""
    try:
        when = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _revision(tags: Mapping[str, str]) -> str:
    """Revision of the base; of a folder, which has none, the digest of its content."""
    revision = tags.get("base_revision", "")
    return tags.get("base_digest", revision) if revision == "folder" else revision


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _find_report(run: Any) -> Path | None:
    """Find the report among the run's files, if they lie on this machine."""
    parts = urlsplit(run.info.artifact_uri or "")
    if parts.scheme not in ("", "file") or parts.netloc not in ("", "localhost") or not parts.path:
        return None
    page = Path(url2pathname(parts.path) if parts.scheme else parts.path) / "report" / "report.html"
    return page if page.is_file() else None


def _find_page(tracking_uri: str, run: Any) -> str | None:
    """Address of the run's page, if the registry is a server."""
    return find_page(tracking_uri, f"experiments/{run.info.experiment_id}/runs/{run.info.run_id}")
