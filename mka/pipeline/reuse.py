"""What of a pipeline is stored already: looked up, nothing is made."""

from pathlib import Path
from typing import Any

from mka.pipeline.job import Job
from mka.pipeline.pipeline import PIPELINE
from mka.store.products import Product


class _Stored(dict[str, Product]):
    """Products that are stored. With one missing, nobody finds the last model among them: a later one is to come."""

    whole = True

    def items(self) -> Any:
        if not self.whole:
            raise LookupError
        return super().items()


def find_stored(job: Job, store: Path) -> dict[str, Product | None]:
    """Look every stage of a job up in a store.

    Args:
        job: what would be done.
        store: folder of all results.

    Returns:
        Stage -> its result if it is there and whole, in the pipeline's order; None for what would be made.
    """
    found = _Stored()
    told: dict[str, Product | None] = {}
    for stage in PIPELINE:
        if not stage.wanted(job):
            continue
        try:
            product = stage.find(job, found, store)
        except LookupError:  # keyed by a result that is not there yet
            product = None
        told[stage.name] = product
        if product is None:
            found.whole = False
        else:
            found[stage.name] = product
    return told
