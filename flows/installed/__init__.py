"""The orchestrated half as it is installed: what the entry points of `mka.commands` name.

Installed as the package ``mka_flows``, so that nothing called ``flows`` or ``tasks`` lies at the top level of an
environment. Their source is found in both layouts: of a checkout this file is ``flows/installed/__init__.py``, of a
wheel it is ``mka_flows/__init__.py``, beside ``flows/`` and ``tasks/``. It imports nothing but click, so that
`mka --help` stays quick.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import click

# Command -> its line in `mka --help`. It is the object of that name in the module of that name in flows/cli.
COMMANDS = {
    "run": "Recompress a model: all stages, the gate, the registry.",
    "watch": "Start a recompression where a base model has changed.",
    "promote": "Make a registered version champion.",
    "rollback": "Make the champion before champion again.",
    "status": "Show a registered model, the servers, the last run.",
    "index": "Write the page of all recompressions.",
    "ci": "Recompress as a job of CI: a line per stage, a summary, outputs.",
    "registry-sign": "Sign what the registry holds of a version.",
    "registry-publish": "Send a registered version to a model hub.",
    "sweep": "Compare methods side by side, cells as tasks.",
    "up": "Start the local servers and a worker.",
    "down": "Stop the servers that `mka up` started.",
}
# Those of a module with another name.
MODULES = {"up": "servers", "down": "servers"}


def find_flows() -> None:
    """Make the packages ``flows`` and ``tasks`` importable, unless they are already: a checkout on the path wins."""
    spec = importlib.util.find_spec("flows")
    places = (spec.submodule_search_locations if spec else None) or ()
    if any(Path(place, "cli", "run.py").is_file() for place in places):
        return
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here if (here / "flows").is_dir() else here.parents[1]))
    sys.modules.pop("flows", None)  # somebody else's of the same name
    sys.modules.pop("tasks", None)


def enter_checkout() -> dict[str, str]:
    """Change into the project's root: the pull step of every deployment, see `tasks.machine.workplace`."""
    find_flows()
    from tasks.machine import workplace

    return workplace.enter_checkout()


def dask_setup(worker: Any) -> None:
    """Make a Dask worker ready for cells: what ``dask worker --preload mka_flows`` calls."""
    find_flows()
    importlib.import_module("flows")


class Later(click.Command):
    """A command that stands in the list of commands, and is imported when it is used."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Import the command and have it read its arguments."""
        find_flows()
        name = str(self.name).replace("-", "_")
        command = getattr(importlib.import_module(f"flows.cli.{MODULES.get(name, name)}"), name)
        context: click.Context = command.make_context(info_name, args, parent, **extra)
        return context


def __getattr__(name: str) -> click.Command:
    """Hand on a command by the name its entry point says, dashes as underscores."""
    command = name.replace("_", "-")
    if command not in COMMANDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return Later(command, short_help=COMMANDS[command])
