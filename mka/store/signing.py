"""A folder signed with a key and held against its signature, in the format of OpenSSF's model-signing.

The signature is detached, a sigstore bundle over the digests of the files: no stock loader reads it. Keys are elliptic
curves (P-256, P-384, P-521) in PEM; nothing is asked of a network.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mka.errors import SignatureError, require_extra
from mka.outside.printable import one_line
from mka.store.publishing import replace_file
from mka.store.sums import SUMS_NAME

SIGNATURE = "model.sig"
# Not the model's: what a hub's page says of it, lists made anew, and the evidence of a run.
UNSIGNED = (SIGNATURE, SUMS_NAME, "README.md", "evidence")

_CURVES = "P-256, P-384, P-521"
# The library tells the digests as well, as Python spells them.
_ALTERED = re.compile(r"Hash mismatch for \\?'([^'\\]+)\\?'")


def sign_folder(folder: Path, key: Path, signature: Path | None = None) -> Path:
    """Sign the files of a folder, but for `UNSIGNED`; return where the signature is.

    Args:
        folder: a model folder.
        key: private key, PEM, without a passphrase.
        signature: where it goes; default: `SIGNATURE` in the folder. One that is there is replaced.

    Raises:
        SignatureError: if the key is none of those, or a file is a link.
        ExtraError: if the extra `sign` is not installed.
        OutputError: if the signature cannot be written.
    """
    place = signature or folder / SIGNATURE
    _check_folder(folder)
    require_extra("sign", "a signature")
    with _explained(f"{folder} cannot be signed with {key}"):
        from model_signing import hashing, signing

        what = hashing.Config().set_ignored_paths(paths=[*UNSIGNED])
        signer = signing.Config().set_hashing_config(what).use_elliptic_key_signer(private_key=key)
        replace_file(place, lambda aside: signer.sign(folder, aside))
    return place


def verify_folder(folder: Path, key: Path, signature: Path | None = None) -> Path:
    """Hold a folder against its signature: no signed file changed, none missing, none beside them.

    Args:
        folder: a model folder.
        key: public key, PEM.
        signature: default: `SIGNATURE` in the folder.

    Returns:
        The signature that was read.

    Raises:
        SignatureError: if it has none, another key made it, or a file is not as it was signed.
        ExtraError: if the extra `sign` is not installed.
    """
    place = signature or folder / SIGNATURE
    _check_folder(folder)
    if not place.is_file():
        raise SignatureError(
            f"{folder} is not signed: {place} is missing; sign it with mka sign, or name its signature"
        )
    require_extra("sign", "a signature")
    with _explained(f"{folder} is not what {place} signs with the key of {key}"):
        from model_signing import verifying

        verifying.Config().use_elliptic_key_verifier(public_key=key).verify(folder, place)
    return place


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise SignatureError(f"{folder}: no such folder")


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what the library raises into one line; of a key's own text nothing is told."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, OSError) as error:
        raise SignatureError(f"{what}: {_reason(error)}") from None
    except Exception as error:
        # cryptography raises of bare Exception: InvalidSignature, UnsupportedAlgorithm.
        if not type(error).__module__.startswith("cryptography"):
            raise
        raise SignatureError(f"{what}: {_reason(error)}") from None


def _reason(error: Any) -> str:
    name, told = type(error).__name__, one_line(error, 200)
    if name == "InvalidSignature":
        return "the signature is not that key's"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    if "Password was not given" in told:
        return "the key has a passphrase; give one without"
    if "deserialize key data" in told or "PEM" in told or "'curve'" in told or "for curve" in told:
        return f"the key is none in PEM of an allowed kind; allowed: elliptic curves {_CURVES}"
    if isinstance(error, KeyError) or name in ("JSONDecodeError", "ValidationError"):
        return "it is no signature in this format; sign the folder again"
    if altered := _ALTERED.findall(str(error)):
        return f"altered since: {one_line(', '.join(altered), 160)}"
    return told or name
