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

from mka.candidate import read_out
from mka.families import Family, Sublayer, get_family
from mka.merging import combine_layers
from mka.plan import LayerRecipe
from mka.ridge import Moments, fit_ridge, select_features
from mka.sublayers import (
    BATCH_TOKENS,
    catch_contexts,
    embed_windows,
    read_features,
    read_norm,
    run_sublayer,
    write_features,
)
from mka.units import count_units, gather_units, reader_sections

VERSION = 1
# Squared norms below this share of the median are raised to it, so that no token counts for too much.
CLIP = 0.1
# Penalties of the three kinds of fit, relative to the one given: the fewer the features, the less they need.
READERS, ATTENTION, MLP = 0.05, 0.3, 1.0


@dataclass(frozen=True)
class AlignedLayer:
    """One output layer.

    Attributes:
        position: its index in the output.
        tensors: tensor name within the layer -> refitted float32 values; empty if the layer is a copy that needs none.
        facts: penalties chosen, and the relative squared error of the layer's output before and after the refit.
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


def find_ends(layers: Sequence[LayerRecipe], count: int) -> list[int]:
    """Return the source layer whose output each output layer has to reproduce.

    It is the one before the next output layer's first source, so that deleted layers, named by no output layer, are
    made up for by the layer in front of them; the last output layer answers for the last source layer.
    """
    return [layer.sources[0] - 1 for layer in layers[1:]] + [count - 1]


class Alignment:
    """A walk of teacher and student through the layers.

    Memory: some six arrays of hidden states (S, T, D) and one of features (S, T, F), beside the model.
    """

    def __init__(self, model: Any, windows: torch.Tensor, heldout: int = 0) -> None:
        """Prepare a walk.

        Args:
            model: the base, a transformers causal language model.
            windows: token ids, (S, T), without padding.
            heldout: windows at the end that are walked along but not fitted on; `measure_divergence` reads them.
        """
        self.model = model
        self.family: Family = get_family(model.config.model_type, "model")
        size, fitted = max(1, BATCH_TOKENS // windows.shape[1]), len(windows) - heldout
        self.fitted = [slice(i, min(i + size, fitted)) for i in range(0, fitted, size)]
        self.heldout = [slice(i, min(i + size, len(windows))) for i in range(fitted, len(windows), size)]
        windows = windows.to(model.device)
        self.contexts = catch_contexts(model, windows[:1])
        self.start = embed_windows(model, windows)
        self.teacher_seconds = 0.0

    @torch.inference_mode()
    def walk(
        self,
        layers: Sequence[LayerRecipe],
        *,
        penalty: float = 1.0,
        on_layer: Callable[[int], Any] | None = None,
    ) -> Iterator[AlignedLayer]:
        """Yield the output layers in order, refitted.

        Args:
            layers: of a plan.
            penalty: of the ridge; see `mka.ridge`.
            on_layer: called with the number of source layers passed, for a progress bar.

        Raises:
            PlanError: if a layer selects what this family cannot.
            NumericsError: if hidden states are not finite.
        """
        student = teacher = self.start
        first = 0
        for position, (layer, end) in enumerate(zip(layers, find_ends(layers, len(self.contexts)))):
            group = self.run_teacher(teacher, first, end, layer.used)
            if student is teacher and layer.is_copy and layer.sources == (first,) and end == first:
                student = group.after
                yield AlignedLayer(position, {})
            else:
                student, tensors, facts = self.fit_layer(layer, student, group, penalty)
                yield AlignedLayer(position, tensors, facts)
            teacher = group.after
            if on_layer:
                on_layer(end + 1 - first)
            first = end + 1
        self.student, self.teacher = student, teacher

    @torch.inference_mode()
    def measure_divergence(self) -> float:
        """Return KL(base || student) on the held-out windows after a walk, nats per token."""
        total, count = 0.0, 0
        for rows in self.heldout:
            for base, other in zip(self.teacher[rows], self.student[rows]):
                log_base, log_other = (read_out(self.model, self.model.model.norm(x)) for x in (base, other))
                total += float((log_base.exp() * (log_base - log_other)).sum(dtype=torch.float64))
                count += len(base)
        return total / count

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor) -> torch.Tensor:
        return torch.cat([function(states[rows]) for rows in self.fitted + self.heldout])

    def run_teacher(self, states: torch.Tensor, first: int, end: int, kept: Sequence[int]) -> Teacher:
        """Run layers ``first`` to ``end`` of the base; keep the states around the layers in ``kept``."""
        started = time.perf_counter()
        before, between = {}, {}
        for index in range(first, end + 1):
            module, context = self.model.model.layers[index], self.contexts[index]
            middle = self._map(partial(run_sublayer, module, self.family.attention, context=context), states)
            if index in kept:
                before[index], between[index] = states, middle
            states = self._map(partial(run_sublayer, module, self.family.mlp, context=context), middle)
        self.teacher_seconds += time.perf_counter() - started
        return Teacher(before, between, states)

    def fit_layer(
        self, layer: LayerRecipe, student: torch.Tensor, group: Teacher, penalty: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, Any]]:
        """Make one output layer; return the student's states after it, its tensors, and facts."""
        made, chosen = self._build(layer)
        # A sum of layers reads nothing that any one layer of the base reads: its readers stay as they are.
        mapped = layer.verb == "take" or layer.is_copy
        facts: dict[str, Any] = {}
        for part, sources, before, target in (
            (self.family.attention, chosen[0], group.before, group.between[chosen[1][-1]]),
            (self.family.mlp, chosen[1], group.between, group.after),
        ):
            half = _Half(self, made, part, sources)
            if mapped:
                half.fit_readers(student, before, READERS * penalty)
            student = half.fit_writer(student, target, (ATTENTION if part.is_attention else MLP) * penalty)
            facts |= half.facts
        tensors = {name: value.detach() for name, value in made.state_dict().items()}
        return student, tensors, facts | {"error": _relative_error(student, group.after)}

    def _build(self, layer: LayerRecipe) -> tuple[torch.nn.Module, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Return a new layer as the plan has it before any refit, and the source layers of its two halves."""
        modules = self.model.model.layers
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


class _Half:
    """One half of an output layer while it is fitted; several sources compete for its units."""

    def __init__(self, walk: Alignment, made: Any, part: Sublayer, sources: tuple[int, ...]) -> None:
        self.walk, self.made, self.part, self.sources = walk, made, part, sources
        self.context = walk.contexts[sources[0]]
        # What competes is fitted in copies; what is chosen of them goes into the layer made.
        self.layers = [made] if len(sources) == 1 else [copy.deepcopy(walk.model.model.layers[i]) for i in sources]
        self.facts: dict[str, Any] = {}

    def fit_readers(self, student: torch.Tensor, before: Mapping[int, torch.Tensor], penalty: float) -> None:
        """Multiply readers by the map from what they read in the student to what they read in the base."""
        for source, layer in zip(self.sources, self.layers):
            if before[source] is student:
                continue
            moments = Moments(student.shape[-1], student.shape[-1], student.device)
            for rows in self.walk.fitted:
                seen, wanted = (read_norm(layer, self.part, x[rows]).flatten(0, 1) for x in (student, before[source]))
                moments.add(seen.float(), wanted.float())
            mapped = fit_ridge(moments, torch.eye(student.shape[-1], device=student.device), penalty)
            for name in self.part.readers:
                weight = layer.get_submodule(name).weight
                weight.copy_(weight.double() @ mapped.T)

    def fit_writer(self, student: torch.Tensor, target: torch.Tensor, penalty: float) -> torch.Tensor:
        """Fit the writer, choosing units first if there are too many; return the student's states after this half."""
        features = self._read(student)
        weights = _token_weights(target)
        writers = [layer.get_submodule(self.part.writer) for layer in self.layers]
        prior = torch.cat([writer.weight for writer in writers], dim=1).T
        moments = Moments(len(prior), student.shape[-1], student.device)
        for rows in self.walk.fitted:
            wanted = target[rows] - student[rows]
            phi = features[rows]
            if self.part.post_norm:
                wanted = self._undo_post_norm(wanted, phi, prior)
            if (bias := writers[0].bias) is not None:
                wanted = wanted - bias
            moments.add(phi.flatten(0, 1).float(), wanted.flatten(0, 1).float(), weights[rows].flatten())
        if len(self.layers) > 1:
            columns = self._choose(moments, prior)
            features, prior, moments = features[..., columns], prior[columns], moments.take(columns)
        self.made.get_submodule(self.part.writer).weight.copy_(fit_ridge(moments, prior, penalty).T)
        if self.part.post_norm:
            self._fit_post_norm(student, features, target, weights)
        batches = self.walk.fitted + self.walk.heldout
        return torch.cat([student[b] + write_features(self.made, self.part, features[b]) for b in batches])

    def _read(self, student: torch.Tensor) -> torch.Tensor:
        def read(states: torch.Tensor) -> torch.Tensor:
            read_one = (read_features(x, self.part, read_norm(x, self.part, states), self.context) for x in self.layers)
            return torch.cat(list(read_one), dim=-1)

        return self.walk._map(read, student)

    def _choose(self, moments: Moments, prior: torch.Tensor) -> torch.Tensor:
        """Put the units that predict the target best into the layer made; return their features, (F,)."""
        units, count = count_units(self.made, self.part), len(self.sources)
        owner = torch.arange(len(prior), device=prior.device) * units * count // len(prior)
        kept = select_features(moments, prior, owner, units)
        picks = [kept[kept // units == k] - k * units for k in range(count)]
        offset = self.walk.family.gain_offset
        for name in self.part.readers:
            readers = [layer.get_submodule(name) for layer in self.layers]
            # Each source reads through its own gains; folded into its rows, one norm without gains serves all.
            folded = [
                reader.weight * (offset + layer.get_submodule(self.part.norm).weight)
                for reader, layer in zip(readers, self.layers)
            ]
            sections = reader_sections(self.made, self.part, name)
            made = self.made.get_submodule(name)
            made.weight.copy_(gather_units(folded, sections, units, picks))
            if made.bias is not None:
                made.bias.copy_(gather_units([reader.bias for reader in readers], sections, units, picks))
        self.made.get_submodule(self.part.norm).weight.fill_(1.0 - offset)
        self.facts[f"{self.part.module} units"] = {str(source): len(pick) for source, pick in zip(self.sources, picks)}
        return torch.isin(owner, kept).nonzero().squeeze(1)

    def _undo_post_norm(self, wanted: torch.Tensor, features: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
        """Return what the writer has to give so that its post-norm makes ``wanted`` of it.

        The norm divides by the root mean square of its input and multiplies by the gains g, so ``wanted / g`` times
        any size will do; the size the writer gives now keeps the fit near its prior. Channels of almost no gain cannot
        be fitted and ask for what they have.
        """
        assert self.part.post_norm
        now = features @ prior
        size = now.square().mean(-1, keepdim=True).sqrt()
        gain = self.walk.family.gain_offset + self.layers[0].get_submodule(self.part.post_norm).weight
        usable = gain.abs() > 0.05 * gain.abs().mean()
        return torch.where(usable, wanted / torch.where(usable, gain, 1.0) * size, now)

    def _fit_post_norm(
        self, student: torch.Tensor, features: torch.Tensor, target: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """Refit the gains behind the writer, channel by channel, towards what they are."""
        assert self.part.post_norm
        norm, offset = self.made.get_submodule(self.part.post_norm), self.walk.family.gain_offset
        gain = offset + norm.weight.double()
        energy = torch.zeros_like(gain)
        match = torch.zeros_like(gain)
        norm.weight.fill_(1.0 - offset)
        for rows in self.walk.fitted:
            added = write_features(self.made, self.part, features[rows])
            weighted = (added * weights[rows][..., None]).flatten(0, 1).double()
            energy += (weighted * added.flatten(0, 1)).sum(0)
            match += (weighted * (target[rows] - student[rows]).flatten(0, 1)).sum(0)
        shrink = 0.1 * energy.mean()
        norm.weight.copy_((match + shrink * gain) / (energy + shrink) - offset)


def _token_weights(target: torch.Tensor) -> torch.Tensor:
    """Return ``1 / |h_t|^2`` of the target states, clipped and with mean 1, (S, T)."""
    energy = target.float().square().sum(-1)
    weights = 1.0 / energy.clamp_min(CLIP * float(energy.median()))
    return weights / weights.mean()


def _relative_error(student: torch.Tensor, target: torch.Tensor) -> float:
    """Return the weighted squared distance of the student's states from the base's, relative to those."""
    weights = _token_weights(target)
    wrong = ((student - target).square().sum(-1) * weights).sum(dtype=torch.float64)
    return float(wrong / (target.square().sum(-1) * weights).sum(dtype=torch.float64))
