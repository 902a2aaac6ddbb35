"""What a run reads while others may write there: compared before it is read, and once more afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mka.errors import MkaError, StoreError
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


def refuse_other(
    folder: Path, digest: str, what: str, remedy: str, *, was: str = "measured", refusal: type[MkaError] = StoreError
) -> None:
    """Refuse a copy of a model that is another, or none.

    Args:
        folder: of the copy.
        digest: what it has to be, as `mka.model.checkpoint.Checkpoint.digest`.
        what: the copy is, for the refusal.
        remedy: what to do.
        was: what was done to the model it has to be.
        refusal: what is raised.

    Raises:
        MkaError: of the class of the refusal, naming both.
    """
    try:
        found = open_checkpoint(folder, verify=False).digest
    except MkaError as error:
        raise refusal(f"{what} is not what was {was}: {error}; {remedy}") from None
    if found != digest:
        raise refusal(f"{what} is not what was {was}: digest {found[:16]}, {was} {digest[:16]}; {remedy}")
