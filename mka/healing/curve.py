"""The curve of a healing: what it fell by, and what more tokens would give if it went on like this."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import nnls

# Exponents tried of a power law; published ones of language models lie between 0.05 and 1.
EXPONENTS = np.arange(0.05, 1.5, 0.01)
# A law of three parameters says nothing about fewer points.
FEWEST = 4
# Times the tokens read that a prediction is made for.
FURTHER = (2, 10)
# A held-out divergence that has grown this much is not coming back.
DIVERGED = 2.0


def read_curve(history: list[dict[str, float]], tokens: int) -> list[dict[str, Any]]:
    """Return a point per logged step: step, tokens read, and of loss, rate and held-out divergence what was noted.

    Args:
        history: of the Trainer.
        tokens: per step.
    """
    points: dict[int, dict[str, Any]] = {}
    names = {"loss": "loss", "learning_rate": "rate", "eval_loss": "heldout"}
    for entry in history:
        step = int(entry["step"])
        noted = {name: entry[key] for key, name in names.items() if key in entry}
        if noted:
            points.setdefault(step, {"step": step, "tokens": step * tokens}).update(noted)
    return [points[step] for step in sorted(points)]


def has_diverged(history: Sequence[Mapping[str, float]]) -> bool:
    """Say whether a loss is not finite, or the held-out divergence has grown by too much.

    Args:
        history: of the Trainer.
    """
    measured = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return any(not math.isfinite(entry.get("loss", 0.0)) for entry in history) or any(
        not value <= DIVERGED * measured[0] for value in measured
    )


def is_worse(history: Sequence[Mapping[str, float]]) -> bool:
    """Say whether the first measurement of the held-out source after the start is worse than the start.

    Args:
        history: of the Trainer.
    """
    measured = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return len(measured) > 1 and not measured[1] <= measured[0]


def fit_power_law(tokens: Sequence[float], losses: Sequence[float]) -> tuple[float, float, float]:
    """Fit ``loss = floor + scale * tokens^-exponent`` by least squares.

    For a given exponent the other two are linear and at least 0; the exponent is the best of `EXPONENTS`.

    Args:
        tokens: read so far, above 0, of N points.
        losses: in nats per token, of N points.

    Returns:
        floor, scale, exponent.
    """
    read, wanted = np.asarray(tokens, float), np.asarray(losses, float)
    fits = []
    for exponent in EXPONENTS:
        (floor, scale), error = nnls(np.stack([np.ones_like(read), read**-exponent], axis=1), wanted)
        fits.append((error, float(floor), float(scale), float(exponent)))
    return min(fits)[1:]


def predict(curve: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Predict the held-out divergence after more tokens, from the points of one run.

    A guess: the points of a falling learning rate are not those of runs that end there, and the law is one of many.

    Args:
        curve: points with "tokens" and, where it was measured, "heldout".

    Returns:
        Tokens, as text -> nats per token; empty if there are too few points, or they promise nothing.
    """
    points = [(point["tokens"], point["heldout"]) for point in curve if point["tokens"] and "heldout" in point]
    if len(points) < FEWEST or not points[-1][1] < points[0][1]:
        return {}
    floor, scale, exponent = fit_power_law(*zip(*points))
    further = [times * points[-1][0] for times in FURTHER]
    guesses = {str(tokens): floor + scale * tokens**-exponent for tokens in further}
    # A law that promises no more than what is there already was fitted to noise.
    return guesses if max(guesses.values()) < min(value for _, value in points) else {}
