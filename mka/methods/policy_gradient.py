"""Policy-gradient layer masks: learn every layer's probability of staying from forward passes alone.

Source: Gao et al., "Bypass Back-propagation: Optimization-based Structural Pruning for Large Language Models via Policy
Gradient", arXiv 2406.10576, at the granularity of layers. Each unprotected layer i has a probability s_i of being kept,
``0 <= s_i <= 1`` and ``sum_i s_i = K``, the unprotected layers that remain. A mask m is drawn,
``m_i ~ Bernoulli(s_i)``, the model with these layers is run, and its loss L(m) moves s by the score function
(REINFORCE), with nothing differentiated but the logarithm of the probability of the draw::

    grad E[L] = E[ (L(m) - b) d log p(m) / ds ],    d log p(m) / ds_i = (m_i - s_i) / (s_i (1 - s_i))
    s <- project(s - step * mean over the draws of (L(m) - b) (m - s) / (s (1 - s)))

The baseline b is a moving average of the mean losses of earlier rounds. The K layers of highest probability are kept.

Where this departs from the source:

- The baseline holds earlier rounds only, which leaves the estimate unbiased; the first round only starts it. The source
  takes the current round in as well.
- The sum of the probabilities is held at K, which the source bounds from above. The released code divides by the root
  of ``s (1 - s)``; the formula counts here.
- Every model is measured on the same calibration tokens, the first ``search_tokens``, so a mask that is drawn again has
  the loss it had; the source draws a batch of texts per round. The objective is the source's, the loss of the task;
  ``objective: divergence`` takes KL(base || model) in its place, what searches of this project go by.
- The start by a metric takes the order of Block Influence, not its size, which the first and last layers own.
- A mask that keeps no unprotected layer is drawn again.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
from pydantic import Field

from mka.errors import PlanError
from mka.evidence.needs import DIVERGENCE, HIDDEN_STATES, LOSS, Evidence
from mka.evidence.states import LayerScores
from mka.methods import Method
from mka.plan.deleting import deletable_layers, delete_least_important
from mka.plan.plan import Decision, keep_layers
from mka.plan.target import Aim
from mka.sections import Section
from mka.similarity.blocks import score_influence

# Between the least and the most influential layer at the start, before projection: sure of neither.
SPREAD = 0.5


class Settings(Section):
    """Settings of the policy gradient."""

    budget: int = Field(262_144, ge=1, description="Forward tokens: models measured times tokens each is measured on")
    samples: int = Field(4, ge=1, description="Masks drawn per round")
    step: float = Field(0.03, gt=0, description="Change of a probability per unit of the gradient")
    momentum: float = Field(0.8, ge=0, lt=1, description="Share of the old baseline that a round leaves")
    start: Literal["influence", "uniform"] = Field(
        "influence", description="Probabilities to begin with: by the order of Block Influence, or all equal"
    )
    objective: Literal["loss", "divergence"] = Field(
        "loss", description="Of calibration tokens under a model: their loss (the paper), or KL(base || model)"
    )
    seed: int = Field(0, ge=0, description="Draws the masks")


def project(point: np.ndarray, total: float) -> np.ndarray:
    """Return the point of ``{s: 0 <= s <= 1, sum(s) = total}`` nearest to a point, (n,) float64.

    It is ``clip(point - v, 0, 1)`` for the v that gives the sum (Karush-Kuhn-Tucker). The sum falls with v, linearly
    between the values where an entry reaches 0 or 1, so that v is found exactly.

    Args:
        point: (n,).
        total: from 0 to n.
    """
    bends = np.sort(np.concatenate([point, point - 1.0]))  # (2n,)
    sums = np.clip(point[None] - bends[:, None], 0.0, 1.0).sum(axis=1)  # (2n,), from n down to 0
    return np.clip(point - np.interp(-total, -sums, bends), 0.0, 1.0)


def estimate_gradient(masks: np.ndarray, losses: np.ndarray, baseline: float, keep: np.ndarray) -> np.ndarray:
    """Return the score-function estimate of the gradient of the expected loss by the probabilities, (n,).

    A layer that is certain to stay or to go has no gradient that a draw could show: 0.

    Args:
        masks: draws, (K, n) of 0 and 1.
        losses: of the models they leave, (K,).
        baseline: taken off the losses; it may depend on earlier draws only.
        keep: probabilities, (n,).
    """
    variance = keep * (1.0 - keep)
    scores = np.divide(masks - keep, variance, out=np.zeros(masks.shape), where=variance > 0.0)  # (K, n)
    return (losses - baseline) @ scores / len(losses)


def descend(measure: Callable[[np.ndarray], float], keep: np.ndarray, rounds: int, settings: Settings) -> np.ndarray:
    """Return the probabilities after so many rounds, (n,).

    Args:
        measure: loss of the model a mask leaves, (n,) of bool.
        keep: probabilities to begin with, (n,); their sum stays.
        rounds: how many times masks are drawn; the first only starts the baseline.
        settings: of the method.
    """
    random, total, baseline = np.random.default_rng(settings.seed), float(keep.sum()), 0.0
    for round_ in range(rounds):
        masks = np.stack([_draw(random, keep) for _ in range(settings.samples)])
        losses = np.array([measure(mask) for mask in masks])
        if round_:
            keep = project(keep - settings.step * estimate_gradient(masks, losses, baseline, keep), total)
            baseline = settings.momentum * baseline + (1.0 - settings.momentum) * float(losses.mean())
        else:
            baseline = float(losses.mean())
    return keep


def _draw(random: np.random.Generator, keep: np.ndarray) -> np.ndarray:
    while not (mask := random.random(len(keep)) < keep).any():
        pass
    return mask


def begin(influence: np.ndarray | None, count: int, total: int) -> np.ndarray:
    """Return the probabilities to begin with, (n,): rising with the order of influence, (n,), or all equal."""
    equal = np.full(count, total / count)
    if influence is None or count < 2:
        return equal
    # Of equals the deeper one goes first, as everywhere.
    order = np.lexsort((-np.arange(count), influence)).argsort()
    return project(equal + SPREAD * (order / (count - 1) - 0.5), total)


def decide(evidence: Evidence, scores: LayerScores | None, aim: Aim, settings: Settings) -> Decision:
    """Keep the layers whose probability of staying comes out highest. A step's score is that probability.

    Raises:
        PlanError: if protection leaves too few layers to delete, or the budget is too small for two rounds.
    """
    assert scores is not None
    free = deletable_layers(evidence.layers, aim)
    kept = aim.layers_out - (evidence.layers - len(free))
    if kept == len(free):
        return Decision(keep_layers(range(evidence.layers)))
    measured = evidence.loss if settings.objective == "loss" else evidence.divergence
    assert measured is not None
    rounds, extra = count_rounds(measured.tokens, settings)

    def measure(mask: np.ndarray) -> float:
        gone = {layer for layer, stays in zip(free, mask) if not stays}
        value = measured(keep_layers([i for i in range(evidence.layers) if i not in gone]))
        if evidence.on_progress:
            evidence.on_progress(measured.tokens)
        return value

    importance = np.ones(evidence.layers)
    if kept:
        influence = scores.values[free.start : free.stop] if settings.start == "influence" else None
        importance[free] = descend(measure, begin(influence, len(free), kept), rounds, settings)
    decision = delete_least_important(importance, aim)
    return decision._replace(
        facts={"budget": settings.budget, "spent": (rounds * settings.samples + extra) * measured.tokens if kept else 0}
    )


def count_rounds(tokens: int, settings: Settings) -> tuple[int, int]:
    """Return the rounds that the budget pays for, and how often the base is run, where a model runs on so many tokens.

    Raises:
        PlanError: if they are fewer than two.
    """
    # The base is run as well where it is what models are held against.
    extra = int(settings.objective == "divergence")
    rounds = (settings.budget // tokens - extra) // settings.samples
    if rounds < 2:
        raise PlanError(
            f"a budget of {settings.budget} forward tokens is too small: two rounds of {settings.samples} models, each "
            f"measured on {tokens} tokens, need {(2 * settings.samples + extra) * tokens}; "
            "give a larger budget, fewer samples or fewer search_tokens"
        )
    return rounds, extra


METHOD = Method(
    name="policy_gradient",
    summary="Delete the layers whose learnt probability of staying is least: forward passes only",
    label="Policy gradient, layers deleted by learnt Bernoulli masks",
    source="arXiv 2406.10576",
    settings=Settings,
    decide=decide,
    needs=lambda settings: frozenset({HIDDEN_STATES, LOSS if settings.objective == "loss" else DIVERGENCE}),
    score=partial(score_influence, method="policy_gradient"),
    plan_settings=frozenset(Settings.model_fields),
    units=lambda layers, aim, settings: (settings.budget, "tok"),
    check_search=count_rounds,
)
