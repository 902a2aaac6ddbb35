"""Observe, score, plan, merge, quantize: one call into `mka` each, a guard after it, one stored result."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from mka.evaluation.gate import decide
from mka.evaluation.metrics import list_asked
from mka.evaluation.rules import asks_speed
from mka.evaluation.scores import EvalReport
from mka.evidence.states import HiddenStates, LayerScores
from mka.model.checkpoint import Checkpoint, describe_checkpoint, open_checkpoint
from mka.pipeline.job import resolve_aim
from mka.pipeline.merge import write_aligned, write_merged
from mka.pipeline.observe import observe_checkpoint
from mka.pipeline.plan import alignment_version, fit_folds, plan_layers, tries_alignments
from mka.pipeline.quantize import write_quantized
from mka.pipeline.score import score_layers
from mka.plan.plan import MergePlan
from mka.recipe import GateSettings, Recipe
from mka.store.products import Product, produce
from mka.texts.rows import read_heldout
from mka.transforms.fold import Folds, bind_folds, folds_path, load_folds, serialise_folds
from tasks.calibration import alignment_settings, open_alignment_texts, open_calibration
from tasks.guards import guard
from tasks.guards.checkpoint import checkpoint_suite, checkpoint_table
from tasks.guards.evaluation import evaluation_report_suite, evaluation_report_table
from tasks.guards.hidden_states import hidden_states_suite, hidden_states_table
from tasks.guards.plan import plan_suite, plan_table
from tasks.guards.scores import scores_suite, scores_table
from tasks.machine.workplace import Workplace
from tasks.versioned import Version, table_name

VERSIONS = {"observe": 1, "score": 1, "plan": 1, "merge": 1, "quantize": 1}
STATES_FILE, SCORES_FILE, PLAN_FILE, MODEL_FOLDER = "states.safetensors", "scores.json", "plan.json", "model"


@dataclass(frozen=True)
class Job:
    """What every stage of one run shares.

    Attributes:
        place: its folders.
        recipe: what to do.
        base: facts of the base model, as `tasks.base_model.fetch_base_model` returned them.
        run: name of the flow run, under which checks are filed.
        command: the command line that does the same again.
        versions: what each of the recipe's tables holds at its revision.
        tables: private copies of them.
    """

    place: Workplace
    recipe: Recipe
    base: Mapping[str, Any]
    run: str
    command: str
    versions: Mapping[str, Version]
    tables: Product

    def open_base(self) -> Checkpoint:
        """Open the base; its files were compared with their sums when it was fetched."""
        return open_checkpoint(self.base["path"], verify=False)

    def produce(self, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str], make: Any) -> Product:
        """Store or reuse one stage's result."""
        return produce(self.place.stages, stage, version=VERSIONS[stage], settings=settings, inputs=inputs, make=make)

    def guard(self, name: str, table: Any, expectations: list[Any]) -> None:
        """Hold a table against its suite; a failure stops the run here."""
        guard.check(name, table, expectations, self.place.checks, self.run)


@task(task_run_name="observe {job.base[layers]} layers", cache_policy=NO_CACHE)
def observe(job: Job, calibration: Product) -> Product:
    """Observe the base model's hidden states on the calibration set.

    Raises:
        NumericsError: if hidden states are not finite.
        GuardError: if their summary breaks an expectation.
    """
    settings = job.recipe.calibration

    def make(folder: Path) -> Mapping[str, Any]:
        states = observe_checkpoint(job.open_base(), open_calibration(calibration), settings, job.recipe.model)
        samples = len(states.tokens)
        job.guard("hidden_states", hidden_states_table(states.pooled), hidden_states_suite(states.layers, samples))
        states.save(folder / STATES_FILE)
        return {"layers": states.layers, "samples": samples, "tokens": int(states.tokens.sum())}

    keyed = settings.model_dump(include={"max_tokens", "pooling"}) | {"dtype": job.recipe.model.dtype}
    return job.produce("observe", keyed, {"base": job.base["digest"], "calibration": calibration.facts["digest"]}, make)


