"""One cell of a comparison: planned, merged, measured from disk by a stranger's loader; each part stored by content.

The merged folder is deleted once it is measured; what stays are plans, scores and figures.
"""

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mka.bench.measure import MeasuredModel, measure
from mka.bench.parts import Bench, Get, Measured, NotStored, Part
from mka.bench.recipe import Cell
from mka.evidence.needs import DIVERGENCE, LOSS, OUTPUT_SIMILARITY, REOBSERVE
from mka.evidence.states import HiddenStates, LayerScores
from mka.methods import resolve_method
from mka.model.checkpoint import describe_checkpoint, open_checkpoint
from mka.pipeline.merge import write_aligned, write_merged
from mka.pipeline.observe import needs_hidden_states, observe_checkpoint
from mka.pipeline.plan import alignment_version, fit_folds, open_method_oracles, plan_layers, tries_alignments
from mka.pipeline.score import score_layers
from mka.plan.plan import MergePlan
from mka.recipe import Recipe
from mka.store.products import Product
from mka.transforms.fold import bind_folds, folds_path, load_folds, serialise_folds

STATES_FILE, SCORES_FILE, PLAN_FILE = "states.safetensors", "scores.json", "plan.json"


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
        return _walk(bench, cell, Part.produce)
    except _Changed:
        return _walk(bench, cell, Part.produce)


def find_cell(bench: Bench, cell: Cell) -> Measured | None:
    """Return what is stored of a cell; None if something is missing."""
    try:
        return _walk(bench, cell, Part.find)
    except NotStored:
        return None


def sweep_leftovers(work: Path) -> None:
    """Remove merged folders that killed runs left; those that somebody works on stay."""
    from filelock import FileLock, Timeout

    for folder in (work / "bench").glob("[!.]*"):
        try:
            with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
        except Timeout:
            continue


def _measure_base(bench: Bench, get: Get) -> Measured:
    facts = describe_checkpoint(bench.base)
    facts.pop("path")
    return measure(bench, None, MeasuredModel(bench, lambda: bench.base.path), facts, {}, get, reused=True)


def _walk(bench: Bench, cell: Cell, get: Get) -> Measured:
    recipe = bench.recipe.recipe_for(cell)
    with bench.building:
        planned, seconds, reused = _plan(bench, cell, recipe, get)
    inputs = {"base": bench.base.digest, "plan": planned.digest}
    part = bench.part("merge", {}, inputs)
    if cell.aligned:
        settings = recipe.alignment.model_dump(mode="json", exclude={"enabled", "path", "rev"})
        settings |= {"dtype": recipe.model.dtype}
        part = bench.part("align", settings, inputs | {"texts": bench.digests["alignment"]})
    with _reserve_folder(bench, part, get) as folder:
        fresh: dict[str, Any] = {}

        def write(_: Path) -> Mapping[str, Any]:
            fresh.update(_write_candidate(bench, recipe, planned.folder / PLAN_FILE, folder / "model"))
            return fresh

        with bench.building:
            merged = get(part, write)

        def open_folder() -> Path:
            # The facts are stored, but not everything was measured: by a run that was killed, or other texts.
            if not fresh and write(folder)["digest"] != merged.facts["digest"]:
                shutil.rmtree(merged.folder)
                raise _Changed
            return folder / "model"

        seconds[part.stage] = merged.facts["seconds"]
        model = MeasuredModel(bench, open_folder)
        return measure(bench, cell, model, merged.facts, seconds, get, reused=reused and merged.reused)


