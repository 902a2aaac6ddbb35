"""What whole configurations leave to be desired before and after they are refitted, as divergences from the base."""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from mka.alignment.lockstep import BATCH_TOKENS, Alignment
from mka.errors import NumericsError
from mka.evidence.states import HiddenStates
from mka.evidence.walk import walk_layers
from mka.model.decoder import as_decoder
from mka.model.readout import read_out, sum_divergence
from mka.model.walk import Batch
from mka.plan.budget import count_front
from mka.plan.plan import MergedLayer, identity_layers

# Hidden states stand for the text up to every so many tokens.
EVERY = 64


class MeasuredRepairs:
    """Measures planned models on windows of calibration text; satisfies `mka.evidence.needs.Repairs`.

    The base is run once, on the measured windows; what enters each of its layers is kept ((L+1) x tokens x D), and
    every planned model goes on from where it first differs. Both are read out anew for each measurement, window by
    window, so that no logits of all tokens are ever there.
    """

    def __init__(self, model: Any, measured: torch.Tensor, fitted: torch.Tensor) -> None:
        """Take windows.

        Args:
            model: the base, a transformers causal language model or a `mka.model.decoder.Decoder`, open while this is
                used.
            measured: token ids that divergences are measured on, (M, T).
            fitted: those that alignments are fitted on, (A, T).
        """
        self.decoder = as_decoder(model)
        self.measured, self.fitted = measured, fitted
        self.context = measured.shape[1]

    @cached_property
    def _base(self) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
        """What enters each layer of the base and leaves the last, (M, T, D) each, and what its layers are handed."""
        _, contexts = self.decoder.enter(self.measured[:1])
        size = max(1, BATCH_TOKENS // self.context)
        starts = [self.decoder.enter(windows)[0] for windows in self.measured.split(size)]
        batches = [self._batch(states, contexts) for states in starts]
        inputs: list[list[torch.Tensor]] = [[] for _ in self.decoder.layers]
        for position, _, before in walk_layers(self.decoder, identity_layers(len(inputs)), batches):
            inputs[position].append(before)
        inputs.append([batch.states for batch in batches])
        return [torch.cat(states) for states in inputs], contexts

    def _batch(self, states: torch.Tensor, contexts: list[dict[str, Any]]) -> Batch:
        mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
        return Batch(torch.arange(len(states)), mask, states, contexts)

    @torch.inference_mode()
    def observe(self) -> HiddenStates:
        """Return hidden states of the base, pooled at every 64th token of the measured windows."""
        states, _ = self._base
        step = min(EVERY, self.context)
        pooled = [x[:, step - 1 :: step].flatten(0, 1).float().cpu().numpy() for x in states]  # (M, T, D) -> (N, D)
        turned = [
            torch.nn.functional.cosine_similarity(x.float(), y.float(), dim=-1).mean(dtype=torch.float64)
            for x, y in pairwise(states)
        ]
        influence = np.array([1.0 - float(cosine) for cosine in turned])
        return HiddenStates(np.stack(pooled), influence, np.full(len(pooled[0]), step))

    @torch.inference_mode()
    def divergence(self, layers: Sequence[MergedLayer], tokens: int) -> float:
        """Return the divergence of the model these output layers make on the first of the measured tokens.

        Raises:
            NumericsError: if its hidden states or logits are not finite.
        """
        states, contexts = self._base
        count, front = max(1, tokens // self.context), count_front(layers)
        batches = [self._batch(x, contexts) for x in states[front][:count].split(max(1, BATCH_TOKENS // self.context))]
        for _ in walk_layers(self.decoder, layers[front:], batches):
            pass
        total, others = 0.0, torch.cat([batch.states for batch in batches])
        with self.decoder.hold_head():
            for pair in zip(states[-1][:count], others):  # (T, D) each
                base, other = (read_out(self.decoder, self.decoder.norm(x)) for x in pair)
                total += sum_divergence(base, other)
        return _finite(total / (count * self.context))

    @torch.inference_mode()
    def aligned(self, layers: Sequence[MergedLayer]) -> float:
        """Return the divergence on all measured tokens after these output layers were refitted on the fitted ones.

        Raises:
            PlanError: if the layers have parts that cannot be refitted.
            NumericsError: if a fit, hidden states or logits are not finite.
        """
        walk = Alignment(self.decoder, torch.cat([self.fitted, self.measured]), heldout=len(self.measured))
        for _ in walk.walk(layers):
            pass
        return _finite(walk.measure_divergence())


def _finite(value: float) -> float:
    if not np.isfinite(value):
        raise NumericsError("the candidate's divergence is NaN or infinite; the merge destroyed the model")
    return value