@task(task_run_name="score layers by {job.recipe.method.name}", cache_policy=NO_CACHE)
def score(job: Job, states: Product) -> Product:
    """Score the layers.

    Raises:
        NumericsError: if scores are NaN, infinite or out of range.
        GuardError: if the score table breaks an expectation.
    """

    def make(folder: Path) -> Mapping[str, Any]:
        loaded = HiddenStates.load(states.folder / STATES_FILE)
        scores = score_layers(job.recipe.method, job.open_base(), loaded)
        if scores is None:
            return {"kind": None}
        job.guard("scores", scores_table(scores.values, scores.kind), scores_suite(scores.kind, scores.layers))
        scores.save(folder / SCORES_FILE)
        return {"kind": scores.kind, "meaning": scores.meaning}

    return job.produce("score", job.recipe.method.model_dump(mode="json"), {"states": states.digest}, make)


@task(task_run_name="plan merges by {job.recipe.method.name}", cache_policy=NO_CACHE)
def plan(job: Job, calibration: Product, scores: Product | None) -> Product:
    """Decide which layers become one.

    Raises:
        RecipeError: if the target cannot be met.
        PlanError: if nothing mergeable is left before it is.
        GuardError: if the plan breaks an expectation.
    """
    recipe = job.recipe

    def make(folder: Path) -> Mapping[str, Any]:
        base = job.open_base()
        made = plan_layers(
            recipe.method,
            recipe.target,
            base,
            open_scores(scores),
            open_calibration(calibration),
            recipe.calibration,
            recipe.model,
        )
        folds = fit_folds(recipe.method, made, base, open_calibration(calibration), recipe.calibration, recipe.model)
        made = bind_folds(made, folds)
        kinds = ["/".join(str(value) for value in kind) for kind in base.kinds]
        layers_out = resolve_aim(recipe.target, base).layers_out
        job.guard("plan", plan_table(made, kinds), plan_suite(layers_out))
        (folder / PLAN_FILE).write_text(made.to_json(), encoding="utf-8")
        if folds:
            folds_path(folder / PLAN_FILE).write_bytes(serialise_folds(folds))
        return {"layers_in": made.layers_in, "layers_out": made.layers_out, "layer_ratio": made.layer_ratio}

    keyed: dict[str, Any] = {
        "method": recipe.method.model_dump(mode="json"),
        "target": recipe.target.model_dump(mode="json"),
        "calibration": recipe.calibration.model_dump(include={"max_tokens", "pooling", "search_tokens"}),
        "dtype": recipe.model.dtype,
    }
    if tries_alignments(recipe.method):
        keyed["alignment_version"] = alignment_version()
    inputs = {"base": job.base["digest"], "calibration": calibration.facts["digest"]}
    return job.produce("plan", keyed, inputs | ({"scores": scores.digest} if scores else {}), make)


@task(task_run_name="merge {job.base[layers]} layers into {plan.facts[layers_out]}", cache_policy=NO_CACHE)
def merge(job: Job, plan: Product, alignment: Product | None = None) -> Product:
    """Write the merged checkpoint; with an alignment table, refit it meanwhile.

    Raises:
        CheckpointError: if what was written does not load whole.
        OutputError: if it cannot be written.
        NumericsError: if a fit is not finite.
        GuardError: if the checkpoint's facts break an expectation.
    """
    recipe = job.recipe

    def make(folder: Path) -> Mapping[str, Any]:
        made, output = open_plan(plan), folder / MODEL_FOLDER
        if alignment is None:
            facts = write_merged(made, job.open_base(), output, open_folds(plan, made))
            return _guarded_checkpoint(job, folder, facts, made.layers_out)
        texts = open_alignment_texts(alignment)
        facts = write_aligned(made, job.open_base(), texts, recipe.alignment, recipe.model, output)
        return _guarded_checkpoint(job, folder, facts, made.layers_out) | {"alignment": facts["alignment"]}

    keyed: dict[str, Any] = {}
    inputs = {"base": job.base["digest"], "plan": plan.digest}
    if alignment is not None:
        keyed = alignment_settings(recipe) | {"dtype": recipe.model.dtype, "version": alignment_version()}
        inputs |= {"alignment": alignment.facts["digest"]}
    return job.produce("merge", keyed, inputs, make)


