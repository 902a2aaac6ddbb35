"""A comparison as tasks: the base first, then every cell on its own, and the table on the run's page."""

from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from mka.bench.cells import measure_base
from mka.bench.parts import Bench, Measured
from mka.bench.recipe import Cell
from mka.bench.results import Failed
from mka.bench.run import attempt_cell
from mka.bench.statistics import Comparison
from mka.bench.tables import tabulate_ratios
from mka.terminal import quiet_libraries, showing
from tasks.sweep.sent_bench import SentBench, open_bench


@task(task_run_name="measure base", cache_policy=NO_CACHE)
def measure_base_model(bench: Bench) -> Measured:
    """Measure what everything is compared with.

    Raises:
        CheckpointError: if it does not load whole.
        NumericsError: if its outputs are not finite.
    """
    with showing(False):
        return measure_base(bench)


@task(task_run_name="{cell.key}", cache_policy=NO_CACHE)
def run_bench_cell(bench: Bench | SentBench, cell: Cell) -> Measured | Failed:
    """Plan, merge and measure one cell; `mka bench` runs and stores the same.

    Args:
        bench: the comparison; in another process than the flow's what was sent of it.
        cell: which.

    Raises:
        OutputError: if the work folder cannot be written.
        RecipeError: if another process finds other inputs than the flow's, or another work folder.
    """
    # Cells may run side by side: their bars would overwrite each other.
    with showing(False):
        if isinstance(bench, Bench):
            return attempt_cell(bench, cell)
        with quiet_libraries():
            return attempt_cell(open_bench(bench), cell)


def publish_tables(comparison: Comparison) -> None:
    """Put the table of every text on the run's page."""
    recipe = comparison.results.bench.recipe
    for index, (check, group) in enumerate(comparison.list_groups("texts", "own items").items()):
        headers, rows = tabulate_ratios(comparison, check)
        create_table_artifact(
            [dict(zip(headers, row, strict=True)) for row in rows],
            key=f"{recipe.name.replace('_', '-').replace('.', '-')}-text-{index + 1}",
            description=f"{recipe.name}: {group.metric.name} over the base's, {group.on}",
        )
