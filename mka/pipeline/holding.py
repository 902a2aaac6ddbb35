"""What a run reads while others may write there: compared before it is read, and once more afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mka.errors import StoreError
from mka.model.checkpoint import Checkpoint, open_checkpoint


@contextmanager
def hold_base(base: Checkpoint) -> Iterator[None]:
    """Compare a base with its digest before and after a block.

    Raises:
        StoreError: if its files are no longer those it was opened with.
    """
    verify_base(base)
    yield
    verify_base(base)


def verify_base(base: Checkpoint) -> None:
    """Compare a base with the digest it had when the run began.

    Raises:
        StoreError: if they differ.
    """
    try:
        found = replace(base, verified=False).digest  # a copy has not hashed anything yet
    except OSError:
        found = ""
    if found != base.digest:
        raise StoreError(
            f"base {base.path} has changed since the run began: digest {base.digest[:16]}, now {found[:16] or 'gone'}; "
            "nothing was made of it, put it back or run again to use it as it is"
        )


def refuse_other(folder: Path, digest: str) -> None:
    """Refuse a copy of a model that is not the one that was measured.

    Args:
        folder: of the copy.
        digest: of the model, as `mka.model.checkpoint.Checkpoint.digest`.

    Raises:
        StoreError: naming both.
    """
    found = open_checkpoint(folder, verify=False).digest
    if found != digest:
        raise StoreError(
            f"copy {folder} of the model is not what was measured: digest {found[:16]}, measured {digest[:16]}; "
            "nothing is published, run again"
        )
