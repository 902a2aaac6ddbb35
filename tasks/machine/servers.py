"""The servers of one machine: Prefect, MLflow, and a worker that runs the deployments of prefect.yaml."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from mka.errors import ServerError
from mka.outside.reading import STRICT, build_from, read_json
from mka.store.publishing import write_text
from tasks.machine.automations import make_automations
from tasks.machine.workplace import Workplace
from tasks.registry.tracking import make_tables

HOST = "127.0.0.1"
PORTS = {"prefect": ("MKA_PREFECT_PORT", 4200), "mlflow": ("MKA_MLFLOW_PORT", 5000)}
HEALTH = {"prefect": "/api/health", "mlflow": "/health"}
POOL = "mka"
START_SECONDS = 180
STOP_SECONDS = 30


@dataclass(frozen=True)
class Server:
    """A process this checkout started.

    Attributes:
        name: "prefect", "mlflow" or "worker".
        pid: its process.
        created: when that process was started, seconds since the epoch; tells it from another with its number.
        address: where it listens; empty for a worker.
        log: what it says.
    """

    __pydantic_config__ = STRICT

    name: str
    pid: int
    created: float
    address: str
    log: str

    def find(self) -> Any:
        """Return the process, or None if it is gone."""
        import psutil

        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        return process if same else None


class Servers:
    """The servers of one work folder; two commands that start or stop them take turns."""

    def __init__(self, place: Workplace) -> None:
        """Name the folder of records and logs."""
        self.place, self.folder = place, place.work / "servers"
        self.record = self.folder / "servers.json"
        self.addresses = {name: address_of(name) for name in PORTS}

    def read(self) -> list[Server]:
        """Return what was started and still runs."""
        try:
            entries = [build_from(Server, entry) for entry in read_json(self.record)]
        except (OSError, ValueError, TypeError):
            return []
        return [server for server in entries if server.find() is not None]

    def write(self, servers: Sequence[Server]) -> None:
        """Replace the record in one step."""
        write_text(self.record, json.dumps([asdict(server) for server in servers], indent=2) + "\n")

    def up(self) -> list[Server]:
        """Start what does not run yet, make the work pool and the deployments; return all of them.

        Raises:
            ServerError: if a port is taken or a server does not answer; what was started for it is stopped again.
        """
        self.place.prepare()
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            running = {server.name: server for server in self.read()}
            for name, server in running.items():
                if name in self.addresses:
                    self.addresses[name] = server.address
            started: list[Server] = []
            try:
                for name in PORTS:
                    if name not in running:
                        refuse_taken(name)
                if "mlflow" not in running:
                    make_tables(self.place.tracking_uri)  # the server itself would leave them half made when killed
                for name in PORTS:
                    if name not in running:
                        running[name] = self._start(name, server_commands(self.place)[name], address_of(name))
                        started.append(running[name])
                        self.write(list(running.values()))
                for name in PORTS:
                    wait_until_healthy(running[name])
                self._deploy()
                if "worker" not in running:
                    command = [program("prefect"), "worker", "start", "--pool", POOL, "--name", f"mka-{os.getpid()}"]
                    running["worker"] = self._start("worker", command, "")
                    started.append(running["worker"])
            except BaseException:
                for server in reversed(started):
                    stop(server)
                self.write([server for server in running.values() if server not in started])
                raise
            self.write(list(running.values()))
            return list(running.values())

    def down(self) -> list[Server]:
        """Stop exactly what `up` started, the worker first; return what was stopped."""
        if not self.folder.is_dir():
            return []
        with FileLock(self.folder / ".lock"):
            servers = sorted(self.read(), key=lambda server: server.name != "worker")
            for server in servers:
                stop(server)
            self.write([])
            return servers

    def _start(self, name: str, command: Sequence[str], address: str) -> Server:
        import psutil

        log = self.folder / f"{name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                cwd=self.place.root,
                env=self._environment(of_worker=name == "worker"),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return Server(name, process.pid, psutil.Process(process.pid).create_time(), address, str(log))

    def _environment(self, of_worker: bool = False) -> dict[str, str]:
        found = server_environment(self.place, self.addresses["prefect"])
        # Its runs are to be seen on the pages of the server beside it, whatever store this terminal names.
        return found | ({"MLFLOW_TRACKING_URI": self.addresses["mlflow"]} if of_worker else {})

    def _deploy(self) -> None:
        with open_client(f"{self.addresses['prefect']}/api") as client:
            make_work_pool(client)
            make_automations(client, self.place.root)
        command = [program("prefect"), "--no-prompt", "deploy", "--all"]
        done = subprocess.run(
            command,
            cwd=self.place.root,
            env=self._environment(),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise ServerError(f"`{' '.join(command[1:])}` failed: {said[-1] if said else 'it said nothing'}")


def open_client(api: str) -> Any:
    """Return a client of the Prefect server at an address, with the password that this environment has for it."""
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.settings import get_current_settings

    password = get_current_settings().api.auth_string
    return SyncPrefectClient(api, auth_string=password.get_secret_value() if password else None)


def make_work_pool(client: Any) -> None:
    """Make the work pool unless it is there; one that an operator has changed stays as it is."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    with suppress(ObjectAlreadyExists):
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))


