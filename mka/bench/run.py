"""The comparison: cell by cell, what came of it, and how long the rest may take."""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from typing import Any

from mka.bench.cells import find_base, find_cell, measure_base, run_cell, sweep_leftovers
from mka.bench.parts import Bench, Measured
from mka.bench.recipe import BenchRecipe, Cell
from mka.bench.results import Failed, Results
from mka.errors import MkaError, NumericsError, OutputError, PlanError, RecipeError, nearest
from mka.evaluation.metrics import HEADLINE
from mka.model.checkpoint import describe_checkpoint
from mka.pipeline.job import check_search

# A method's own limits: it cannot reach a target, or leaves a model whose outputs are no numbers.
EXPECTED = (PlanError, NumericsError)
# Of one core, for a first estimate before anything was measured.
FLOPS_PER_CORE = 5e10


def choose_cells(recipe: BenchRecipe, only: str | None) -> tuple[Cell, ...]:
    """Return the cells of one method, by its name or label; all of them if none is named.

    Raises:
        RecipeError: if the recipe has no such method.
    """
    names = {name: None for entry in recipe.methods for name in (entry.name, entry.row)}
    if only is not None and only not in names:
        raise RecipeError(f"the recipe has no method {only!r}{nearest(only, names)}; methods: {', '.join(names)}")
    return tuple(cell for cell in recipe.cells if only in (None, cell.entry.name, cell.entry.row))


def attempt_cell(bench: Bench, cell: Cell) -> Measured | Failed:
    """Run one cell; what fails in it is told, not raised, unless it would fail every other cell too.

    Raises:
        OutputError: if the work folder cannot be written.
    """
    try:
        return run_cell(bench, cell)
    except OutputError:
        raise
    except MkaError as error:
        return Failed(cell, " ".join(str(error).split()), isinstance(error, EXPECTED))
    except Exception as error:
        return Failed(cell, f"{type(error).__name__}: {' '.join(str(error).split())}"[:300], expected=False)


def run_bench(bench: Bench, *, only: str | None = None, say: Callable[[str], Any] = print) -> Results:
    """Run every cell that is not stored: base first, then methods in the order given, targets from most layers down.

    Args:
        bench: what `prepare` checked.
        only: run the cells of this method only; what is stored of the others is shown with them.
        say: called with a line per finished cell.

    Raises:
        MkaError: if the base cannot be measured, or the work folder cannot be written.
    """
    chosen = choose_cells(bench.recipe, only)
    sweep_leftovers(bench.work)
    base = measure_base(bench)
    say(f"{'base':<44} {'stored' if base.reused else f'{sum(base.seconds.values()):.1f} s'}")
    todo = [cell for cell in chosen if find_cell(bench, cell) is None]
    made: list[Measured] = []
    failed: list[Failed] = []
    started = time.perf_counter()
    with closing(bench.opened):
        for number, cell in enumerate(todo, 1):
            result = attempt_cell(bench, cell)
            if isinstance(result, Failed):
                failed.append(result)
            else:
                made.append(result)
            rest = sum(estimate_cell(bench, other, base, made) for other in todo[number:])
            say(describe_progress(result, number, len(todo), time.perf_counter() - started, rest))
    return collect_results(bench, base, failed)


def describe_progress(result: Measured | Failed, number: int, count: int, elapsed: float, rest: float) -> str:
    """Say in one line what came of a cell, and how long the others may take."""
    assert result.cell is not None
    if isinstance(result, Failed):
        found = f"failed: {result.reason}"
    else:
        shown = (score for score in result.scores.values() if score.metric == HEADLINE.name)
        found = ", ".join(f"{score.name} {score.value:.4g}" for score in shown)
    return f"{number:>3}/{count} {result.cell.key:<36} {elapsed:7.0f} s, about {rest:.0f} s left   {found}"


def collect_results(bench: Bench, base: Measured, failed: Iterable[Failed]) -> Results:
    """Gather every cell from the store, whoever ran it."""
    failures = {item.cell.key: item for item in failed}
    stored = {cell.key: find_cell(bench, cell) for cell in bench.recipe.cells if cell.key not in failures}
    missing = tuple(cell for cell in bench.recipe.cells if cell.key in stored and stored[cell.key] is None)
    return Results(
        bench, base, tuple(found for found in stored.values() if found is not None), tuple(failures.values()), missing
    )


def estimate_cell(bench: Bench, cell: Cell, base: Measured | None, known: Sequence[Measured]) -> float:
    """Estimate the seconds of a cell from like ones, else from measuring the base, else from arithmetic."""
    repaired = [
        m
        for m in known
        if m.cell and (m.cell.aligned, m.cell.healed, m.cell.rounded) == (cell.aligned, cell.healed, cell.rounded)
    ]
    alike = [m for m in repaired if m.cell and m.cell.entry == cell.entry] or repaired
    if alike:
        # Hidden states and scores are made once and shared.
        shared = ("observe", "score")
        spent = [sum(s for stage, s in m.seconds.items() if stage not in shared) for m in alike]
        return sum(spent) / len(spent)
    share = cell.layers / bench.base.layers
    if base is not None:
        return share * base.seconds["measure"]
    tokens = len(bench.texts) * bench.recipe.evaluation.text_tokens
    work = 2 * tokens * describe_checkpoint(bench.base)["parameters"]
    return share * work / (FLOPS_PER_CORE * (os.cpu_count() or 1))


def foresee_bench(bench: Bench, only: str | None) -> list[dict[str, Any]]:
    """Say of the base and every chosen cell whether it is stored, else about how many seconds it takes.

    A target that a cell's method cannot reach is known beforehand: ``refusal`` says why.
    """
    base = find_base(bench)
    found = [(cell, find_cell(bench, cell)) for cell in choose_cells(bench.recipe, only)]
    known = [measured for _, measured in found if measured is not None]
    whole = Cell(bench.recipe.methods[0], bench.base.layers, False)
    rows: list[tuple[str, int, bool, float, str | None]] = [
        ("base", bench.base.layers, base is not None, estimate_cell(bench, whole, base, ()), None)
    ]
    rows += [
        (c.row, c.layers, m is not None, estimate_cell(bench, c, base, known), None if m else find_refusal(bench, c))
        for c, m in found
    ]
    return [
        {
            "cell": name,
            "layers": layers,
            "stored": stored,
            "seconds": 0.0 if stored or refusal else seconds,
            "refusal": refusal,
        }
        for name, layers, stored, seconds, refusal in rows
    ]


def find_refusal(bench: Bench, cell: Cell) -> str | None:
    """Return why a cell's method cannot reach its target, as far as that is known before it runs; None if it may."""
    job = bench.jobs[cell.key]
    try:
        job.planner.check_aim(bench.base.kinds, job.aim)
        check_search(job)
    except PlanError as error:
        return str(error)
    return None
