"""What a comparison is made of: parts stored by content, and what was measured of a cell.

A part's key holds the digests of what it was made from and the settings that matter to it, and no name or path: two
recipes share parts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from mka.bench.recipe import BenchRecipe, Cell
from mka.evaluation.scores import Score
from mka.model.checkpoint import Checkpoint
from mka.pipeline.inputs import Inputs
from mka.pipeline.job import Job, Opened
from mka.store.products import Product, find, produce, stage_key

# Raised by hand when the meaning of a part changes. What comes before measuring are stages of the pipeline.
VERSIONS = {"text": 1, "task": 1, "generation": 1}
Make = Callable[[Path], Mapping[str, Any]]
Get = Callable[["Part", Make], Product]


@dataclass(frozen=True)
class Part:
    """What decides one stored part of a cell; see `mka.store.products.stage_key`."""

    store: Path
    stage: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]

    @property
    def arguments(self) -> dict[str, Any]:
        """What `mka.store.products` calls these things."""
        return {"version": VERSIONS[self.stage], "settings": self.settings, "inputs": self.inputs}

    @property
    def key(self) -> str:
        """Digest of all of it."""
        return stage_key(f"bench-{self.stage}", **self.arguments)

    def produce(self, make: Make) -> Product:
        """Return the stored part, or make it."""
        return produce(self.store, f"bench-{self.stage}", make=make, **self.arguments)

    def find(self, make: Make) -> Product:
        """Return the stored part.

        Raises:
            NotStored: if it is not there.
        """
        found = find(self.store, f"bench-{self.stage}", **self.arguments)
        if found is None:
            raise NotStored
        return found


class NotStored(Exception):
    """A part that is not there, where only stored ones are wanted."""


@dataclass(frozen=True)
class Bench:
    """One comparison with everything checked that can be checked without running a model.

    Attributes:
        recipe: what to compare.
        base: the opened base checkpoint.
        revision: what pins it.
        inputs: the texts that methods, refits and healing look at; None each where no cell does.
        texts: name -> held-out texts.
        digests: of each "text NAME" and each "task NAME".
        notes: per text, how many calibration texts share a run of words with it, in words.
        work: work folder.
        command: what makes all of it again, for the record.
        jobs: of the cells, by their keys.
        opened: what they share while planning.
        building: held by whoever builds models, which libraries cannot do in two threads at once. Locks of parts
            that plan, merge or align are taken under it, those of measurements are not.
    """

    recipe: BenchRecipe
    base: Checkpoint
    revision: str
    inputs: Inputs
    texts: Mapping[str, Sequence[str]]
    digests: Mapping[str, str]
    notes: Mapping[str, str]
    work: Path
    command: str
    jobs: Mapping[str, Job] = field(default_factory=dict)
    opened: Opened = field(default_factory=Opened)
    building: Any = field(default_factory=Lock)

    @property
    def stages(self) -> Path:
        """Where parts are stored."""
        return self.work / "stages"

    def part(self, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> Part:
        """Name a part of this comparison."""
        return Part(self.stages, stage, settings, inputs)


@dataclass(frozen=True)
class Measured:
    """What was measured of one cell, or of the base.

    Attributes:
        cell: which; None for the base.
        scores: name and metric -> score; tasks and generation only where they are measured.
        seconds: observe, score, plan, merge or align, heal, and measure: what each took when it was made.
        facts: digest, layers, parameters and bytes of the checkpoint; ``alignment`` and ``healing``: what a refit and
            a healing took.
        conditions: those of every measurement.
        reused: whether nothing had to be made.
    """

    cell: Cell | None
    scores: Mapping[tuple[str, str], Score]
    seconds: Mapping[str, float]
    facts: Mapping[str, Any]
    conditions: tuple[Mapping[str, Any], ...]
    reused: bool
