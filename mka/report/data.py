"""What the page and the card are made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mka.evaluation.scores import EvalReport
from mka.plan.plan import MergePlan

if TYPE_CHECKING:
    from mka.evidence.states import LayerScores


@dataclass(frozen=True)
class ReportData:
    """What the page and the card are made of; all but recipe and plan may be absent.

    Attributes:
        recipe: the resolved recipe, JSON-able.
        plan: what was merged.
        scores: what the method saw of the layers.
        base, candidate: their measurements; checkpoint facts alone, with no scores, are enough for a card.
        control: the base rounded alike with all layers kept; the base itself where nothing is done to the weights; None
            where it was not measured.
        gate: ``verdict`` and ``checks``, as `mka.evaluation.gate.GateDecision.to_dict` gives them.
        recoveries: further recoveries to draw, keys as in a check, without threshold.
        provenance: base_model, revision, digest, license, calibration_digest, calibration_rev, code_commit, versions,
            created, command and whatever else; shown in the order given.
        stages: stage -> seconds.
        registered: name of the model it is registered as, once this report is written; None if it is not. Which
            version it became is found by the candidate's digest.
        cached: the candidate's folder is a result in the work folder's store, not a folder of its own.
        alignment: facts of the refit, as `mka.alignment.aligner.Aligner` leaves them.
        rounding: ``how``, and of one that looks at texts ``tokens``, ``context`` and ``bits``, scheme -> share of the
            weights.
        healing: facts of the healing, as `mka.healing.heal.heal_checkpoint` leaves them.
        served: engine -> what it made of the candidate, as `mka.pipeline.serve` keeps it.
    """

    recipe: Mapping[str, Any]
    plan: MergePlan
    scores: "LayerScores | None" = None
    base: EvalReport | None = None
    candidate: EvalReport | None = None
    control: EvalReport | None = None
    gate: Mapping[str, Any] | None = None
    recoveries: tuple[Mapping[str, Any], ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    stages: Mapping[str, float] = field(default_factory=dict)
    registered: str | None = None
    cached: bool = False
    alignment: Mapping[str, Any] | None = None
    healing: Mapping[str, Any] | None = None
    rounding: Mapping[str, Any] | None = None
    served: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
