"""NPIB similarity of layers: diffusion coordinates of each layer's output, information shared by each pair."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from pydantic import Field

from mka.errors import NumericsError
from mka.evidence.states import HiddenStates, LayerScores
from mka.sections import Section


class SimilaritySettings(Section):
    """Settings of the diffusion map and of the information estimate."""

    kernel_exponent: float = Field(
        0.5, gt=0, le=2, description="p of exp(-(d/sigma)^p); 2 is Gaussian and breaks on massive activations"
    )
    bandwidth: Literal["median"] | float = Field("median", description="sigma: 'median' distance, or a number")
    alpha: float = Field(0.5, ge=0, le=1, description="Density normalisation; 1 removes sampling density")
    coordinates: int = Field(2, ge=1, le=3, description="Diffusion coordinates K; k-NN information saturates above 3")
    neighbours: int = Field(5, ge=1, description="k of the nearest-neighbour estimators")
    normalisation: Literal["self", "paper"] = Field(
        "self",
        description="'self': I(X;Y)/sqrt(I(X;X) I(Y;Y)); 'paper': by differential entropies, refused out of range",
    )


def embed_layers(states: HiddenStates, settings: SimilaritySettings) -> np.ndarray:
    """Diffusion coordinates of every layer output, (L, N, K)."""
    # SciPy takes half a second to import; `mka methods` only lists settings.
    from mka.similarity.diffusion import diffusion_map

    embedded = []
    for index, layer in enumerate(states.outputs):
        try:
            embedding = diffusion_map(
                layer.astype(np.float64),
                coordinates=settings.coordinates,
                exponent=settings.kernel_exponent,
                bandwidth=settings.bandwidth,
                alpha=settings.alpha,
            )
        except NumericsError as error:
            raise NumericsError(f"layer {index}: {error}") from None
        embedded.append(embedding.coordinates)
    return np.stack(embedded)


def score_similarity(
    states: HiddenStates, settings: SimilaritySettings, method: str, on_progress: Callable[[int], Any] | None = None
) -> LayerScores:
    """NPIB similarity of every pair of layers, (L, L).

    Args:
        states: of the base.
        settings: of diffusion map and estimate.
        method: who asks, for the record.
        on_progress: called with the number of pairs done.

    Raises:
        NumericsError: if an embedding or a similarity cannot be had.
    """
    from mka.similarity.information import npib_matrix

    values = npib_matrix(
        embed_layers(states, settings),
        neighbours=settings.neighbours,
        normalisation=settings.normalisation,
        progress=on_progress,
    )
    meaning = f"NPIB similarity of layer outputs ({settings.normalisation}-normalised; 1: same, 0: independent)"
    return LayerScores("pairwise-similarity", values, meaning, method, settings.model_dump(mode="json"))
