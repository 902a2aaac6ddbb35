"""What single changes of the base cost: one group of layers replaced by one aligned layer, one attention left out."""

from typing import Any

import torch

from mka.alignment.lockstep import Alignment
from mka.model.parts import Part, run_part
from mka.model.readout import read_out, sum_divergence
from mka.plan.plan import MergedLayer

# Windows of tokens said twice.
COPIES = 2


class AlignedTrials:
    """Tries changes one at a time on the base's own hidden states; satisfies `mka.evidence.needs.Trials`.

    The base's states at every depth are kept ((L+1) x tokens x D). The aligned layer is fitted on the first windows;
    the rest of the base then runs unchanged on the others, whose logits are compared. Results are remembered.
    """

    @torch.inference_mode()
    def __init__(self, model: Any, windows: torch.Tensor, heldout: int, copies: int = 0, copying: float = 0.0) -> None:
        """Run the base once.

        Args:
            model: the base, a transformers causal language model or a `mka.model.decoder.Decoder`.
            windows: token ids, (S, T).
            heldout: windows at the end that are measured, not fitted on.
            copies: how many of those, at the very end, say their tokens twice (`mka.texts.windows.make_copies`).
            copying: weight of the divergence on them, added to that on the other held-out windows.
        """
        self.copies, self.copying = copies, copying
        self.walk = Alignment(model, windows, heldout)
        self.decoder, self.heldout = self.walk.decoder, heldout
        self.inputs = [self.walk.start]
        for index in range(len(self.decoder.layers)):
            group = self.walk.run_teacher(self.inputs[-1], index, index, ())
            self.inputs.append(group.after)
        with self.decoder.hold_head():
            self.base = [self._read_out(row) for row in self.inputs[-1][-heldout:]]
        self.known: dict[Any, float] = {}

    def _read_out(self, states: torch.Tensor) -> torch.Tensor:
        return read_out(self.decoder, self.decoder.norm(states))

    def _finish(self, states: torch.Tensor, first: int) -> float:
        """Run the base's layers from ``first`` on over held-out states, (S, T, D); return the divergence."""
        for index in range(first, len(self.decoder.layers)):
            states = self._run(index, states)
        with self.decoder.hold_head():
            rows = [sum_divergence(base, self._read_out(row)) / states.shape[1] for base, row in zip(self.base, states)]
        texts = len(rows) - self.copies
        said_twice = sum(rows[texts:]) / self.copies if self.copies else 0.0
        return sum(rows[:texts]) / texts + self.copying * said_twice

    def _run(self, index: int, states: torch.Tensor, *, without: Part | None = None) -> torch.Tensor:
        layer, context = self.decoder.layers[index], self.walk.contexts[index]
        with self.decoder.hold(index):
            for part in self.walk.family.parts:
                if part != without:
                    states = run_part(layer, part, states, context)
        return states

    def measure_attention(self, layer: int) -> float:
        """Return the divergence of the base without the attention of one layer."""
        return self._measure_without(layer, self.walk.family.attention)

    def measure_mlp(self, layer: int) -> float:
        """Return the divergence of the base without the MLP of one layer."""
        return self._measure_without(layer, self.walk.family.mlp)

    @torch.inference_mode()
    def _measure_without(self, layer: int, part: Part) -> float:
        if (layer, part.kind) not in self.known:
            states = self._run(layer, self.inputs[layer][-self.heldout :], without=part)
            self.known[layer, part.kind] = self._finish(states, layer + 1)
        return self.known[layer, part.kind]

    @torch.inference_mode()
    def measure_group(self, layer: MergedLayer) -> float:
        """Return the divergence of the base with one group of layers replaced by one aligned layer."""
        if layer not in self.known:
            first, last = layer.sources[0], layer.sources[-1]
            with self.decoder.hold(*layer.used):
                group = self.walk.run_teacher(self.inputs[first], first, last, layer.used)
                student, _, _ = self.walk.fit_layer(layer, self.inputs[first], group, 1.0)
            self.known[layer] = self._finish(student[-self.heldout :], last + 1)
        return self.known[layer]
