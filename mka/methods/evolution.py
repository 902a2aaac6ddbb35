"""Evolution over whole configurations, chosen by what is left after a repair. The project's own, anchored on EvoPress.

Source of the search: Sieberling et al., "EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search",
arXiv 2410.14649: a (1 + lambda) evolution whose offspring are level switches, compared by KL(base || candidate) on
growing numbers of tokens. Here a candidate is everything a plan can say at the target (`mka.plan.configurations`):
layers and blocks deleted, neighbours summed, the attention of one with the MLP of another. And the survivors are
compared after they were refitted to the base in closed form (`repair: aligned`), since what loses least before a repair
is not what loses least after it; such a plan is meant to be written with ``alignment: {enabled: true}``.

The first generation is what cheap scores propose, and every deletion of one block. Every generation goes up the same
ladder: all candidates on few tokens, the best `survivors` on more, half of them at each further step. The parent gives
way only to a candidate that is better at the top. The search ends when the budget cannot take another candidate up the
ladder; nothing is begun that it could not finish. ``proposal: random`` draws every candidate instead, for comparison.

What is best before a healing is not best after one. So the best `finalists` of all generations are each healed on
`heal_tokens` further tokens (forward KL, all weights from the first change on), and the one that is then nearest to the
base is the plan. What that costs is set aside from the start.
"""

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Literal, cast

import numpy as np
from pydantic import Field, field_validator, model_validator

from mka.errors import NumericsError, PlanError
from mka.evidence.needs import HIDDEN_STATES, REPAIRS, Evidence, Repairs
from mka.evidence.states import HiddenStates, LayerScores
from mka.methods import Method
from mka.plan.budget import Budget, count_healing, count_run, count_walk
from mka.plan.configurations import Configuration, Space, draw_unseen, list_changes, mutate_unseen
from mka.plan.deleting import delete_block, delete_least_important
from mka.plan.grouping import partition_layers
from mka.plan.ladder import Rung, Search
from mka.plan.plan import Decision, MergedLayer, identity_layers
from mka.plan.target import Aim
from mka.sections import Section
from mka.similarity.blocks import cosine_distance, measure_blocks
from mka.similarity.npib import SimilaritySettings, score_similarity

# Known candidates in a row after which a search takes what is near its parent as searched.
TRIES = 200


