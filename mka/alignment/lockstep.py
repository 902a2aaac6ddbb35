"""Aligned merging: refit every layer after the first change so that its output matches the base's, in closed form.

Teacher (the base) and student (the model being made) walk through the layers in lockstep on the same calibration
windows. Each half of an output layer, attention first, is fitted on what the student really feeds it:

1. its readers (q, k, v; gate, up) are multiplied by the linear map that best predicts what they read in the base from
   what they read in the student: ``M = argmin sum_t |n_t M - n0_t|^2 + penalties |M - I|^2``, so ``W' = W M^T``;
2. its writer (o; down) becomes ``argmin sum_t w_t |phi_t W - r_t|^2 + penalties |W - W0|^2`` with phi the student's
   features, r = the base's hidden state h after the half - what the student has before it, and ``w_t = 1/|h_t|^2``,
   clipped: otherwise the few tokens of massive activation own the sums.

A layer that ends a group is fitted to the base's state after the *last* layer of the group, so errors are corrected as
they accumulate. The last layer's target is its raw output, before the final norm.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from mka.alignment.refit import Refit, relative_error, token_weights
from mka.model.decoder import as_decoder
from mka.model.families import Family
from mka.model.parts import ATTENTION, MLP, check_parts, run_part
from mka.model.readout import read_out, sum_divergence
from mka.plan.plan import MergedLayer
from mka.transforms.verbs import combine_layers

VERSION = 3
BATCH_TOKENS = 4096
# Penalties of the fits, of readers and of the writers of the parts it can refit, relative to the one given: the fewer
# the features, the less they need.
READERS = 0.05
WRITERS = {ATTENTION: 0.3, MLP: 1.0}


@dataclass(frozen=True)
class AlignedLayer:
    """One output layer.

    Attributes:
        position: its index in the output.
        tensors: tensor name within the layer -> refitted float32 values; empty if the layer is a copy that needs none.
        facts: the relative squared error of the layer's output after the refit, and units chosen of each source.
    """

    position: int
    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Teacher:
    """The base's hidden states around a group of its layers, (S, T, D) each."""

    before: Mapping[int, torch.Tensor]
    between: Mapping[int, torch.Tensor]
    after: torch.Tensor


def find_ends(layers: Sequence[MergedLayer], count: int) -> list[int]:
    """Return the source layer whose output each output layer has to reproduce.

    It is the one before the next output layer's first source, so that deleted layers, named by no output layer, are
    made up for by the layer in front of them; the last output layer answers for the last source layer.
    """
    return [layer.sources[0] - 1 for layer in layers[1:]] + [count - 1]


