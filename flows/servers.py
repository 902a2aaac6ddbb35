"""Start and stop the local servers: Prefect, MLflow, and a worker that runs the deployments of prefect.yaml.

python -m flows.servers up
python -m flows.servers down
"""

import sys
from collections.abc import Mapping, Sequence

from flows.command_line import run_command
from tasks.machine.servers import POOL, Server, Servers
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Start, stop or list the servers; refusals are one line on stderr and a non-zero exit."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="python -m flows.servers",
        description="Local Prefect server, MLflow server and worker, on this machine's own address only.",
        epilog="ports: MKA_PREFECT_PORT (4200), MKA_MLFLOW_PORT (5000). Logs and records: servers/ in the work folder.",
    )
    parser.add_argument("action", choices=["up", "down", "status"], help="start, stop, or say what runs")
    given = parser.parse_args(arguments)
    return run_command("servers", lambda: act(given.action), is_flow=False)


def act(action: str) -> None:
    """Do one of the actions and print what came of it."""
    servers = Servers(find_workplace())
    if action == "up":
        running = {server.name: server for server in servers.up()}
        print(describe(running))
        print("\nfrom another terminal, in this folder:")
        print(f"  export PREFECT_API_URL={running['prefect'].address}/api")
        print(f"  export MLFLOW_TRACKING_URI={running['mlflow'].address}")
        print("  .venv/bin/prefect deployment run recompress/default --watch")
        print("  .venv/bin/prefect deployment schedule resume --all    # the watch looks every hour; it is off so far")
        print("stop them: make down")
    elif action == "down":
        print("\n".join(f"stopped {server.name} (pid {server.pid})" for server in servers.down()) or "nothing runs")
    else:
        print(describe({server.name: server for server in servers.read()}) or "nothing runs")


if __name__ == "__main__":
    sys.exit(main())
