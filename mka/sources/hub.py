"""Models of a hub: the commit a revision means, its files, and whether they are whole."""

import hashlib
import re
from pathlib import Path

from mka.errors import CheckpointError, UnreachableError
from mka.model.companions import COMPANIONS
from mka.recipe import ModelSource
from mka.store.sums import file_sha256

HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
# A model's page on the hub, as people copy it.
HUB_PAGE = re.compile(
    r"https?://(?:huggingface\.co|hf\.co)/(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?:tree|blob|resolve|commit)"
    r"/(?P<revision>[\w.-]+)(?:/.*)?)?/?(?:[?#].*)?",
    re.ASCII,
)
# Weights as safetensors, configuration, the card for its licence, and all that goes along with a model; no pickles, no
# other frameworks' weights. The hub's client tells cases apart.
HUB_FILES = ["*.safetensors", "*.json", "README.md"]
HUB_FILES += [re.sub("[a-z]", lambda letter: f"[{letter[0]}{letter[0].upper()}]", name) for name in COMPANIONS]
# Copies of the weights that some repositories carry beside the transformers ones.
HUB_IGNORED = ["original/*", "onnx/*", "consolidated*.safetensors", "runs/*"]


def find_commit(source: ModelSource, cache_dir: Path | None = None) -> str:
    """Return the commit a hub model's revision is at now; fetches its config.json at most.

    Args:
        source: a model that names a hub id.
        cache_dir: the hub cache; default: the one `huggingface_hub` is configured to use.

    Raises:
        CheckpointError: if the model or the revision cannot be found.
        UnreachableError: if the hub does not answer.
    """
    return fetch_snapshot(source, cache_dir, ["config.json"]).name


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


def fetch_snapshot(source: ModelSource, cache_dir: Path | None, files: list[str]) -> Path:
    """Download files of a hub model at its revision, or find them in the cache.

    Args:
        source: names the model and its revision.
        cache_dir: of the hub's client; None: its own.
        files: patterns of files.

    Raises:
        CheckpointError: if the model or revision does not exist.
        UnreachableError: if the hub does not answer.
    """
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