def _plan(bench: Bench, cell: Cell, recipe: Recipe, get: Get) -> tuple[Product, dict[str, float], bool]:
    method, options = resolve_method(recipe.method)
    resolved = options.model_dump(mode="json")
    base = {"base": bench.base.digest}
    read = {"calibration": bench.calibration.digest} if bench.calibration else {}
    looking = recipe.calibration.model_dump(mode="json", include={"max_tokens", "pooling"})
    looking |= {"dtype": recipe.model.dtype}
    scores: Product | None = None
    seconds: dict[str, float] = {}
    reused = True

    if needs_hidden_states(recipe.method):

        def observe(folder: Path) -> Mapping[str, Any]:
            assert bench.calibration is not None
            made = observe_checkpoint(bench.base, bench.calibration, recipe.calibration, recipe.model)
            made.save(folder / STATES_FILE)
            return {"texts": len(made.tokens), "tokens": int(made.tokens.sum())}

        states = get(bench.part("observe", looking, base | read), observe)

        def score(folder: Path) -> Mapping[str, Any]:
            made = score_layers(recipe.method, bench.base, HiddenStates.load(states.folder / STATES_FILE))
            if made is not None:
                made.save(folder / SCORES_FILE)
            return {"scored": made is not None}

        keyed: dict[str, Any] = {
            "method": method.name,
            "settings": {k: v for k, v in resolved.items() if k not in method.plan_settings},
        }
        scores = get(bench.part("score", keyed, {"states": states.digest}), score)
        seconds |= {"observe": states.seconds, "score": scores.seconds}
        reused = states.reused and scores.reused

    def plan(folder: Path) -> Mapping[str, Any]:
        stored = scores.folder / SCORES_FILE if scores and scores.facts["scored"] else None
        looked_at = (bench.calibration, recipe.calibration, recipe.model)
        oracles = bench.oracles.open(cell.entry, lambda: open_method_oracles(recipe.method, bench.base, *looked_at))
        scored = LayerScores.load(stored) if stored else None
        made = plan_layers(recipe.method, recipe.target, bench.base, scored, *looked_at, oracles=oracles)
        folds = fit_folds(recipe.method, made, bench.base, *looked_at)
        made = bind_folds(made, folds)
        if folds:
            folds_path(folder / PLAN_FILE).write_bytes(serialise_folds(folds))
        (folder / PLAN_FILE).write_text(made.to_json(), encoding="utf-8")
        return {"layers_out": made.layers_out, "removed": list(made.removed)}

    keyed = {
        "method": method.name,
        "settings": resolved,
        "target": recipe.target.model_dump(mode="json"),
    }
    inputs = base | ({"scores": scores.digest} if scores else {})
    if method.fit or method.needs(options) & {REOBSERVE, DIVERGENCE, LOSS, OUTPUT_SIMILARITY}:
        keyed |= looking | recipe.calibration.model_dump(include={"search_tokens"})
        inputs |= read
    if tries_alignments(recipe.method):
        keyed |= {"alignment": alignment_version(), "dtype": recipe.model.dtype}
        inputs |= read
    planned = get(bench.part("plan", keyed, inputs), plan)
    return planned, seconds | {"plan": planned.seconds}, reused and planned.reused


def _write_candidate(bench: Bench, recipe: Recipe, plan_file: Path, output: Path) -> dict[str, Any]:
    plan = MergePlan.load(plan_file)
    started = time.perf_counter()
    # The one place where a candidate is written; whatever a plan needs beside itself is handed over here.
    if recipe.alignment.enabled:
        written = write_aligned(plan, bench.base, bench.alignment, recipe.alignment, recipe.model, output)
    else:
        written = write_merged(plan, bench.base, output, load_folds(plan, plan_file))
    seconds = round(time.perf_counter() - started, 3)
    facts = describe_checkpoint(open_checkpoint(output, verify=False))
    facts.pop("path")
    return facts | {"seconds": seconds, "written": json.loads(json.dumps(dict(written), default=str))}


@contextmanager
def _reserve_folder(bench: Bench, part: Part, get: Get) -> Iterator[Path]:
    """Give a candidate a folder for as long as it is measured; nobody else works on the same one meanwhile."""
    from filelock import FileLock

    folder = bench.work / "bench" / part.key[:16]
    if get is Part.find:
        yield folder
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        try:
            shutil.rmtree(folder, ignore_errors=True)  # of a killed run
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
