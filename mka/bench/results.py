"""What a comparison found: figures of the cells, cells that came to nothing, cells that were not run."""

from dataclasses import dataclass

from mka.bench.parts import Bench, Measured
from mka.bench.recipe import Cell
from mka.errors import MkaError


class CellsFailed(MkaError):
    """The comparison is done, but cells failed for other reasons than their method's limits."""

    exit_code = 1


@dataclass(frozen=True)
class Failed:
    """A cell that came to nothing, with one line that says why."""

    cell: Cell
    reason: str
    expected: bool


@dataclass(frozen=True)
class Results:
    """What a comparison found.

    Attributes:
        bench: what was compared.
        base: measurements of the base.
        measured: of the cells, in the recipe's order.
        failed: cells that came to nothing.
        missing: cells that were neither stored nor run.
    """

    bench: Bench
    base: Measured
    measured: tuple[Measured, ...]
    failed: tuple[Failed, ...]
    missing: tuple[Cell, ...]

    @property
    def refusal(self) -> CellsFailed | None:
        """To be raised once the results were shown; None if nothing failed but what methods cannot do."""
        strange = [failed for failed in self.failed if not failed.expected]
        if not strange:
            return None
        first = f"{strange[0].cell.key}: {strange[0].reason}"
        return CellsFailed(f"{len(strange)} of {len(self.bench.recipe.cells)} cells failed unexpectedly; first {first}")
