"""Compare methods side by side: the grid of `mka bench`, cell by cell as tasks, on the same stored parts.

mka sweep recipes/bench_smollm2.yaml
mka sweep recipes/bench_smollm2.yaml --workers 4

Where cells run is the recipe's `fan_out`: threads of this process, or worker processes of Dask, here or elsewhere.
"""

import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.cli.console import run_program
from flows.command_line import say

if __name__ == "__main__":
    sys.exit(run_program("sweep", "sweep:sweep"))

from prefect import flow
from prefect.futures import as_completed

from mka.bench.recipe import BenchRecipe, Cell, FanOut, load_bench
from tasks.machine.slots import compute_slot, hold_slot
from tasks.machine.workplace import Workplace, find_workplace
from tasks.sweep.fan_out import choose_fan_out, open_runner, submit_cells, take_result

if TYPE_CHECKING:
    from mka.bench.parts import Bench, Measured
    from mka.bench.results import Failed


@flow(name="sweep", validate_parameters=False)
def sweep(recipe: str, workers: int | None = None) -> Any:
    """Run every cell of a comparison that is not stored yet, and publish the tables.

    Args:
        recipe: path of the recipe, relative to the project's root or absolute.
        workers: how many cells run at a time, instead of what the recipe says.

    Returns:
        `mka.terminal.Outcome`: the tables as text, all figures as one document, and the refusal if cells failed.

    Raises:
        MkaError: if anything is refused before or while the base is measured.
    """
    place = find_workplace()
    place.prepare()
    with hold_slot(compute_slot()):
        return walk(place, recipe, workers)


def walk(place: Workplace, recipe: str, workers: int | None) -> Any:
    """The grid: base first, then all cells that are not stored, then one table of all that are."""
    from mka.bench.cells import find_cell, sweep_leftovers
    from mka.bench.prepare import prepare
    from mka.bench.publish import publish_results
    from mka.bench.run import collect_results
    from mka.bench.statistics import Comparison
    from mka.terminal import quiet_libraries
    from tasks.sweep.cells import measure_base_model, publish_tables

    path = place.path(Path(recipe))
    loaded = load_bench(path)
    fan_out = choose_fan_out(loaded.fan_out, workers)
    with quiet_libraries():
        bench = prepare(loaded, place.work, root=place.root, command=describe_command(place, path))
        sweep_leftovers(place.work)
        base = measure_base_model(bench)
        say(f"{'base':<44} {'stored' if base.reused else f'{sum(base.seconds.values()):.1f} s'}", sys.stderr)
        todo = [cell for cell in bench.recipe.cells if find_cell(bench, cell) is None]
        failed = run_cells(fan_out, loaded, bench, base, todo) if todo else []
        results = collect_results(bench, base, failed)
        publish_tables(Comparison(results))
        return publish_results(results)


def run_cells(
    fan_out: FanOut, recipe: BenchRecipe, bench: "Bench", base: "Measured", todo: Sequence[Cell]
) -> list["Failed"]:
    """Run cells where the recipe wants them, and say of each what came of it; returns those that failed."""
    from mka.bench.results import Failed
    from mka.bench.run import describe_progress, estimate_cell

    made: list[Measured] = []
    failed: list[Failed] = []
    waiting = {cell.key: cell for cell in todo}
    started = time.perf_counter()
    with open_runner(fan_out, len(todo)) as runner:
        futures = submit_cells(runner, fan_out, recipe, bench, todo)
        for number, future in enumerate(as_completed(list(futures)), 1):
            result = take_result(future, fan_out, futures[future])
            if isinstance(result, Failed):
                failed.append(result)
            else:
                made.append(result)
            del waiting[futures[future].key]
            rest = sum(estimate_cell(bench, other, base, made) for other in waiting.values())
            say(describe_progress(result, number, len(todo), time.perf_counter() - started, rest), sys.stderr)
    return failed


def describe_command(place: Workplace, path: Path) -> str:
    """Return the command line that makes all of it again, with a path relative to the project where it can be."""
    return f"mka bench {shlex.quote(str(place.relative(path)))}"


main = partial(run_program, "sweep", "sweep:sweep")
