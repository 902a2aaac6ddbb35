"""Start and stop the local servers: Prefect, MLflow, and a worker that runs the deployments of prefect.yaml.

mka up
mka down
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial

from flows.cli.console import run_program
from mka.terminal import Outcome
from tasks.machine.servers import POOL, PORTS, Server, Servers, address_of, refuse_taken
from tasks.machine.workplace import find_workplace
from tasks.registry.tracking import find_page


def describe(servers: Mapping[str, Server]) -> str:
    """Say where everything is, aligned."""
    from tabulate import tabulate

    shown = {s.name: s.address or "runs deployments of pool " + POOL for s in servers.values()}
    if "mlflow" in shown:
        shown["mlflow"] = find_page(shown["mlflow"], "experiments") or shown["mlflow"]
    rows = [(s.name, shown[s.name], f"pid {s.pid}", s.log) for s in servers.values()]
    return tabulate(rows, tablefmt="plain")


def list_servers() -> Outcome:
    """Say what runs."""
    running = Servers(find_workplace()).read()
    return Outcome(as_document(running), describe({server.name: server for server in running}) or "nothing runs")


def start_servers(dry_run: bool = False) -> Outcome:
    """Start what does not run yet; say where everything is.

    Args:
        dry_run: only say what would be started, and refuse what starting would refuse.

    Raises:
        ServerError: if a port is taken or a server does not answer.
    """
    servers = Servers(find_workplace())
    if dry_run:
        return _foresee_start(servers)
    running = {server.name: server for server in servers.up()}
    lines = [
        describe(running),
        "\nfrom another terminal, in this folder:",
        f"  export PREFECT_API_URL={running['prefect'].address}/api",
        f"  export MLFLOW_TRACKING_URI={running['mlflow'].address}",
        "  mka ci recipes/smollm2_135m.yaml",
        "  prefect deployment schedule resume --all    # the watch looks every hour; it is off so far",
        "stop them: mka down",
    ]
    return Outcome(as_document(running.values()), "\n".join(lines))


def _foresee_start(servers: Servers) -> Outcome:
    running = {server.name: server for server in servers.read()}
    missing = [name for name in (*PORTS, "worker") if name not in running]
    for name in PORTS:
        if name in missing:
            refuse_taken(name)
    wanted = {name: address_of(name) if name in PORTS else "" for name in missing}
    lines = [f"would start {name}" + (f" at {address}" if address else "") for name, address in wanted.items()]
    document = as_document(running.values()) | {"would_start": wanted}
    return Outcome(document, "\n".join([*lines, "dry run: nothing was started"]))


def stop_servers(dry_run: bool = False) -> Outcome:
    """Stop what was started here.

    Args:
        dry_run: only say what would be stopped.
    """
    servers = Servers(find_workplace())
    if dry_run:
        found, done, key, end = servers.read(), "would stop", "would_stop", ["dry run: nothing was stopped"]
    else:
        found, done, key, end = servers.down(), "stopped", "stopped", []
    lines = [f"{done} {server.name} (pid {server.pid})" for server in found] or ["nothing runs"]
    return Outcome({key: as_document(found)["servers"]}, "\n".join([*lines, *end]))


def as_document(servers: Iterable[Server]) -> dict[str, list[dict[str, object]]]:
    """Return servers for machines."""
    return {"servers": [asdict(server) for server in servers]}


main = partial(run_program, "servers", "servers:servers")

if __name__ == "__main__":
    sys.exit(main())
