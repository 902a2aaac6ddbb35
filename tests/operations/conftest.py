"""The servers of `make up`, a tiny model recompressed on them, and a browser that talks to this machine only."""

import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# Before anything imports Prefect: its settings are read once.
os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")

import pytest
from support.project import Project
from support.servers import LOCAL, ROOT, SECONDS, ask, free_port, run_module

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")


@dataclass(frozen=True)
class Stack:
    """Where everything is that a page can be opened of.

    Attributes:
        prefect, mlflow: addresses of the servers.
        project: the tiny project.
        environment: what commands of an operator need to find all of it.
        index: the page of all recompressions.
        facts: last_run.json of the one run.
        flow_run: its id in Prefect.
        aliases: alias -> version of the registered model.
        watched: what `prefect deployment run --watch` printed about the run.
    """

    prefect: str
    mlflow: str
    project: Any
    environment: dict[str, str]
    index: Path
    facts: dict[str, Any]
    flow_run: str
    aliases: dict[str, str]
    watched: str

    @property
    def work(self) -> Path:
        """The work folder."""
        return self.project.work

    def run_deployment(self, recipe: Path) -> subprocess.CompletedProcess[str]:
        """Type what CI types."""
        return run_deployment(self.environment, recipe)

    def read_aliases(self) -> dict[str, dict[str, str]]:
        """Registered model -> alias -> version."""
        return read_aliases(self.mlflow)


def run_deployment(environment: dict[str, str], recipe: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.prefix) / "bin" / "prefect"
    command = [program, "deployment", "run", "recompress/default", "--param", f"recipe={recipe}", "--watch"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)


@dataclass
class Seen:
    """What a page asked for and complained about while it was open."""

    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def outside(self) -> list[str]:
        """Requests that would have left the machine."""
        return [url for url in self.requests if not is_local(url)]


def is_local(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("file", "data", "blob", "about") or parts.hostname in LOCAL


@pytest.fixture(scope="module")
def executable() -> str:
    """The installed browser; Playwright's own is never downloaded."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on PATH")
    return found


@pytest.fixture(scope="session")
def stack(tmp_path_factory):
    """The servers of `make up` on free ports, and one recompression of a tiny model by their worker."""
    folder = tmp_path_factory.mktemp("operations")
    project = Project(folder)
    ports = {name: str(free_port()) for name in ("MKA_PREFECT_PORT", "MKA_MLFLOW_PORT")}
    environment = os.environ | ports | {"MKA_WORK": str(project.work), "PREFECT_HOME": str(folder / "prefect")}
    environment |= {"PREFECT_CLI_WRAP_LINES": "false", "NO_PROXY": ",".join(LOCAL)}
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"):
        environment.pop(name, None)
    prefect, mlflow = (f"http://127.0.0.1:{port}" for port in ports.values())
    environment["PREFECT_API_URL"] = f"{prefect}/api"
    try:
        run_module(environment, "flows.servers", "up")
        watched = run_deployment(environment, project.write_recipe())
        assert watched.returncode == 0, watched.stdout + watched.stderr
        # The run's own page knows no server; this one links to it.
        index = Path(run_module(environment, "flows.index", "--registry", mlflow).strip())
        assert index == project.work / "index.html"
        # Other tests recompress beside it, and each run writes the page of all runs again.
        of_one = index.with_name("index-of-one.html")
        shutil.copyfile(index, of_one)
        facts = project.last_run
        runs = ask(f"{prefect}/api/flow_runs/filter", {"flow_runs": {"name": {"any_": [facts["run"]]}}})
        aliases = read_aliases(mlflow)[facts["registered_name"]]
        flow_run = runs[0]["id"]
        yield Stack(prefect, mlflow, project, environment, of_one, facts, flow_run, aliases, watched.stdout)
    finally:
        run_module(environment, "flows.servers", "down")


def read_aliases(mlflow: str) -> dict[str, dict[str, str]]:
    from mlflow import MlflowClient

    registered = MlflowClient(mlflow, mlflow).search_registered_models()
    return {model.name: {alias: str(version) for alias, version in model.aliases.items()} for model in registered}


@pytest.fixture(scope="module")
def browser(executable):
    from playwright.sync_api import sync_playwright

    # Module scope: while it runs, this thread has an event loop that other tests could not start theirs beside.
    root = ("--no-sandbox",) if hasattr(os, "geteuid") and os.geteuid() == 0 else ()
    # Whatever a page asks for elsewhere finds no address, and so does the browser itself.
    closed = f"--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE {LOCAL[0]} , EXCLUDE {LOCAL[1]}"
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=executable, args=[*QUIET, *root, closed, "--no-proxy-server"]
        )
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def shots(tmp_path_factory) -> Path:
    """Where screenshots go: `MKA_SCREENSHOTS`, or a temporary folder."""
    named = os.environ.get("MKA_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("shots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def open_page(browser):
    """Open an address in a fresh window; returns the page and what it asked for."""
    with ExitStack() as windows:

        def open_one(address: str, scheme: str = "light", width: int = 1280, height: int = 900) -> tuple[Any, Seen]:
            window = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height})
            windows.callback(window.close)
            page, seen = window.new_page(), Seen()
            page.set_default_timeout(60_000)
            page.on("request", lambda request: seen.requests.append(request.url))
            page.on("pageerror", lambda error: seen.errors.append(str(error)))
            page.on("console", lambda m: seen.errors.append(m.text) if m.type == "error" else None)
            page.goto(address, wait_until="domcontentloaded")
            return page, seen

        yield open_one
