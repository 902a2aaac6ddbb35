"""What the head makes of hidden states, and how far two such readings are apart."""

from typing import Any

import torch

from mka.errors import NumericsError


def read_out(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities, (R, V) float32, of R final-normed hidden states, (R, D).

    Raises:
        NumericsError: if the logits are not finite.
    """
    logits = model.lm_head(hidden).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    if not bool(logits.sum().isfinite()):  # NaN and infinity survive a sum
        raise NumericsError("the candidate's logits are NaN or infinite; the merge destroyed the model")
    return torch.log_softmax(logits, dim=-1)


def sum_divergence(base: torch.Tensor, other: torch.Tensor) -> float:
    """Return KL(base || other) of log-probabilities, (R, V) each, summed over the R positions, in nats."""
    return float((base.exp() * (base - other)).sum(dtype=torch.float64))
