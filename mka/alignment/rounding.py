"""Calibrated rounding: every layer's linear layers rounded in turn, on what the rounded layers before really feed them.

Teacher (the model as it is) and student (the same, rounded so far) walk through the layers in lockstep, as in
`mka.alignment.lockstep`; each half of a layer, attention first, is rounded in two steps:

1. its readers (q, k, v; gate, up), by the second moments of what they read in the student;
2. its writer (o; down), by those of the features that the rounded readers give.

`gptq` rounds the weights as they are; teacher and student are one then. `gptaq` first moves them to where the student's
inputs give what the teacher's gave: readers are multiplied by the map from the ones to the others, writers refitted to
the teacher's hidden state behind the half, so that what the layers before have lost is made up for. Both fits are those
of an alignment.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from mka.alignment.lockstep import READERS, WRITERS, Alignment
from mka.alignment.refit import token_weights, undo_post_norm
from mka.alignment.ridge import Moments, fit_ridge
from mka.model.parts import Part, read_features, read_norm, run_part, write_features
from mka.model.readout import read_out, refuse_overflow, sum_divergence
from mka.model.walk import run_layer
from mka.transforms.columns import fit_scales, round_columns

DAMAGED = "the model is damaged, mka evaluate says how far"
# Rounded weight, (R, F) float32, and its scales, (R, G).
Rounded = tuple[torch.Tensor, torch.Tensor]


class Rounding(Alignment):
    """A walk in which every layer is rounded. Memory: as an alignment's."""

    def __init__(
        self,
        model: Any,
        windows: torch.Tensor,
        describe: Callable[[int, str], tuple[Any, torch.dtype]],
        *,
        follows: bool,
        compared: int = 0,
        heldout: int = 0,
    ) -> None:
        """Prepare a walk.

        Args:
            model: what is rounded, a transformers causal language model or a `mka.model.decoder.Decoder`.
            windows: token ids, (S, T), without padding.
            describe: ``describe(layer, name)`` returns the scheme of compressed-tensors that a linear layer has, and
                the dtype of its scales; those that read one norm have the same scheme.
            follows: whether weights are first moved to where they give what the teacher's gave: `gptaq`.
            compared: windows at the start that the model also walks through as it is, for `measure_loss`.
            heldout: windows at the end that are not looked at; where there are any, they are compared.

        Raises:
            PlanError: if the layers have parts that cannot be rounded so.
        """
        super().__init__(model, windows, heldout)
        self.describe, self.follows = describe, follows
        self.compared = slice(len(windows) - heldout, None) if heldout else slice(0, compared)
        self.unrounded = self.start[self.compared]

    @torch.inference_mode()
    def round_layers(self, on_layer: Callable[[int], Any] | None = None) -> Iterator[Mapping[str, Rounded]]:
        """Yield what the linear layers of each layer are rounded to, by name within the layer.

        Args:
            on_layer: called with 1 behind each layer, for a progress bar.

        Raises:
            NumericsError: if hidden states are not finite.
        """
        teacher = student = self.start
        refuse_overflow(self.start, "rounding: hidden states behind the embedding", DAMAGED)
        for index in range(len(self.contexts)):
            with self.decoder.hold(index):
                made = copy.deepcopy(self.decoder.layers[index])
                found: dict[str, Rounded] = {}
                for part in (self.family.attention, self.family.mlp):
                    module, context = self.decoder.layers[index], self.contexts[index]
                    where = f"hidden states behind layer {index}'s {part.kind}"
                    target = (
                        self._map(partial(run_part, module, part, context=context), teacher) if self.follows else None
                    )
                    if target is not None:  # before anything is fitted to it
                        refuse_overflow(target, f"rounding: {where}", DAMAGED)
                    readers, writer = (self.describe(index, name) for name in (part.readers[0], part.writer))
                    found |= self._round_readers(made, part, student, teacher, readers)
                    student, rounded = self._round_writer(made, part, student, target, context, writer)
                    found |= rounded
                    teacher = student if target is None else target
                    refuse_overflow(student, f"rounding: the rounded model's {where}", DAMAGED)
                if len(self.unrounded) and not self.follows:
                    self.unrounded = run_layer(self.decoder.layers[index], self.unrounded, self.contexts[index])
                self.decoder.tidy()
            if self.follows:
                self.unrounded = teacher[self.compared]
            self.students = [student]
            yield found
            if on_layer:
                on_layer(1)

    @torch.inference_mode()
    def measure_loss(self) -> float:
        """Return KL(as it was || rounded) on the windows compared, nats per token, after the walk.

        Those at the start are of those that the rounding was fitted on.
        """
        with self.decoder.hold_head():
            pairs = zip(self.unrounded, self.students[0][self.compared])
            total = sum(sum_divergence(*(read_out(self.decoder, self.decoder.norm(x)) for x in pair)) for pair in pairs)
        return total / self.unrounded[..., 0].numel()

    def _round_readers(
        self, made: Any, part: Part, student: torch.Tensor, teacher: torch.Tensor, given: tuple[Any, torch.dtype]
    ) -> dict[str, Rounded]:
        width, moves = student.shape[-1], teacher is not student
        moments = Moments(width, width if moves else 0, student.device)
        for rows in self.fitted:
            seen = read_norm(made, part, student[rows])  # (s, T, D)
            # As they are, weights ask for nothing but the moments of what they read.
            wanted = read_norm(made, part, teacher[rows]) if moves else seen[..., :0]
            moments.add(seen.flatten(0, 1).float(), wanted.flatten(0, 1).float())
        modules = [made.get_submodule(name) for name in part.readers]
        # They read the same, and are rounded as one.
        weight = torch.cat([module.weight.float() for module in modules])  # (rows of all, D)
        if moves:
            mapped = fit_ridge(moments, torch.eye(width, device=student.device), READERS)  # (D, D)
            weight = (weight.double() @ mapped.T).float()
        value, scale = self._round(weight, moments.gram, *given)
        sizes = [len(module.weight) for module in modules]
        found = dict(zip(part.readers, zip(value.split(sizes), scale.split(sizes))))
        for module, (rounded, _) in zip(modules, found.values()):
            module.weight.copy_(rounded)
        return found

    def _round_writer(
        self,
        made: Any,
        part: Part,
        student: torch.Tensor,
        target: torch.Tensor | None,
        context: dict[str, Any],
        given: tuple[Any, torch.dtype],
    ) -> tuple[torch.Tensor, dict[str, Rounded]]:
        writer = made.get_submodule(part.writer)
        prior = writer.weight.float().T  # (F, D)
        features = self._map(lambda x: read_features(made, part, read_norm(made, part, x), context), student)
        # Held-out tokens, which come last, have no say.
        weights = None if target is None else token_weights(target[: self.fitted[-1].stop])  # (S, T)
        moments = Moments(prior.shape[0], 0 if target is None else prior.shape[1], student.device)
        for rows in self.fitted:
            phi = features[rows]  # (s, T, F)
            wanted = (
                phi[..., :0] if target is None else self._want(made, part, target[rows] - student[rows], phi, prior)
            )
            counted = None if weights is None else weights[rows].flatten()
            moments.add(phi.flatten(0, 1).float(), wanted.flatten(0, 1).float(), counted)
        if target is not None:
            prior = fit_ridge(moments, prior, WRITERS[part.kind]).float()
        value, scale = self._round(prior.T, moments.gram, *given)
        writer.weight.copy_(value)
        walked = self.fitted + self.heldout
        after = [student[rows] + write_features(made, part, features[rows]) for rows in walked]
        return torch.cat(after), {part.writer: (value, scale)}

    def _want(
        self, made: Any, part: Part, added: torch.Tensor, features: torch.Tensor, prior: torch.Tensor
    ) -> torch.Tensor:
        """Return what the writer's product has to be so that the half adds what is asked for, (s, T, D)."""
        if part.post_norm:
            gain = self.family.gain_offset + made.get_submodule(part.post_norm).weight
            added = undo_post_norm(added.float(), features.float() @ prior, gain)
        bias = made.get_submodule(part.writer).bias
        return added if bias is None else added - bias

    def _round(self, weight: torch.Tensor, gram: torch.Tensor, scheme: Any, dtype: torch.dtype) -> Rounded:
        scale = fit_scales(weight, gram.diagonal(), scheme, dtype)
        return round_columns(weight, gram, scale, scheme), scale
