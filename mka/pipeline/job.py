"""What one compression is about to do: resolved and opened once, everything checked that needs no run of the model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mka.alignment.table import fit_windows
from mka.engines.loadable import check_engines
from mka.errors import RecipeError
from mka.evaluation.catalog import open_catalog
from mka.evidence.needs import REPAIRS, TRIALS
from mka.healing.table import cut_healing
from mka.methods import Planner, check_alignment, resolve_method
from mka.model.checkpoint import Checkpoint
from mka.pipeline.inputs import Inputs, check_evaluation, check_measured, check_named, read_inputs, want_own_text
from mka.pipeline.target import refuse_bytes, resolve_aim
from mka.pipeline.written import open_own_text
from mka.plan.target import Aim
from mka.recipe import ModelSource, Recipe
from mka.sources.fetch import materialize, resolve_revision
from mka.transforms import Treatment, get_quantizer, looks_at_texts, outline_treated, resolve_transforms
from mka.transforms.packing import raise_bytes
from mka.transforms.rewrite import refuse_quantized


@dataclass
class Opened:
    """What is opened with a model while planning.

    Attributes:
        keep: leave it open for the next target of the same method, until `close`; else it is closed after each plan.
    """

    keep: bool = False
    _owner: Any = None
    _parts: Mapping[str, Any] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)

    @contextmanager
    def borrow(
        self, owner: Any, make: Callable[[], AbstractContextManager[Mapping[str, Any]]]
    ) -> Iterator[Mapping[str, Any]]:
        """Have what belongs to an owner within the block; what another had is closed first."""
        if self._owner != owner:
            self.close()
            self._parts = self._stack.enter_context(make())
            self._owner = owner
        try:
            yield self._parts
        finally:
            if not self.keep:
                self.close()

    def close(self) -> None:
        """Let go of what is open."""
        self._owner, self._parts = None, {}
        self._stack.close()


@dataclass(frozen=True)
class Job:
    """One compression, resolved.

    Attributes:
        recipe: as asked for; its tables are read through ``inputs`` only.
        planner: its method with the method's settings.
        base: the opened base checkpoint.
        revision: what pins the base.
        aim: the target in layers.
        inputs: texts and tables.
        treatments: what is done to the merged model, in order.
        command: what makes the same again, for the record.
        output: the folder a person will find the result in; None: where the store keeps it.
        registered: name of the model it is registered as, unless the gate refuses it.
        provenance: what else is known of where everything came from, for the report.
        opened: shared by the jobs of one comparison.
    """

    recipe: Recipe
    planner: Planner
    base: Checkpoint
    revision: str
    aim: Aim
    inputs: Inputs = field(default_factory=Inputs)
    treatments: tuple[Treatment, ...] = ()
    command: str = ""
    output: Path | None = None
    registered: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    opened: Opened = field(default_factory=Opened, compare=False, repr=False)

    @property
    def measured(self) -> bool:
        """Whether base and candidate are measured on anything."""
        return self.inputs.measures

    @property
    def judged(self) -> bool:
        """Whether the gate has something to decide on: without rules it asks for texts and tasks only."""
        return self.measured and bool(self.inputs.heldout or self.inputs.tasks or self.recipe.gate.rules)


def fetch_base(source: ModelSource, work: Path) -> tuple[Checkpoint, str]:
    """Bring a model here, open and check it; returns it with what pins it.

    Raises:
        CheckpointError: if it cannot be had, is damaged, inconsistent or unsupported.
    """
    from mka.model.stock import open_base

    folder = materialize(source, work)
    base = open_base(folder, trust_remote_code=source.trust_remote_code)
    return base, resolve_revision(source, folder)


def prepare(
    recipe: Recipe,
    work: Path,
    *,
    evaluate: bool = True,
    write: bool = True,
    command: str = "",
    output: Path | None = None,
) -> Job:
    """Check a recipe against its model and its tables; runs nothing, but for a base that has to write a table first.

    Args:
        recipe: the recipe; tables are read from the working copy.
        work: work folder, where models are fetched to.
        evaluate: whether base and candidate are to be measured.
        write: whether the base writes; else texts that say nothing stand in for what it has not written yet.
        command: what was typed.
        output: where the result will be published.

    Raises:
        MkaError: whatever is wrong, before anything is computed.
    """
    planner = resolve_method(recipe.method)
    check_alignment(planner, recipe.alignment.enabled)
    check_engines(recipe)
    wanted = want_own_text(recipe, planner)
    if wanted is None:
        inputs = read_inputs(recipe, planner, evaluate=evaluate)
    else:  # writing takes minutes; what can be refused before is
        check_named(recipe, planner)
        if evaluate:
            heldout = check_evaluation(recipe.evaluation, recipe.evaluation.text, open_catalog(recipe.evaluation))
    base, revision = fetch_base(recipe.model, work)
    check_target(recipe, planner, base)
    if wanted is not None:
        if evaluate:
            check_measured(heldout, recipe.evaluation, base, recipe.seed, recipe.model.trust_remote_code)
        with open_own_text(base, recipe.model, wanted, work / "stages", write=write) as own_text:
            inputs = read_inputs(recipe, planner, evaluate=evaluate, own_text=own_text)
    if inputs.alignment is not None:
        inputs = replace(inputs, alignment=fit_windows(inputs.alignment, base))
    if inputs.healing is not None:
        cut_healing(inputs.healing, base)  # refuses what healing itself would refuse later
    job = open_job(recipe, planner, base, revision, inputs, command=command, output=output)
    check_search(job)
    return job


def check_search(job: Job) -> None:
    """Refuse, before anything is computed, a search whose budget buys nothing with the calibration texts there are.

    Raises:
        PlanError: saying what it takes.
    """
    from mka.evidence.gather import count_searched
    from mka.model.loading import load_tokenizer

    planner, calibration = job.planner, job.inputs.calibration
    check = planner.method.check_search if job.aim.layers_out < job.base.layers else None
    if check is not None and calibration is not None and job.inputs.knows_calibration:
        tokenizer = load_tokenizer(job.base.path, job.recipe.model.trust_remote_code)
        check(count_searched(planner.needs, tokenizer, calibration.texts, job.recipe.calibration), planner.settings)


def check_target(recipe: Recipe, planner: Planner, base: Checkpoint) -> None:
    """Refuse a target that the method cannot reach, or that the base has already with nothing else to do.

    Raises:
        PlanError: as `Planner.check_aim`.
        RecipeError: if all layers remain and nothing is done to the weights, or as `check_feasible`.
        CheckpointError: as `check_feasible`.
    """
    aim = check_feasible(recipe, base)
    planner.check_aim(base.kinds, aim)
    if aim.layers_out == base.layers and not recipe.treats_weights:
        raise RecipeError(
            f"nothing to do: all {base.layers} layers remain ({recipe.target.describe()}) and nothing is rounded or "
            "transformed; aim at fewer layers, or name a scheme in quantize"
        )


def open_job(recipe: Recipe, planner: Planner, base: Checkpoint, revision: str, inputs: Inputs, **more: Any) -> Job:
    """Put a job together from what was resolved, opened and read.

    Raises:
        RecipeError: if the recipe asks for something this model cannot give.
        CheckpointError: if the checkpoint is quantized already.
        CalibrationError: if a text holds what the model has no embedding for.
    """
    aim = check_feasible(recipe, base)
    inputs.refuse_marks(base.rowless)
    if inputs.measures:
        check_measured(inputs.heldout, recipe.evaluation, base, recipe.seed, recipe.model.trust_remote_code)
    # What the base has not written yet is long enough.
    if inputs.calibration is not None and inputs.knows_calibration:
        _check_calibration(recipe, planner, base, inputs.calibration.texts)
    return Job(recipe, planner, base, revision, aim, inputs, resolve_transforms(recipe.transforms), **more)


def _check_calibration(recipe: Recipe, planner: Planner, base: Checkpoint, texts: Sequence[str]) -> None:
    """Refuse what whoever reads the calibration texts would refuse later."""
    from mka.alignment.gptq import cut_windows
    from mka.evidence.gather import check_texts
    from mka.model.loading import load_tokenizer

    if not planner.needs & {TRIALS, REPAIRS} and not looks_at_texts(recipe.quantize):
        return
    tokenizer = load_tokenizer(base.path, recipe.model.trust_remote_code)
    check_texts(planner.needs, planner.settings, base, tokenizer, texts)
    if looks_at_texts(recipe.quantize):
        one = recipe.quantize.model_copy(update={"tokens": 1})
        cut_windows(base, one, tokenizer, texts)


def check_feasible(recipe: Recipe, checkpoint: Checkpoint) -> Aim:
    """Refuse what cannot work with this checkpoint before anything expensive starts; returns the target in layers.

    Raises:
        RecipeError: if the target, a transform, the group size or a task cannot be had.
        CheckpointError: if the checkpoint is quantized already.
    """
    refuse_quantized(checkpoint)
    treatments = resolve_transforms(recipe.transforms)
    aim = resolve_aim(recipe.target, checkpoint, recipe.quantize, treatments)
    *outlines, treated = outline_treated(checkpoint, treatments)
    for treatment, outline in zip(treatments, outlines):
        treatment.transform.check(outline, treatment.settings)
    if recipe.quantize.scheme != "off":
        # Layers that go make room for the budget's bytes.
        get_quantizer(recipe.quantize).check(treated, raise_bytes(treated, recipe.quantize))
        refuse_bytes(treated, recipe.quantize, aim.layers_out)
    catalog = open_catalog(recipe.evaluation)
    catalog.check(catalog.expand(recipe.evaluation.tasks))
    return aim