def program(name: str) -> str:
    """Return the path of a program of this environment."""
    return str(Path(sys.prefix) / "bin" / name)


def address_of(name: str) -> str:
    """Return where a server of this checkout listens.

    Raises:
        ServerError: if the variable that names its port holds no port.
    """
    variable, default = PORTS[name]
    port = os.environ.get(variable, str(default))
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ServerError(f"{variable} is {port!r}; allowed: a port, 1 to 65535")
    return f"http://{HOST}:{port}"


def server_commands(place: Workplace) -> dict[str, list[str]]:
    """Return how each server is started."""
    ports = {name: address_of(name).rpartition(":")[2] for name in PORTS}
    return {
        "prefect": [program("prefect"), "server", "start", "--host", HOST, "--port", ports["prefect"]],
        "mlflow": [
            *(program("mlflow"), "server", "--host", HOST, "--port", ports["mlflow"], "--workers", "1"),
            *("--backend-store-uri", place.tracking_uri, "--artifacts-destination", place.model_artifacts),
            # The same folder by its own path: else what was begun on the server only a server could go on with.
            *("--default-artifact-root", place.model_artifacts),
        ],
    }


def server_environment(place: Workplace, prefect: str) -> dict[str, str]:
    """Return the environment of servers, worker and deployments, which find the Prefect server at an address."""
    return os.environ | {
        "MKA_WORK": str(place.work),
        "PREFECT_API_URL": f"{prefect}/api",
        "PREFECT_HOME": os.environ.get("PREFECT_HOME", str(place.work / "prefect")),
        # The default keeps leases in memory: a holder that dies with the server would keep its slot for ever.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        # So that `prefect deployment run --watch` shows the run's log too.
        "PREFECT_SERVER_LOGS_STREAM_OUT_ENABLED": "true",
        "PREFECT_SERVER_LOGS_STREAM_PUBLISHING_ENABLED": "true",
        # Background jobs cost eight more processes and nothing here uses them.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }


def refuse_taken(name: str) -> None:
    """Refuse a port that something else listens on.

    Raises:
        ServerError: naming the port and the variable that names another.
    """
    import socket

    port = int(address_of(name).rpartition(":")[2])
    with socket.socket() as probe:
        if probe.connect_ex((HOST, port)) == 0:
            raise ServerError(
                f"{name}: something else listens on {HOST}:{port}; stop it, or set {PORTS[name][0]} to a free port"
            )


def wait_until_healthy(server: Server) -> None:
    """Wait until a server answers.

    Raises:
        ServerError: if it ends, or does not answer in time.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.find() is None:
            raise ServerError(f"{server.name} ended while starting; its last words are in {server.log}")
        with suppress(OSError), urllib.request.urlopen(server.address + HEALTH[server.name], timeout=5):
            return
        time.sleep(0.5)
    raise ServerError(f"{server.name} did not answer within {START_SECONDS} s; see {server.log}")


def stop(server: Server) -> None:
    """End a process and what it started; only if it is still the one that was started here."""
    import psutil

    process = server.find()
    if process is None:
        return
    family = [process, *process.children(recursive=True)]
    with suppress(psutil.NoSuchProcess):
        process.terminate()
    _, alive = psutil.wait_procs(family, timeout=STOP_SECONDS)
    for left in alive:
        with suppress(psutil.NoSuchProcess):
            left.kill()
    psutil.wait_procs(alive, timeout=5)
