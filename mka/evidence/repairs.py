"""What whole configurations leave to be desired before and after they are refitted, as divergences from the base."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from mka.alignment.lockstep import BATCH_TOKENS, Alignment
from mka.errors import NumericsError
from mka.evidence.states import HiddenStates
from mka.evidence.walk import walk_layers
from mka.healing.student import count_shared
from mka.healing.table import HealingWindows
from mka.model.checkpoint import Checkpoint, open_checkpoint
from mka.model.decoder import as_decoder
from mka.model.readout import read_out, sum_divergence
from mka.model.walk import Batch
from mka.plan.budget import count_front
from mka.plan.plan import MergedLayer, MergePlan, identity_layers
from mka.recipe import HealFit, ModelSource
from mka.terminal import showing
from mka.transforms.merge import merge_checkpoint

# Hidden states stand for the text up to every so many tokens.
EVERY = 64


@dataclass(frozen=True)
class Healing:
    """What a short healing takes beside the model that is walked.

    Attributes:
        windows: token ids that are trained on, (H, T).
        base: the base on disk.
        source: how it is loaded.
        scratch: folder that candidates are written into while they are healed; None: the system's.
    """

    windows: torch.Tensor
    base: Checkpoint
    source: ModelSource
    scratch: Path | None = None


class MeasuredRepairs:
    """Measures planned models on windows of calibration text; satisfies `mka.evidence.needs.Repairs`.

    The base is run once, on the measured windows; what enters each of its layers is kept ((L+1) x tokens x D), and
    every planned model goes on from where it first differs. Both are read out anew for each measurement, window by
    window, so that no logits of all tokens are ever there.
    """

    def __init__(
        self, model: Any, measured: torch.Tensor, fitted: torch.Tensor, healing: Healing | None = None
    ) -> None:
        """Take windows.

        Args:
            model: the base, a transformers causal language model or a `mka.model.decoder.Decoder`, open while this is
                used.
            measured: token ids that divergences are measured on, (M, T).
            fitted: those that alignments are fitted on, (A, T); none: nothing is fitted.
            healing: needed where candidates are healed.
        """
        self.decoder = as_decoder(model)
        self.measured, self.fitted, self.healing = measured, fitted, healing
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

    def healed(self, layers: Sequence[MergedLayer]) -> float:
        """Return the divergence on all measured tokens after a distillation on those of the healing.

        Both models are in memory as a whole meanwhile; the candidate is on disk until then, refitted first if there is
        anything to fit on.

        Raises:
            PlanError: if the layers have parts that cannot be refitted or healed.
            NumericsError: if a fit is not finite, or the training diverges before anything is better than its start.
            OutputError: if the candidate cannot be written.
        """
        # The trainer's libraries are of use for this alone.
        from mka.healing.distil import distil

        assert self.healing is not None
        base, trained = self.healing.base, self.healing.windows
        windows = HealingWindows(trained, self.measured, "calibration", {"calibration": len(trained)})
        # Few tokens: one window per step makes most of them.
        settings = HealFit(context=self.context, batch=1)
        plan = MergePlan("healed", "", base.layers, tuple(layers))
        with TemporaryDirectory(dir=self.healing.scratch, prefix=".healed-") as folder, showing(False):
            written, scratch = Path(folder, "model"), Path(folder, "training")
            merge_checkpoint(plan, base, written, aligned=self._refit(layers) if len(self.fitted) else None)
            student = open_checkpoint(written, verify=False)
            pair = (base, student, windows, settings, self.healing.source, scratch)
            made = distil(*pair, shared=count_shared(base, student), measurements=1)
        return _finite(made.facts["best"])

    def _refit(self, layers: Sequence[MergedLayer]) -> Iterator[Mapping[str, torch.Tensor]]:
        return (made.tensors for made in Alignment(self.decoder, self.fitted).walk(layers))


def _finite(value: float) -> float:
    if not np.isfinite(value):
        raise NumericsError("the candidate's divergence is NaN or infinite; the merge destroyed the model")
    return value
