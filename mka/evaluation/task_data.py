"""Data sets of tasks on a model hub: which, at which commit, and read by `datasets`."""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka.errors import RecipeError
from mka.outside.printable import describe_error
from mka.outside.reading import quote

if TYPE_CHECKING:
    from mka.evaluation.task_keys import TaskKeys

_REPOSITORY = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Names that are no repositories but ways of reading files from anywhere.
_BUILDERS = frozenset(
    (
        *("arrow", "audiofolder", "cache", "csv", "eval", "generator", "hdf5", "imagefolder", "json", "lance"),
        *("niftifolder", "pandas", "parquet", "pdffolder", "spark", "sql", "text", "videofolder", "webdataset", "xml"),
    )
)
# What a definition may tell `datasets`; files are those of the repository.
_OPTIONS = frozenset({"column_names", "data_dir", "data_files", "header"})


@dataclass(frozen=True)
class HubData:
    """A data set on a hub.

    Attributes:
        path: of its repository.
        name: of the configuration; None: its default.
        splits: that are read; the first is what is measured on.
        options: for `datasets.load_dataset`.
        revision: commit, branch or tag; None: what the hub has now.
    """

    path: str
    name: str | None
    splits: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    revision: str | None = None

    @property
    def label(self) -> str:
        """How it is called."""
        return f"{self.path}:{self.name}" if self.name else self.path


def read_hub_data(keys: "TaskKeys") -> HubData:
    """Read from a definition which data set it is about.

    Raises:
        ValueError: if it is none that a hub pins.
    """
    path, name = keys.dataset_path, keys.dataset_name
    if not isinstance(path, str) or not _REPOSITORY.fullmatch(path) or path in _BUILDERS or path.startswith("."):
        raise ValueError(f"its data set {quote(path)} is no repository of a hub, which pins what it holds")
    if not isinstance(name, str | None):
        raise ValueError(f"dataset_name is {quote(name)}; needed: the name of a configuration")
    options = dict(keys.dataset_kwargs) if isinstance(keys.dataset_kwargs, dict) else {}
    options.pop("trust_remote_code", None)  # `datasets` runs no code of a repository any more
    revision = options.pop("revision", None)
    if strange := sorted(map(str, options.keys() - _OPTIONS)):
        raise ValueError(f"dataset_kwargs.{strange[0]} is not read here")
    if (
        not isinstance(revision, str | None)
        or _leads_out(options.get("data_files"))
        or _leads_out(options.get("data_dir"))
    ):
        raise ValueError("dataset_kwargs leads out of the data set's repository")
    measured = keys.test_split or keys.validation_split
    if not measured:
        raise ValueError("it names no split to measure on")
    return HubData(path, name, tuple(sorted(keys.splits, key=lambda s: (s != measured, s))), options, revision)


def _leads_out(files: Any) -> bool:
    if isinstance(files, dict | list):
        return any(map(_leads_out, files.values() if isinstance(files, dict) else files))
    return files is not None and (
        not isinstance(files, str) or "://" in files or files.startswith("/") or ".." in files
    )


@cache
def pin_revision(data: "Pinnable") -> str:
    """Return the commit of a data set: what its hub has, or where none answers the one that was fetched last.

    Raises:
        RecipeError: if neither is to be had.
    """
    path, revision = data
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    try:
        sha = HfApi().dataset_info(path, revision=revision, timeout=30).sha
        if sha is None:
            raise ValueError("it has no commits")
        return str(sha)
    # The hub's client raises from many libraries.
    except Exception as error:
        if revision is None and (kept := list_kept(path)):
            return kept[-1]
        raise RecipeError(
            f"data set {path}: the hub's data sets cannot be fetched ({describe_error(error)}); go online once, or set "
            "evaluation.tasks_folder to local tables (dvc repro builds the project's)"
        ) from None


Pinnable = tuple[str, str | None]


def find_commit(data: HubData) -> str:
    """Return the commit that a data set is read at; refusals are those of `pin_revision`."""
    return pin_revision((data.path, data.revision))


def list_kept(path: str, name: str | None = None) -> list[str]:
    """List the commits of a data set that `datasets` keeps on this machine, the last fetched last.

    Args:
        path: of its repository.
        name: of the configuration; None: any.
    """
    folders = _list_kept_folders(_find_cache()).get(_plain(path.replace("/", "___")), [])
    kept = [place for folder in folders for place in folder.glob("*/*/*") if _COMMIT.fullmatch(place.name)]
    if name is not None:  # options make a suffix of their own
        kept = [place for place in kept if place.parts[-3] == name or place.parts[-3].startswith(f"{name}-")]
    return [place.name for place in sorted(kept, key=lambda place: place.stat().st_mtime)]


def _find_cache() -> Path:
    """Return where `datasets` keeps data sets, without importing it, which takes a second."""
    if (config := sys.modules.get("datasets.config")) is not None:
        return Path(config.HF_DATASETS_CACHE)
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets")


def _list_kept_folders(cache: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for folder in cache.iterdir() if cache.is_dir() else ():
        found.setdefault(_plain(folder.name), []).append(folder)
    return found


def _plain(name: str) -> str:
    """Leave out what `datasets` writes anew in names: capitals become words in snake case."""
    return "/".join(part.replace("_", "").lower() for part in name.split("___"))


def load_hub(data: HubData, task: str) -> Any:
    """Read a data set at its commit.

    Raises:
        RecipeError: if it cannot be fetched, or is not of that commit.
    """
    import datasets

    commit = find_commit(data)
    try:
        # With the hub's prefix: a folder of that name here is another data set.
        address = f"hf://datasets/{data.path}"
        found = datasets.load_dataset(address, data.name, revision=commit, **_copy(data.options))
    # As above.
    except Exception as error:
        raise RecipeError(
            f"task {task!r}: the hub's data set {data.label} cannot be fetched ({describe_error(error)}); go online, "
            "or set evaluation.tasks_folder to local tables (dvc repro builds the project's)"
        ) from None
    if missing := [split for split in data.splits if split not in found]:
        raise RecipeError(f"task {task!r}: data set {data.label} has no split {quote(missing[0])}: {', '.join(found)}")
    sources = [source for split in found.values() for source in split.info.download_checksums or ()]
    if strange := [source for source in sources if source.startswith("hf://") and f"@{commit}/" not in source]:
        raise RecipeError(
            f"task {task!r}: of {data.label} at {commit[:12]} there is {quote(strange[0])} on this machine; go online"
        )
    return found


def _copy(options: Mapping[str, Any]) -> dict[str, Any]:
    from copy import deepcopy

    return deepcopy(dict(options))


def read_hub_texts(data: HubData, task: str) -> Iterator[str]:
    """Yield the texts of what is measured on; refusals are those of `load_hub`."""
    for row in load_hub(data, task)[data.splits[0]]:
        yield from (value for value in row.values() if isinstance(value, str))