class Settings(Section):
    """Settings of the evolutionary search."""

    proposal: Literal["evolution", "random"] = Field(
        "evolution", description="'evolution': scores propose, then the best is changed; 'random': all are drawn"
    )
    repair: Literal["aligned", "none"] = Field(
        "aligned", description="'aligned': survivors are compared refitted in closed form; 'none': as they are"
    )
    budget: int = Field(
        400_000, ge=1, description="Forward tokens of the search: one is one token through all layers of the base"
    )
    tokens: tuple[int, ...] = Field(
        (2048, 4096), min_length=1, description="Calibration tokens that candidates are measured on, step by step"
    )
    aligned_tokens: int = Field(4096, ge=1, description="Further calibration tokens that a candidate is refitted on")
    context: int = Field(512, ge=16, description="Tokens per window of calibration text")
    offspring: int = Field(16, ge=1, description="Candidates of a generation behind the first")
    survivors: int = Field(4, ge=1, description="Candidates that are measured a second time; then half at each step")
    largest: int = Field(4, ge=1, le=8, description="Layers in the largest group; 1: layers are only deleted")
    finalists: int = Field(
        2, ge=0, description="Best candidates that are compared after a short healing, two or more; 0: none are"
    )
    heal_tokens: int = Field(4096, ge=1, description="Further calibration tokens that a finalist is healed on")
    seed: int = Field(0, ge=0, description="Draws the candidates")

    @field_validator("tokens")
    @classmethod
    def _growing(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError("every step takes more tokens than the one before it")
        return value

    @field_validator("finalists")
    @classmethod
    def _not_alone(cls, value: int) -> int:
        if value == 1:
            raise ValueError("one finalist is compared with nothing; give 2 or more, or 0")
        return value

    @model_validator(mode="after")
    def _whole_windows(self) -> "Settings":
        short = [n for n in (*self.tokens, self.aligned_tokens, self.heal_tokens) if n % self.context]
        if short:
            raise ValueError(
                f"tokens, aligned_tokens and heal_tokens are whole windows of context {self.context}, not {short[0]}"
            )
        return self


def score(evidence: Evidence, settings: Settings) -> LayerScores:
    """NPIB similarity of every pair of layers, (L, L), with MKA's default settings; it only proposes."""
    assert evidence.states is not None
    found = score_similarity(evidence.states, SimilaritySettings(), "evolution", evidence.on_progress)
    return LayerScores(found.kind, found.values, found.meaning, found.method, {})


# What proposes configurations for the first generation, of a space, hidden states of the base and NPIB similarities.


def _by_influence(space: Space, states: HiddenStates, similarity: np.ndarray) -> Configuration:
    """ShortGPT's: the layers of least Block Influence deleted."""
    return delete_least_important(states.block_influence, space.aim).layers


def _by_block(space: Space, states: HiddenStates, similarity: np.ndarray) -> Configuration:
    """UIDL's, by the cosine: the block deleted across which hidden states turn least."""
    return delete_block(measure_blocks(states.pooled, cosine_distance), space.aim).layers


def _by_blocks(space: Space, states: HiddenStates, similarity: np.ndarray) -> Configuration:
    """Several blocks deleted whose distances add up to the least; each behind a free layer that stays."""
    distance = measure_blocks(states.pooled, cosine_distance)
    return _partition(space, space.removed + 1, lambda a, b: float(distance[a + 1, b]), _keep_first)


def _by_similarity(space: Space, states: HiddenStates, similarity: np.ndarray) -> Configuration:
    """Groups of layers whose ends NPIB finds most alike; the last of each stays."""
    return _partition(space, space.removed + 1, lambda a, b: 1.0 - float(similarity[a, b]), _keep_last)


def _by_merging(space: Space, states: HiddenStates, similarity: np.ndarray) -> Configuration:
    """The same with groups no larger than the largest, their layers summed if they are of one kind."""
    return _partition(space, space.largest, lambda a, b: 1.0 - float(similarity[a, b]), space.average)


def _keep_first(sources: tuple[int, ...]) -> MergedLayer:
    return MergedLayer(sources[:1], (1.0,))


def _keep_last(sources: tuple[int, ...]) -> MergedLayer:
    return MergedLayer(sources[-1:], (1.0,))


def _partition(
    space: Space, largest: int, cost: Callable[[int, int], float], make: Callable[[tuple[int, ...]], MergedLayer]
) -> Configuration:
    free = space.free
    spans = [(a, b) for a in free for b in range(a + 1, min(a + largest, free.stop))]
    found = partition_layers({span: cost(*span) for span in spans}, space.layers, space.aim.layers_out)
    return tuple(make(tuple(range(a, b + 1))) for a, b in found)


PROPOSERS: tuple[Callable[[Space, HiddenStates, np.ndarray], Configuration], ...] = (
    _by_influence,
    _by_block,
    _by_blocks,
    _by_similarity,
    _by_merging,
)


def propose(space: Space, states: HiddenStates, similarity: np.ndarray) -> Iterator[Configuration]:
    """Yield what scores propose, as far as there is such a configuration, then every deletion of one block."""
    for proposer in PROPOSERS:
        try:
            yield proposer(space, states, similarity)
        except PlanError:  # no groups of these sizes make up the target
            continue
    yield from space.list_blocks()


def build_ladder(repairs: Repairs, settings: Settings, layers: int) -> tuple[Rung, ...]:
    """Return the steps a generation goes up, with the most candidates that reach each."""
    kept = [settings.offspring] + [max(1, settings.survivors >> step) for step in range(len(settings.tokens))]

    def at(tokens: int, kept: int) -> Rung:
        return Rung(
            f"divergence:{tokens}",
            kept,
            lambda candidate: repairs.divergence(candidate, tokens),
            lambda candidate: count_run(candidate, tokens),
        )

    rungs = [at(tokens, count) for tokens, count in zip(settings.tokens, kept)]
    if settings.repair == "aligned":
        walked = settings.aligned_tokens + settings.tokens[-1]
        rungs.append(
            Rung(
                "aligned",
                kept[-1],
                lambda candidate: repairs.aligned(candidate),
                lambda candidate: count_walk(candidate, layers, walked),
            )
        )
    return tuple(rungs)


def build_final(repairs: Repairs, settings: Settings, layers: int) -> Rung | None:
    """Return how finalists are compared; None if none are."""
    if not settings.finalists:
        return None
    refitted = settings.aligned_tokens if settings.repair == "aligned" else 0
    tokens = (settings.heal_tokens, settings.tokens[-1], refitted)
    return Rung(
        "healed",
        settings.finalists,
        lambda candidate: repairs.healed(candidate),
        lambda candidate: count_healing(candidate, layers, *tokens),
    )


def begin(space: Space, repairs: Repairs, settings: Settings, budget: Budget) -> Search:
    """Return a search that has measured nothing but the base.

    Args:
        space: of configurations; at least one layer goes.
        repairs: measure candidates.
        settings: of the method.
        budget: what may be spent.

    Raises:
        PlanError: if protection does not let the target be reached, or the budget takes no candidate to the top.
    """
    free, count = space.free, budget.layers
    # Changed from the first free layer on, so that nothing of the base's own run serves it.
    dearest = space.delete(range(free.start, free.start + space.removed))
    search = Search(build_ladder(repairs, settings, count), build_final(repairs, settings, count), budget, dearest)
    base = settings.tokens[-1] * count
    needed = base + search.reserve(1, first=0)
    if not budget.affords(needed):
        healings = f" and {settings.finalists} short healings" if settings.finalists else ""
        raise PlanError(
            f"budget of {settings.budget} forward tokens: the base and one candidate{healings} need "
            f"{-(-needed // count)}; raise the method's budget, or lower its tokens, aligned_tokens, heal_tokens or "
            "finalists"
        )
    budget.spend("base", base)
    return search


def count_units(layers: int, aim: Aim, settings: Settings) -> tuple[int, str]:
    """Return the forward tokens a search will spend, and their unit.

    Raises:
        PlanError: as `begin`, before anything is computed.
    """
    if layers <= aim.layers_out:
        return 0, "tok"
    # Nothing is measured yet.
    begin(Space(((),) * layers, aim, settings.largest), cast(Repairs, None), settings, Budget(settings.budget, layers))
    return settings.budget, "tok"


def decide(evidence: Evidence, scores: LayerScores | None, aim: Aim, settings: Settings) -> Decision:
    """Search; a step's score is the divergence of the whole configuration at the top of the ladder, not healed."""
    repairs = evidence.repairs
    assert scores is not None and repairs is not None
    count = evidence.layers
    if scores.layers != count:
        raise PlanError(f"scores are of {scores.layers} layers, the model has {count}")
    space = Space(evidence.kinds, aim, settings.largest)
    if not space.removed:
        return Decision(identity_layers(count))
    budget = Budget(settings.budget, count, evidence.on_progress)
    search = begin(space, repairs, settings, budget)
    rng = np.random.default_rng(settings.seed)
    if settings.proposal == "evolution":
        search.climb(propose(space, repairs.observe(), scores.values))
    while search.climb(islice(_next_candidates(space, search, settings, rng), settings.offspring)):
        pass
    value, layers = search.top[0]
    if not math.isfinite(value):
        raise NumericsError(f"all {len(search.seen)} configurations that were tried destroy the model")
    healed = search.compare()
    if healed:
        value, layers = search.top[healed.index(min(healed))]
    facts: dict[str, Any] = {
        "budget": settings.budget,
        "spent": round(budget.spent, 3),
        "generations": search.generations,
        "configurations": len(search.seen),
        "measurements": dict(budget.counts),
        "divergence": value,
    }
    if healed:
        facts["finalists"] = [
            {"divergence": before, "healed": after if math.isfinite(after) else None}
            for (before, _), after in zip(search.top, healed)
        ]
    return Decision(layers, list_changes(space, layers, value), facts)


def _next_candidates(
    space: Space, search: Search, settings: Settings, rng: np.random.Generator
) -> Iterator[Configuration]:
    if settings.proposal == "random" or not search.top:
        return draw_unseen(space, search.seen, rng, TRIES)
    return mutate_unseen(space, search.top[0][1], search.seen, rng, TRIES)


METHOD = Method(
    name="evolution",
    summary="Search whole configurations, deletions and merges alike, by the divergence left after a refit",
    label="Evolutionary search over whole configurations, survivors compared refitted",
    source="after arXiv 2410.14649",
    settings=Settings,
    decide=decide,
    needs=lambda settings: frozenset({HIDDEN_STATES, REPAIRS}),
    score=score,
    plan_settings=frozenset(Settings.model_fields),
    units=count_units,
)