@task(task_run_name="quantize to {job.recipe.quantize.scheme}", cache_policy=NO_CACHE)
def quantize(job: Job, merged: Product) -> Product:
    """Write the quantized checkpoint, or hand the merged one on if quantization is off.

    Raises:
        RecipeError: if the group size does not fit.
        CheckpointError: if what was written does not load whole.
        GuardError: if the checkpoint's facts break an expectation.
    """
    settings = job.recipe.quantize
    if settings.scheme == "off":
        return merged

    def make(folder: Path) -> Mapping[str, Any]:
        source = open_checkpoint(merged.folder / MODEL_FOLDER, verify=False)
        facts = write_quantized(source, settings, folder / MODEL_FOLDER)
        return _guarded_checkpoint(job, folder, facts, source.layers)

    return job.produce("quantize", settings.model_dump(), {"merged": merged.digest}, make)


def _guarded_checkpoint(job: Job, folder: Path, found: Mapping[str, Any], layers: int) -> dict[str, Any]:
    job.guard("checkpoint", checkpoint_table(found), checkpoint_suite(layers))
    facts = describe_checkpoint(open_checkpoint(folder / MODEL_FOLDER, verify=False))
    # What a user loads counts parameters after unpacking; the path changes when the folder is published.
    facts |= {"parameters": found["parameters"], "dtype": describe_dtype(job.recipe, facts["dtype"])}
    facts.pop("path")
    return facts


def describe_dtype(recipe: Recipe, dtype: str) -> str:
    """Say what the weights are stored as, e.g. "int8 in groups of 64"."""
    if recipe.quantize.scheme == "off" or dtype not in ("I32", "I8"):
        return dtype
    return f"{recipe.quantize.scheme} in groups of {recipe.quantize.group_size}"


def open_scores(product: Product | None) -> LayerScores | None:
    """Read a score stage's result; None for methods that do not score."""
    return LayerScores.load(product.folder / SCORES_FILE) if product and product.facts["kind"] else None


def open_plan(product: Product) -> MergePlan:
    """Read a plan stage's result."""
    return MergePlan.load(product.folder / PLAN_FILE)


def open_folds(product: Product, plan: MergePlan) -> Folds | None:
    """Read the folds of a plan stage's result; None if its plan needs none."""
    return load_folds(plan, product.folder / PLAN_FILE)


VERSION = 1
REPORT_FILE = "evaluation.json"


