"""What the head makes of hidden states, and how far two such readings are apart."""

import torch

from mka.errors import NumericsError
from mka.model.decoder import Decoder
from mka.model.tensors import is_finite


def read_logits(decoder: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits, (R, V) float32, of R final-normed hidden states, (R, D); the head must be held."""
    logits = decoder.family.get_head(decoder.model)(hidden).float()
    cap = getattr(decoder.model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def refuse_overflow(states: torch.Tensor, where: str, otherwise: str) -> None:
    """Refuse hidden states or logits that are not finite.

    Args:
        states: of any shape, in the dtype of the forward passes.
        where: they were found, with what they are.
        otherwise: what is to blame where the dtype holds large numbers.

    Raises:
        NumericsError: with what to do.
    """
    if is_finite(states):
        return
    if states.dtype == torch.float16:
        otherwise = (
            "they overflow float16, which ends at 65504: run the forward passes in float32 or bfloat16 "
            "(--dtype, model.dtype)"
        )
    raise NumericsError(f"{where} are NaN or infinite; {otherwise}")


def read_out(decoder: Decoder, hidden: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities, (R, V) float32, of R final-normed hidden states, (R, D); the head must be held.

    Raises:
        NumericsError: if the logits are not finite.
    """
    logits = read_logits(decoder, hidden)
    if not bool(logits.sum().isfinite()):  # NaN and infinity survive a sum
        refuse_overflow(logits.to(hidden.dtype), "the candidate's logits", "the merge destroyed the model")
    return torch.log_softmax(logits, dim=-1)


def sum_divergence(base: torch.Tensor, other: torch.Tensor) -> float:
    """Return KL(base || other) of log-probabilities, (R, V) each, summed over the R positions, in nats."""
    return float((base.exp() * (base - other)).sum(dtype=torch.float64))
