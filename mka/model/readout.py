"""What the head makes of hidden states, and how far two such readings are apart."""

import torch

from mka.errors import NumericsError
from mka.model.decoder import Decoder


def read_logits(decoder: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits, (R, V) float32, of R final-normed hidden states, (R, D); the head must be held."""
    logits = decoder.family.get_head(decoder.model)(hidden).float()
    cap = getattr(decoder.model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def read_out(decoder: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities, (R, V) float32, of R final-normed hidden states, (R, D); the head must be held.

    Raises:
        NumericsError: if the logits are not finite.
    """
    logits = read_logits(decoder, hidden)
    if not bool(logits.sum().isfinite()):  # NaN and infinity survive a sum
        raise NumericsError("the candidate's logits are NaN or infinite; the merge destroyed the model")
    return torch.log_softmax(logits, dim=-1)


def sum_divergence(base: torch.Tensor, other: torch.Tensor) -> float:
    """Return KL(base || other) of log-probabilities, (R, V) each, summed over the R positions, in nats."""
    return float((base.exp() * (base - other)).sum(dtype=torch.float64))
