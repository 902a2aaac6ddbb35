"""The stages of the pipeline as tasks: a guard in front, the stage, a guard behind, one stored result."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from mka.pipeline.job import Job
from mka.pipeline.stage import Found, Stage
from mka.store.products import Product
from tasks.guards import guard
from tasks.guards.doors import BEHIND, IN_FRONT, Door
from tasks.machine.workplace import Workplace
from tasks.versioned import Version


@dataclass(frozen=True)
class Run:
    """What every task of one flow run shares.

    Attributes:
        place: its folders.
        job: what to do.
        name: of the flow run, under which checks are filed.
        versions: what each of the recipe's tables holds at its revision.
        tables: private copies of them.
    """

    place: Workplace
    job: Job
    name: str
    versions: Mapping[str, Version]
    tables: Product

    def guard(self, door: Door) -> None:
        """Hold a table against its suite; a failure stops the run here."""
        if door is not None:
            guard.check(*door, self.place.checks, self.name)


def run_stage(run: Run, stage: Stage, found: Found, title: str | None = None) -> Product:
    """Run one stage as a task of its own.

    Args:
        run: the flow run.
        stage: which.
        found: the products before it.
        title: what its task is called; default: what the stage says.

    Raises:
        GuardError: if a table breaks an expectation; nothing is stored then.
        MkaError: whatever the stage refuses.
    """
    title = title or (stage.describe(run.job) if stage.describe else stage.name)
    return _run_stage.with_options(task_run_name=title)(run, stage, found)


@task(name="stage", cache_policy=NO_CACHE)
def _run_stage(run: Run, stage: Stage, found: Found) -> Product:
    def make(folder: Path) -> Mapping[str, Any]:
        if stage.name in IN_FRONT:
            run.guard(IN_FRONT[stage.name](run.job, found))
        facts = stage.make(run.job, found, folder)
        if stage.name in BEHIND:
            run.guard(BEHIND[stage.name](run.job, folder, facts))
        return facts

    return stage.produce(run.job, found, run.place.stages, make)
