"""One stage of the pipeline: what it reads, what keys its result, what it does, and what it will cost."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mka.pipeline.holding import hold_base
from mka.pipeline.job import Job
from mka.store.products import Product, find, produce, stage_key
from mka.terminal import say_stage

Found = Mapping[str, Product]

STATES_FILE, SCORES_FILE, PLAN_FILE, MODEL_FOLDER = "states.safetensors", "scores.json", "plan.json", "model"
# Its model is no step towards the candidate.
CONTROL_STAGE = "control"


@dataclass(frozen=True)
class Cost:
    """What a stage is expected to take.

    Attributes:
        memory: bytes resident at its peak, beside Python and its libraries.
        disk: bytes it leaves.
        files: names in what `mka compress` publishes that come of it.
    """

    memory: int = 0
    disk: int = 0
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One row of the pipeline.

    Attributes:
        name: what people and other stages call it.
        version: raised by hand when its meaning changes.
        reads: name -> digest of everything it is made from, given the job and the products before it.
        make: fills an empty folder; returns JSON-able facts.
        settings: what else decides the result; nothing that names a machine, path or time.
        wanted: whether a job has this stage.
        foresee: its cost, before anything is run.
        stored: what its results are stored under; its name, if empty.
        describe: one line for a run's page; its name, if None.
    """

    name: str
    version: int
    reads: Callable[[Job, Found], Mapping[str, str]]
    make: Callable[[Job, Found, Path], Mapping[str, Any]]
    settings: Callable[[Job], Mapping[str, Any]] = field(default=lambda job: {})
    wanted: Callable[[Job], bool] = field(default=lambda job: True)
    foresee: Callable[[Job], Cost] = field(default=lambda job: Cost())
    stored: str = ""
    describe: Callable[[Job], str] | None = None

    def arguments(self, job: Job, found: Found) -> dict[str, Any]:
        """Return what keys its result, as `mka.store.products` calls these things."""
        return {
            "stage": self.stored or self.name,
            "version": self.version,
            "settings": self.settings(job),
            "inputs": self.reads(job, found),
        }

    def key(self, job: Job, found: Found) -> str:
        """Return the digest of all that decides its result."""
        return stage_key(**self.arguments(job, found))

    def find(self, job: Job, found: Found, store: Path) -> Product | None:
        """Return the stored result, if it is there and whole."""
        return find(store, **self.arguments(job, found))

    def produce(
        self, job: Job, found: Found, store: Path, make: Callable[[Path], Mapping[str, Any]] | None = None
    ) -> Product:
        """Return the stored result, or make it.

        The base is compared with its digest before and after, as results of earlier stages are once they are opened.

        Args:
            job: what is done.
            found: the products of the stages before it.
            store: folder of all results.
            make: called in the place of the stage's own ``make``, to do something around it.

        Raises:
            StoreError: if the base or something an earlier stage made has changed.
            MkaError: whatever the stage refuses.
        """
        arguments = self.arguments(job, found)
        reads_base = job.base.digest in arguments["inputs"].values()

        def make_guarded(folder: Path) -> Mapping[str, Any]:
            with hold_base(job.base) if reads_base else nullcontext():
                return make(folder) if make is not None else self.make(job, found, folder)

        return produce(store, make=make_guarded, **arguments)


RunStage = Callable[[Stage, Job, Found], Product]
# Told the name of a stage that has ended, and its result.
Tell = Callable[[str, Product], Any]


def tell_product(name: str, product: Product) -> None:
    """Say on the terminal, or in the log that stands in its place, that a stage has ended."""
    say_stage(name, product.seconds, product.reused, product.why)


def find_model(found: Found) -> Product:
    """Return the last product that holds a model on the way to the candidate."""
    made = [product for name, product in found.items() if name != CONTROL_STAGE and product.facts.get("model_type")]
    return made[-1]
