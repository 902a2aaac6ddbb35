"""One cell of a comparison: planned, merged, healed, rounded, measured from disk by a stranger's loader.

Each part is stored by content. The model's folder is deleted once it is measured; what stays are plans, scores and
figures.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mka.bench.measure import MeasuredModel, measure
from mka.bench.parts import Bench, Get, Measured, NotStored, Part
from mka.bench.recipe import Cell
from mka.model.checkpoint import describe_checkpoint
from mka.pipeline.heal import HEAL
from mka.pipeline.job import Job
from mka.pipeline.merge import MERGE
from mka.pipeline.pipeline import run
from mka.pipeline.quantize import QUANTIZE
from mka.pipeline.stage import MODEL_FOLDER, Found, Stage
from mka.store.products import Product, discard, name_folder, read_use

# What is known of a model once its folder is gone, by the stage that made it; measurements go by its digest.
FACTS = {stage.name: replace(stage, name="facts", stored="bench-facts", version=1) for stage in (MERGE, HEAL, QUANTIZE)}


class _Changed(Exception):
    """Merging again gave other bytes than the stored facts are of."""


def measure_base(bench: Bench) -> Measured:
    """Measure the base; what is stored is not measured again."""
    return _measure_base(bench, Part.produce)


def find_base(bench: Bench) -> Measured | None:
    """Return what is stored of the base; None if something is missing."""
    try:
        return _measure_base(bench, Part.find)
    except NotStored:
        return None


def run_cell(bench: Bench, cell: Cell) -> Measured:
    """Plan, merge and measure one cell; what is stored is not done again.

    Raises:
        PlanError: if the method cannot reach the target.
        NumericsError: if the candidate's outputs are not finite.
        MkaError: whatever else is refused.
    """
    try:
        return _walk(bench, cell)
    except _Changed:
        return _walk(bench, cell)


def find_cell(bench: Bench, cell: Cell) -> Measured | None:
    """Return what is stored of a cell; None if something is missing."""
    try:
        return _walk(bench, cell, stored=True)
    except NotStored:
        return None


def sweep_leftovers(work: Path) -> None:
    """Remove merged models that killed runs left; those that somebody works on stay."""
    from filelock import FileLock, Timeout

    for left in (work / "bench").glob("[!.]*"):
        try:
            with FileLock(left.with_name(f".{left.name}.lock"), timeout=0):
                if left.is_dir():  # of an earlier release
                    shutil.rmtree(left, ignore_errors=True)
                    continue
                discard(work / "stages" / left.read_text(encoding="utf-8"))
                left.unlink()
        except Timeout:
            continue


def _measure_base(bench: Bench, get: Get) -> Measured:
    facts = describe_checkpoint(bench.base)
    facts.pop("path")
    return measure(bench, None, MeasuredModel(bench, lambda: bench.base.path), facts, {}, get, reused=True)


def _walk(bench: Bench, cell: Cell, stored: bool = False) -> Measured:
    """Run the pipeline of a cell as far as its model, and measure that; with ``stored`` nothing is made."""
    job = bench.jobs[cell.key]

    def run_stage(stage: Stage, job: Job, found: Found) -> Product:
        if not stored:
            return stage.produce(job, found, bench.stages)
        if (product := stage.find(job, found, bench.stages)) is None:
            raise NotStored
        return product

    with bench.building:
        found = run(job, run_stage, until="plan")
    seconds = {name: product.seconds for name, product in found.items()}
    reused = all(product.reused for product in found.values())
    with ExitStack() as stack:
        borrowed = None
        for stage in (MERGE, *([HEAL] if cell.healed else []), *([QUANTIZE] if cell.is_rounded else [])):
            borrowed = stack.enter_context(_borrow_model(bench, job, found, stage, borrowed, stored))
            with bench.building:
                made = run_stage(FACTS[stage.name], job, found) if stored else borrowed.describe()
            seconds["align" if stage is MERGE and cell.aligned else stage.name] = made.facts["seconds"]
            reused = reused and made.reused
            found = {**found, stage.name: made}
        assert borrowed is not None
        last = borrowed
        model = MeasuredModel(bench, lambda: last.open(made))
        get = Part.find if stored else Part.produce
        return measure(bench, cell, model, made.facts, seconds, get, reused=reused)


@dataclass
class _Borrowed:
    """A model of one cell: made when it is needed, and removed afterwards if nobody else has use for it.

    Attributes:
        bench: the comparison.
        job: of the cell.
        found: the products before it; of a model before it, what is known of that.
        stage: what makes it.
        before: the model it is made of; None if it is made of the base.
        marker: notes that it was made for a comparison.
    """

    bench: Bench
    job: Job
    found: Found
    stage: Stage
    before: "_Borrowed | None"
    marker: Path
    last_use: int | None = None

    def _make(self) -> Product:
        folder = name_folder(self.bench.stages, self.stage.name, self.stage.key(self.job, self.found))
        own, found = self.marker.exists(), self.found
        if not own and not folder.exists():
            self.marker.write_text(folder.name, encoding="utf-8")
        if self.before is not None and not folder.exists():
            found = {**found, self.before.stage.name: self.before._make()}
        product = self.stage.produce(self.job, found, self.bench.stages)
        if product.reused and not own:  # somebody else has made it meanwhile
            self.marker.unlink(missing_ok=True)
        self.last_use = read_use(product.folder)
        return product

    def describe(self) -> Product:
        """Return the stored facts of the model, or make it."""

        def write(_: Path) -> Mapping[str, Any]:
            product = self._make()
            return {**product.facts, "seconds": product.seconds}

        return FACTS[self.stage.name].produce(self.job, self.found, self.bench.stages, write)

    def open(self, facts: Product) -> Path:
        """Return the model's folder; made again if it is gone.

        Raises:
            _Changed: if it is not the model that the facts are of.
        """
        product = self._make()
        if product.facts["digest"] != facts.facts["digest"]:
            discard(facts.folder)
            raise _Changed
        return product.open() / MODEL_FOLDER

    def give_back(self) -> None:
        """Remove the model if it was made for a comparison and nobody else has used it since."""
        if self.marker.exists():
            discard(self.bench.stages / self.marker.read_text(encoding="utf-8"), unless_used_since=self.last_use)
            self.marker.unlink()


@contextmanager
def _borrow_model(
    bench: Bench, job: Job, found: Found, stage: Stage, before: _Borrowed | None, stored: bool
) -> Iterator[_Borrowed]:
    """Have a model of a cell within the block; nobody else measures the same one meanwhile."""
    from filelock import FileLock

    marker = bench.work / "bench" / stage.key(job, found)[:16]
    borrowed = _Borrowed(bench, job, found, stage, before, marker)
    if stored:
        yield borrowed
        return
    marker.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(marker.with_name(f".{marker.name}.lock")):
        try:
            yield borrowed
        finally:
            borrowed.give_back()