@task(task_run_name="evaluate {role}", cache_policy=NO_CACHE)
def evaluate(job: Job, role: str, facts: Mapping[str, Any], fetch: Callable[[], Path] | None = None) -> Product:
    """Measure one checkpoint from disk.

    Args:
        job: the run.
        role: "base", "candidate" or "champion".
        facts: path, digest, layers, parameters, bytes of the checkpoint; its digest alone, if ``fetch`` is given.
        fetch: brings the checkpoint here; called only if its measurement is not stored.

    Raises:
        CheckpointError: if it does not load whole.
        NumericsError: if its outputs are not finite.
    """
    from mka.evaluation.evaluate import evaluate_checkpoint

    recipe = job.recipe
    settings = recipe.evaluation

    def make(folder: Path) -> Mapping[str, Any]:
        text = settings.text
        tasks_folder = settings.tasks_folder
        found = describe_checkpoint(open_checkpoint(fetch(), verify=False)) if fetch else facts
        report = evaluate_checkpoint(
            found["path"],
            settings.model_copy(
                update={"tasks_folder": job.tables.folder / table_name(tasks_folder) if tasks_folder else None}
            ),
            dtype=recipe.model.dtype,
            seed=recipe.seed,
            trust_remote_code=recipe.model.trust_remote_code,
            heldout=read_heldout(job.tables.folder / table_name(text)) if text else {},
            checkpoint_facts=found,
            command=job.command,
            speed=False,
            base=job.base["path"] if role == "candidate" else None,
        )
        (folder / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
        return {"scores": {f"{s.name} {s.metric}": s.value for s in report.scores}}

    used = [p for p in (settings.text, settings.tasks_folder if settings.tasks else None) if p is not None]
    inputs = {table_name(p): job.versions[str(p)].digest for p in used} | {"checkpoint": facts["digest"]}
    keyed = settings.model_dump(mode="json", exclude={"text", "tasks_folder", "overlap_index"})
    keyed |= {"seed": recipe.seed, "dtype": recipe.model.dtype}
    if role == "candidate" and not all(metric.of_base for metric in list_asked(settings)):
        inputs["base"] = job.base["digest"]
    return produce(job.place.stages, "evaluate", version=VERSION, settings=keyed, inputs=inputs, make=make)


@task(task_run_name="compare speed", cache_policy=NO_CACHE)
def compare_speeds(job: Job, candidate: Mapping[str, Any]) -> Product:
    """Time base and candidate in turns on this machine.

    Raises:
        CheckpointError: if one does not load whole.
    """
    from mka.evaluation.speed import compare_checkpoint_speed

    recipe = job.recipe
    settings: dict[str, Any] = {
        "dtype": recipe.model.dtype,
        "new_tokens": recipe.evaluation.new_tokens,
        "seed": recipe.seed,
    }

    def make(folder: Path) -> Mapping[str, Any]:
        folders = {"base": job.base["path"], "candidate": candidate["path"]}
        return compare_checkpoint_speed(folders, trust_remote_code=recipe.model.trust_remote_code, **settings)

    inputs = {"base": job.base["digest"], "candidate": candidate["digest"]}
    return produce(job.place.stages, "speed", version=VERSION, settings=settings, inputs=inputs, make=make)


@task(task_run_name="gate", cache_policy=NO_CACHE)
def decide_gate(
    job: Job,
    base: Product,
    candidate: Product,
    thresholds: GateSettings | None = None,
    speeds: Product | None = None,
) -> Product:
    """Guard both reports and decide whether the candidate keeps enough of its base.

    Args:
        job: the run.
        base: measurement of the base, or of whatever else the candidate is held against.
        candidate: measurement of the candidate.
        thresholds: default: those of the recipe.
        speeds: of both, for rules about speed.

    Raises:
        GuardError: if the reports break an expectation or were not measured alike.
    """
    thresholds = thresholds or job.recipe.gate

    def make(folder: Path) -> Mapping[str, Any]:
        before, after = open_report(base, speeds, "base"), open_report(candidate, speeds, "candidate")
        job.guard("evaluation_report", evaluation_report_table(before, after), evaluation_report_suite())
        return decide(before, after, thresholds, seed=job.recipe.seed).to_dict()

    keyed = thresholds.model_dump(exclude={"champion_recovery"}) | {"seed": job.recipe.seed}
    inputs = {"base": base.digest, "candidate": candidate.digest}
    speeds = speeds if asks_speed(thresholds) else None
    inputs |= {"speeds": speeds.digest} if speeds else {}
    return produce(job.place.stages, "gate", version=VERSION, settings=keyed, inputs=inputs, make=make)


def open_report(product: Product, speeds: Product | None = None, role: str = "") -> EvalReport:
    """Read an evaluation stage's result, with the speed that was measured in turns with the other model's."""
    report = EvalReport.load(product.folder / REPORT_FILE)
    return report if speeds is None else replace(report, speed=speeds.facts[role])
