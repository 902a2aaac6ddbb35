"""A hub's page of a model, made of a folder: which files go there, their digests, and a card that says what it is."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mka.errors import PublishError
from mka.model.card import CARD
from mka.model.checkpoint import Checkpoint, open_checkpoint
from mka.model.companions import is_companion
from mka.model.weights import INDEX, list_files
from mka.outside.printable import one_line
from mka.store.signing import SIGNATURE
from mka.store.sums import SUMS_NAME, file_sha256, read_sums

RELATIONS = ("finetune", "merge", "quantized")
# Where a card that was written before it was known says the model lies.
_PLACE = '"path/to/this/folder"'
_CARD = """# {name}

A decoder of {layers} layers (architecture `{kind}`), a stock safetensors folder.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({place})
tokenizer = AutoTokenizer.from_pretrained({place})
```
"""


@dataclass(frozen=True)
class HubFile:
    """One file of a page.

    Attributes:
        source: where it lies, or what it holds.
        size: bytes.
        sha256: of its bytes, 64 hex digits.
    """

    source: Path | bytes
    size: int
    sha256: str

    def git_oid(self) -> str:
        """Return the object id that git gives it; hubs name small files by that."""
        data = self.source.read_bytes() if isinstance(self.source, Path) else self.source
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class HubPage:
    """What is published of a folder.

    Attributes:
        repo: the hub's id of the model, ``org/name``.
        files: path in the repository -> file; with card and sums.
        front: the card's front matter.
    """

    repo: str
    files: Mapping[str, HubFile]
    front: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())


def lay_out_page(
    folder: Path,
    repo: str,
    *,
    base: str | None = None,
    relation: str | None = None,
    license_name: str | None = None,
    card: Path | None = None,
) -> HubPage:
    """Choose what of a folder is published, and make its card; nothing is written.

    Of the folder go the files its SHA256SUMS lists, else config.json, weights and what belongs to them
    (`mka.model.companions`): whatever else lies there stays where it is.

    Args:
        folder: a model folder.
        repo: where it goes, ``org/name``.
        base: the base model's id on the hub; default: what the card says.
        relation: of `RELATIONS`; default: what the card says.
        license_name: a licence by the hub's word for it; default: what the card says.
        card: the card, as ``mka report`` wrote it; default: the folder's own, else a short one is made.

    Raises:
        CheckpointError: if the folder is no model, or damaged.
        PublishError: if a name or the card cannot be what the hub takes.
    """
    _check_name(repo, "--to")
    if base is not None:
        _check_name(base, "--base")
    checkpoint = open_checkpoint(folder)
    files = {name: _describe(folder / name, digest) for name, digest in _choose(checkpoint).items()}
    if SUMS_NAME not in files:
        lines = "".join(f"{file.sha256}  {name}\n" for name, file in sorted(files.items()))
        files[SUMS_NAME] = _describe(lines.encode())
    text, front = _write_card(checkpoint, repo, card or folder / CARD, base, relation, license_name)
    files[CARD] = _describe(text.encode())
    return HubPage(repo, dict(sorted(files.items())), front)


def _check_name(name: str, option: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        name = f"{name}?"
    if not re.fullmatch(r"[^/]+/[^/?]+", name):
        raise PublishError(f"{option} {name.removesuffix('?')!r} is no model id of a hub; give org/name")


def _choose(checkpoint: Checkpoint) -> dict[str, str | None]:
    """Name the files that are published, with the digests that are known of them."""
    folder = checkpoint.path
    signed: dict[str, str | None] = dict.fromkeys([SIGNATURE] if (folder / SIGNATURE).is_file() else [])
    if listed := read_sums(folder):
        home = folder.resolve()
        if strange := sorted(name for name in listed if not (folder / name).resolve().is_relative_to(home)):
            raise PublishError(f"{folder / SUMS_NAME} lists {strange[0]}, which is not in the folder; take it out")
        return {name: digest for name, digest in listed.items() if name != CARD} | {SUMS_NAME: None, **signed}
    weights = {info.file for info in checkpoint.tensors.values()} | {INDEX, "config.json"}
    names = [path.relative_to(folder).as_posix() for path in list_files(folder)]
    return signed | {name: None for name in names if name in weights or "/" in name or is_companion(name)}


def _describe(source: Path | bytes, sha256: str | None = None) -> HubFile:
    if isinstance(source, bytes):
        return HubFile(source, len(source), hashlib.sha256(source).hexdigest())
    return HubFile(source, source.stat().st_size, sha256 or file_sha256(source))


def _write_card(
    checkpoint: Checkpoint,
    repo: str,
    card: Path,
    base: str | None,
    relation: str | None,
    license_name: str | None,
) -> tuple[str, dict[str, Any]]:
    import yaml
    from huggingface_hub import ModelCard, ModelCardData

    given = {"base_model": base, "base_model_relation": relation, "license": license_name}
    if not card.exists():
        kind, name = checkpoint.family.model_type, repo.partition("/")[2]
        text = _CARD.format(name=name, layers=checkpoint.layers, kind=kind, place=_PLACE)
        front = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["mka"])
        text = f"---\n{front.to_yaml()}\n---\n\n{text}"
    else:
        text = card.read_bytes().decode("utf-8", "replace")
    try:
        made = ModelCard(text)
        for key, value in given.items():
            if value is not None:
                setattr(made.data, key, value)
        if license_name is not None:
            made.data.license_name = made.data.license_link = None
        # Of no base, nothing can be a merge.
        if not made.data.get("base_model"):
            made.data.base_model_relation = None
        made.text = made.text.replace(_PLACE, f'"{repo}"')
        return str(made), made.data.to_dict()
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise PublishError(
            f"{card}: its front matter cannot be read: {one_line(error, 200)}; mend or remove it"
        ) from None