class Alignment:
    """A walk of teacher and student through the layers.

    Memory: some six arrays of hidden states (S, T, D) and one of features (S, T, F), and one more of states for every
    further student. Of a streamed decoder, the layers that make one output layer, and the layer made.

    Attributes:
        start: hidden states before the first layer, (S, T, D).
        teacher: those of the base behind the layers walked so far, (S, T, D).
        students: those of each student, (S, T, D).
    """

    def __init__(self, model: Any, windows: torch.Tensor, heldout: int = 0) -> None:
        """Prepare a walk.

        Args:
            model: the base, a transformers causal language model or a `mka.model.decoder.Decoder`.
            windows: token ids, (S, T), without padding.
            heldout: windows at the end that are walked along but not fitted on; `measure_divergence` reads them.

        Raises:
            PlanError: if the layers have parts that cannot be refitted.
        """
        self.decoder = as_decoder(model)
        self.family: Family = self.decoder.family
        check_parts(self.family.parts, WRITERS, "alignment", self.family.model_type)
        size, fitted = max(1, BATCH_TOKENS // windows.shape[1]), len(windows) - heldout
        self.fitted = [slice(i, min(i + size, fitted)) for i in range(0, fitted, size)]
        self.heldout = [slice(i, min(i + size, len(windows))) for i in range(fitted, len(windows), size)]
        _, self.contexts = self.decoder.enter(windows[:1])
        self.start = torch.cat([self.decoder.enter(batch)[0] for batch in windows.split(size)])  # (S, T, D)
        self.teacher, self.students = self.start, [self.start]
        self.teacher_seconds = 0.0

    def walk(
        self,
        layers: Sequence[MergedLayer],
        *,
        penalty: float = 1.0,
        on_layer: Callable[[int], Any] | None = None,
    ) -> Iterator[AlignedLayer]:
        """Yield the output layers in order, refitted.

        Args:
            layers: of a plan.
            penalty: of the ridge; see `mka.alignment.ridge`.
            on_layer: called with the number of source layers passed, for a progress bar.

        Raises:
            PlanError: if a layer selects what this family cannot.
            NumericsError: if hidden states are not finite.
        """
        for (made,) in self.walk_students(layers, (penalty,), on_layer=on_layer):
            yield made

    @torch.inference_mode()
    def walk_students(
        self,
        layers: Sequence[MergedLayer],
        penalties: Sequence[float],
        *,
        on_layer: Callable[[int], Any] | None = None,
    ) -> Iterator[tuple[AlignedLayer, ...]]:
        """Yield the output layers in order, refitted with each penalty: one student per penalty beside one teacher.

        Arguments and refusals are those of `walk`.
        """
        self.teacher, self.students = self.start, [self.start] * len(penalties)
        first = 0
        for position, (layer, end) in enumerate(zip(layers, find_ends(layers, len(self.contexts)))):
            made = []
            with self.decoder.hold(*layer.used):
                group = self.run_teacher(self.teacher, first, end, layer.used)
                for index, (student, penalty) in enumerate(zip(self.students, penalties)):
                    if student is self.teacher and layer.is_copy and layer.sources == (first,) and end == first:
                        self.students[index] = group.after
                        made.append(AlignedLayer(position, {}))
                    else:
                        self.students[index], tensors, facts = self.fit_layer(layer, student, group, penalty)
                        made.append(AlignedLayer(position, tensors, facts))
                        self.decoder.tidy()
            self.teacher = group.after
            yield tuple(made)
            if on_layer:
                on_layer(end + 1 - first)
            first = end + 1

    @torch.inference_mode()
    def measure_divergence(self, student: int = 0) -> float:
        """Return KL(base || student) on the held-out windows after a walk, nats per token; students are numbered."""
        total, count = 0.0, 0
        with self.decoder.hold_head():
            for rows in self.heldout:
                for base, other in zip(self.teacher[rows], self.students[student][rows]):  # (T, D) each
                    total += sum_divergence(*(read_out(self.decoder, self.decoder.norm(x)) for x in (base, other)))
                    count += len(base)
        return total / count

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor) -> torch.Tensor:
        # Batch by batch, (s, T, D) each -> (S, T, D).
        return torch.cat([function(states[rows]) for rows in self.fitted + self.heldout])

    def run_teacher(self, states: torch.Tensor, first: int, end: int, kept: Sequence[int]) -> Teacher:
        """Run layers ``first`` to ``end`` of the base; keep the states around the layers in ``kept``."""
        started = time.perf_counter()
        before, between = {}, {}
        for index in range(first, end + 1):
            module, context = self.decoder.layers[index], self.contexts[index]
            with self.decoder.hold(index):
                middle = self._map(partial(run_part, module, self.family.attention, context=context), states)
                if index in kept:
                    before[index], between[index] = states, middle
                states = self._map(partial(run_part, module, self.family.mlp, context=context), middle)
        self.teacher_seconds += time.perf_counter() - started
        return Teacher(before, between, states)

    def fit_layer(
        self, layer: MergedLayer, student: torch.Tensor, group: Teacher, penalty: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, Any]]:
        """Make one output layer; return the student's states after it, its tensors, and facts."""
        made, chosen = self._build(layer)
        # A sum of layers reads nothing that any one layer of the base reads: its readers stay as they are.
        mapped = layer.verb == "take" or len(layer.used) == 1
        facts: dict[str, Any] = {}
        for part, sources, before, target in (
            (self.family.attention, chosen[0], group.before, group.between[chosen[1][-1]]),
            (self.family.mlp, chosen[1], group.between, group.after),
        ):
            half = Refit(self, made, part, sources)
            if mapped:
                half.fit_readers(student, before, READERS * penalty)
            student = half.fit_writer(student, target, WRITERS[part.kind] * penalty)
            facts |= half.facts
        tensors = {name: value.detach() for name, value in made.state_dict().items()}
        return (
            student,
            tensors,
            facts | {"error": float(relative_error(student, group.after, token_weights(group.after)))},
        )

    def _build(self, layer: MergedLayer) -> tuple[torch.nn.Module, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Return a new layer as the plan has it before any refit, and the source layers of its two halves."""
        modules = self.decoder.layers
        if layer.verb == "take":
            halves = layer.attention, layer.mlp
        else:
            main = max(zip(layer.weights, layer.sources))[1]
            halves = (main,), (main,)
        made = copy.deepcopy(modules[halves[0][0]])
        state = {i: modules[i].state_dict() for i in layer.used}
        for name, value in made.state_dict().items():
            if layer.verb == "combine":
                value.copy_(combine_layers(layer, name, self.family, lambda i, suffix: state[i][suffix]))
            elif self.family.mlp.owns(name):
                value.copy_(state[halves[1][0]][name])
        return made, halves
