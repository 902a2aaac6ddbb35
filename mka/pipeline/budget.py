"""What bytes buy: for every number of layers what depth loses, and what the bits lose that are left for them.

Both in nats per token on calibration text: of depth the divergence that a plan leaves, refitted if the recipe refits;
of bits the sum that mixed bits are chosen by (docs/method.md, 8), with the noise of the base's own layers. That sum
expects rounding to the nearest, and calibrated rounding leaves less: how much less is measured once, with all layers,
on windows that it has not looked at. That damages of both kinds add up is an assumption; `mka frontier` measures.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka.alignment.gptq import MEASURED, cut_windows, measure_damage
from mka.errors import CalibrationError, PlanError, RecipeError
from mka.pipeline.job import Job
from mka.pipeline.pipeline import run
from mka.pipeline.plan import open_plan
from mka.pipeline.stage import tell_product
from mka.pipeline.target import foresee_rounded, least_bytes, settle
from mka.plan.target import Aim
from mka.terminal import show_progress
from mka.transforms import list_options
from mka.transforms.allocation import allocate, sum_damage
from mka.transforms.formats import describe_scheme

if TYPE_CHECKING:
    import numpy as np

    from mka.alignment.sensitivity import Unit
    from mka.plan.plan import MergedLayer, MergePlan

# Windows that a plan is refitted on before it is measured.
FITTED = 8
# What all layers have where it is measured how much calibrated rounding leaves.
SEEN_AT = "int3"


@dataclass(frozen=True)
class Offer:
    """What a number of layers comes to in so many bytes.

    Attributes:
        layers: that remain.
        nbytes: of all tensors.
        bits: per weight of the linear layers, scales included; None if even the fewest take more.
        depth: nats per token that fewer layers lose; None if the method cannot reach so few.
        rounding: nats per token that those bits lose, by the share of what is expected that was measured; None without
            bits.
        refusal: why there is no such model; None if there is one.
    """

    layers: int
    nbytes: float
    bits: float | None
    depth: float | None
    rounding: float | None
    refusal: str | None = None

    @property
    def total(self) -> float | None:
        """Both together."""
        return None if self.rounding is None or self.depth is None else self.depth + self.rounding


@dataclass(frozen=True)
class Share:
    """What calibrated rounding leaves of the loss that is expected of rounding to the nearest.

    Attributes:
        nbytes: of all tensors, with all layers, where it was measured.
        expected: nats per token.
        measured: nats per token, on windows that were not looked at.
    """

    nbytes: float
    expected: float
    measured: float

    @property
    def value(self) -> float:
        """Measured over expected; 1 where nothing is expected."""
        return self.measured / self.expected if self.expected > 0 else 1.0


def propose(
    job: Job, store: Path, depths: Sequence[int], budgets: Sequence[float], refit: bool
) -> tuple[list[Offer], Share]:
    """Return what every number of layers comes to within every budget, and how much calibrated rounding leaves.

    Plans are made and stored as the pipeline does. What the method cannot reach is an offer that says so.

    Args:
        job: of a recipe whose `quantize` mixes schemes, with calibration texts.
        store: folder of all results.
        depths: numbers of layers.
        budgets: bytes of all tensors.
        refit: whether plans are measured refitted in closed form.

    Raises:
        PlanError: if the method can reach none of the depths.
        CalibrationError: if there is too little text.
        MkaError: whatever a stage refuses.
    """
    from mka.model.loading import open_decoder

    plans, refused = _plan_all(job, store, depths)
    settings, source, calibration = job.recipe.quantize, job.recipe.model, job.inputs.calibration
    assert calibration is not None
    with open_decoder(job.base, source.dtype, source.trust_remote_code) as (decoder, tokenizer):
        windows = cut_windows(job.base, settings, tokenizer, calibration.texts)
        if len(windows) <= MEASURED:
            raise CalibrationError(
                f"the calibration texts make {len(windows)} windows of {windows.shape[1]} tokens, {MEASURED + 1} are "
                "needed; give more text"
            )
        lost = _measure_depth(job, plans, decoder, windows, refit)
        units, damage, taken = measure_damage(job.base, settings, decoder, windows[:MEASURED])
        share = _measure_share(job, decoder, windows, (units, damage, taken))
    measured = (units, damage * share.value, taken)
    offers = [
        Offer(layers, nbytes, None, None, None, refused[layers])
        if layers in refused
        else _offer(job, plans[layers], lost[layers], nbytes, *measured)
        for nbytes in budgets
        for layers in depths
    ]
    return offers, share


def _plan_all(job: Job, store: Path, depths: Sequence[int]) -> "tuple[dict[int, MergePlan], dict[int, str]]":
    """Return the plan of each depth that can be reached, and of the others why not."""
    plans, refused = {}, {}
    for layers in depths:
        try:
            plans[layers] = _plan(job, store, layers)
        except PlanError as error:
            refused[layers] = str(error)
            if len(refused) == len(depths):
                raise
    return plans, refused


def _plan(job: Job, store: Path, layers: int) -> "MergePlan":
    aim = Aim(layers, job.aim.protect_first, job.aim.protect_last)
    found = run(
        replace(job, aim=aim),
        lambda stage, one, before: stage.produce(one, before, store),
        until="plan",
        tell=lambda name, product: tell_product(f"{name}, {layers} layers", product),
    )
    plan, folds = open_plan(found)
    if folds:
        raise RecipeError(
            f"method {job.planner.name!r} folds a correction into the model, which is not measured here; name another"
        )
    return plan


def _measure_depth(
    job: Job, plans: "dict[int, MergePlan]", decoder: Any, windows: Any, refit: bool
) -> dict[int, float]:
    from mka.evidence.repairs import MeasuredRepairs

    measured, fitted = windows[:MEASURED], windows[MEASURED : MEASURED + FITTED]
    repairs = MeasuredRepairs(decoder, measured, fitted)

    def measure(layers: "tuple[MergedLayer, ...]") -> float:
        if len(layers) == job.base.layers:
            return 0.0
        return repairs.aligned(layers) if refit else repairs.divergence(layers, measured.numel())

    found = {}
    with show_progress("measure depths", len(plans), "plan") as advance:
        for layers, plan in plans.items():
            found[layers] = measure(plan.layers)
            advance(1)
    return found


def _measure_share(job: Job, decoder: Any, windows: Any, found: Any) -> Share:
    """Round all layers once, in as many bytes as three bits take, whatever is asked for, and write nothing."""
    import torch

    from mka.alignment.rounding import Rounding

    (units, damage, taken), settings, base = found, job.recipe.quantize, job.base
    names = list_options(settings)
    # Fewer bits lose much, more lose next to nothing, of which no share can be told.
    alike = settle(settings, SEEN_AT if SEEN_AT in names else names[-1])
    nbytes = float(foresee_rounded(base, alike, base.layers))
    options = _share_out(job, base.layers, nbytes, damage, taken)
    chosen = {(index, name): names[option] for (index, own), option in zip(units, options) for name in own}

    def describe(index: int, name: str) -> Any:
        return describe_scheme(chosen[index, name], settings.group_size), torch.float32

    # Those that damage was measured on come last and are not looked at.
    looked_at = torch.cat([windows[MEASURED:], windows[:MEASURED]])
    walk = Rounding(decoder, looked_at, describe, follows=settings.rounding == "gptaq", heldout=MEASURED)
    with show_progress("round layers", base.layers, "layer") as advance:
        for _ in walk.round_layers(advance):
            pass
    return Share(nbytes, sum_damage(damage, options), walk.measure_loss())


def _share_out(job: Job, layers: int, nbytes: float, damage: "np.ndarray", taken: "np.ndarray") -> "np.ndarray":
    """Choose an option for each unit of so many layers, (U,), so that all tensors keep to the bytes."""
    # What is written beside the units: all, less what the smallest scheme takes of them.
    beside = least_bytes(job.base, job.recipe.quantize, layers) - taken.min(axis=1).sum() / 8
    return allocate(damage, taken, 8 * (nbytes - beside))


def _offer(
    job: Job,
    plan: "MergePlan",
    lost: float,
    nbytes: float,
    units: Sequence["Unit"],
    damage: "np.ndarray",
    taken: "np.ndarray",
) -> Offer:
    layers = len(plan.layers)
    if nbytes < least_bytes(job.base, job.recipe.quantize, layers):
        return Offer(layers, nbytes, None, lost, None, "too few bytes")
    kept = {layer.leader for layer in plan.layers}
    rows = [place for place, (index, _) in enumerate(units) if index in kept]
    found = _share_out(job, layers, nbytes, damage[rows], taken[rows])
    bits = float(taken[rows, found].sum()) / sum(_count_weights(job, units[row]) for row in rows)
    return Offer(layers, nbytes, bits, lost, sum_damage(damage[rows], found))


def _count_weights(job: Job, unit: "Unit") -> int:
    index, names = unit
    return sum(job.base.tensors[job.base.family.layer_tensor(index, f"{name}.weight")].parameters for name in names)


def list_depths(job: Job) -> list[int]:
    """Return numbers of layers worth a look where none is named: all, and four fewer ones down to two thirds."""
    count = job.base.layers
    fewest = max(job.aim.protect_first + job.aim.protect_last + 1, round(2 * count / 3))
    return sorted({round(count - (count - fewest) * step / 4) for step in range(5)}, reverse=True)


def list_budgets(job: Job) -> list[float]:
    """Return bytes where none are named: of all layers in 4, 3 and 2 bits, and half way between the last two."""
    alike = [settle(job.recipe.quantize, name) for name in ("int4", "int3", "int2")]
    four, three, two = (foresee_rounded(job.base, settings, job.base.layers) for settings in alike)
    return [float(four), float(three), float(round((three + two) / 2)), float(two)]
