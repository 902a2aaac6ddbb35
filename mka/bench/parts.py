"""What a comparison is made of: parts stored by content, and what was measured of a cell.

A part's key holds the digests of what it was made from and the settings that matter to it, and no name or path: two
recipes share parts.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from mka.bench.recipe import BenchRecipe, Cell
from mka.evaluation.scores import Score
from mka.model.checkpoint import Checkpoint
from mka.pipeline.plan import alignment_version
from mka.store.products import Product, find, produce, stage_key
from mka.texts.calibration import CalibrationSet

# Raised by hand when the meaning of a part changes; alignment's own version is `mka.alignment.lockstep.VERSION`.
VERSIONS = {"observe": 1, "score": 1, "plan": 1, "merge": 1, "align": 1, "text": 1, "task": 1}
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
        version = VERSIONS[self.stage]
        if self.stage == "align":
            version = 1000 * version + alignment_version()
        return {"version": version, "settings": self.settings, "inputs": self.inputs}

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


@dataclass
class Oracles:
    """What runs planned models, open for one method at a time and shared by its targets."""

    _owner: Any = None
    _opened: Mapping[str, Any] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)

    def open(self, owner: Any, make: Callable[[], AbstractContextManager[Mapping[str, Any]]]) -> Mapping[str, Any]:
        """Return the oracles of one method; those of another are closed first."""
        if self._owner != owner:
            self.close()
            self._opened = self._stack.enter_context(make())
            self._owner = owner
        return self._opened

    def close(self) -> None:
        """Let go of what is open."""
        self._owner, self._opened = None, {}
        self._stack.close()


@dataclass(frozen=True)
class Bench:
    """One comparison with everything checked that can be checked without running a model.

    Attributes:
        recipe: what to compare.
        base: the opened base checkpoint.
        revision: what pins it.
        calibration: the texts methods look at; None if none looks.
        alignment: source -> texts of the refits; empty if no cell is aligned.
        texts: name -> texts of perplexity.
        digests: of "alignment", each "text NAME" and each "task NAME".
        notes: per text, how many calibration texts share a run of words with it, in words.
        work: work folder.
        command: what makes all of it again, for the record.
        oracles: shared while planning.
        building: held by whoever builds models, which libraries cannot do in two threads at once. Locks of parts
            that plan, merge or align are taken under it, those of measurements are not.
    """

    recipe: BenchRecipe
    base: Checkpoint
    revision: str
    calibration: CalibrationSet | None
    alignment: Mapping[str, Sequence[str]]
    texts: Mapping[str, Sequence[str]]
    digests: Mapping[str, str]
    notes: Mapping[str, str]
    work: Path
    command: str
    oracles: Oracles = field(default_factory=Oracles)
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
        texts: name -> perplexity with (nll, tokens) per window.
        tasks: one score per task; empty where none is measured.
        seconds: observe, score, plan, merge or align, and measure: what each took when it was made.
        facts: digest, layers, parameters and bytes of the checkpoint; ``written``: what merging or aligning said.
        conditions: those of every measurement.
        reused: whether nothing had to be made.
    """

    cell: Cell | None
    texts: Mapping[str, Score]
    tasks: tuple[Score, ...]
    seconds: Mapping[str, float]
    facts: Mapping[str, Any]
    conditions: tuple[Mapping[str, Any], ...]
    reused: bool
