"""What goes to the registry and what it holds: a folder made for it, and the same files fetched back and compared."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mka.errors import RegistryError
from mka.export.folder import export_folder
from mka.pipeline.holding import refuse_other
from mka.pipeline.stage import MODEL_FOLDER
from tasks.machine.workplace import Workplace

CARD = "README.md"


@contextmanager
def lay_out(place: Workplace, model: Path, card: Path, digest: str) -> Iterator[Path]:
    """Yield a folder with the files of a stored model and its card, for as long as it is sent.

    The store stays as it is. Files are links where the file system has them, so a large model costs no room.

    Args:
        place: says where; beside the store.
        model: the stored folder.
        card: goes with it under its own name.
        digest: what was measured.

    Raises:
        RegistryError: if the stored folder is not what was measured.
    """
    with _make_aside(place, "send") as aside:
        folder = aside / MODEL_FOLDER  # MLflow keeps the name
        folder.mkdir()
        export_folder(model, folder, copy=_link_file)
        shutil.copyfile(card, folder / CARD)
        remedy = "remove the folder, run its recipe again"
        refuse_other(folder, digest, f"candidate in {model}", remedy, refusal=RegistryError)
        yield folder


@contextmanager
def fetch_back(place: Workplace, model: str, version: str, digest: str) -> Iterator[Path]:
    """Yield a local folder with what the registry holds of a version; to be called while connected to it.

    Args:
        place: says where.
        model: registered model.
        version: its number.
        digest: what it has to be.

    Raises:
        RegistryError: if it holds anything else.
    """
    import mlflow

    with _make_aside(place, "version") as aside:
        address = f"models:/{model}/{version}/artifacts/model"
        fetched = Path(mlflow.artifacts.download_artifacts(address, dst_path=str(aside)))
        remedy = "its files were changed in the registry, run its recipe again"
        held = f"{model} version {version}"
        refuse_other(fetched, digest, held, remedy, was="registered", refusal=RegistryError)
        yield fetched


@contextmanager
def _make_aside(place: Workplace, kind: str) -> Iterator[Path]:
    folder, here = place.work / "registry", socket.gethostname()
    folder.mkdir(parents=True, exist_ok=True)
    _remove_left(folder, here)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{kind}@{here}@{os.getpid()}-") as aside:
        yield Path(aside)


def _remove_left(folder: Path, here: str) -> None:
    """Remove what processes of this machine left that were killed."""
    import psutil

    for left in folder.glob(f".*@{here}@*"):
        pid = left.name.split("@")[2].partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _link_file(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
