"""The refit of one half of an output layer, attention or MLP: readers mapped, units chosen, writer fitted."""

import copy
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from mka.alignment.ridge import Moments, fit_ridge, select_features
from mka.alignment.units import gather_units
from mka.model.decoder import Decoder
from mka.model.families import Family
from mka.model.parts import Part, count_units, read_features, read_norm, reader_sections, write_features

# Squared norms below this share of the median are raised to it, so that no token counts for too much.
CLIP = 0.1


class Walk(Protocol):
    """What a refit needs of the walk it is part of.

    Attributes:
        decoder: the base.
        family: its family.
        contexts: what the decoder hands to each layer's attention.
        fitted: batches of windows that are fitted on.
        heldout: batches that only walk along.
    """

    decoder: Decoder
    family: Family
    contexts: list[dict[str, Any]]
    fitted: list[slice]
    heldout: list[slice]


class Refit:
    """One half of an output layer while it is fitted; several sources compete for its units."""

    def __init__(self, walk: Walk, made: Any, part: Part, sources: tuple[int, ...]) -> None:
        self.walk, self.made, self.part, self.sources = walk, made, part, sources
        self.context = walk.contexts[sources[0]]
        # What competes is fitted in copies; what is chosen of them goes into the layer made.
        self.layers = [made] if len(sources) == 1 else [copy.deepcopy(walk.decoder.layers[i]) for i in sources]
        self.facts: dict[str, Any] = {}

    def fit_readers(self, student: torch.Tensor, before: Mapping[int, torch.Tensor], penalty: float) -> None:
        """Multiply readers by the map from what they read in the student to what they read in the base."""
        for source, layer in zip(self.sources, self.layers):
            if before[source] is student:
                continue
            moments = Moments(student.shape[-1], student.shape[-1], student.device)
            for rows in self.walk.fitted:
                # (s, T, D) -> (s T, D)
                seen, wanted = (read_norm(layer, self.part, x[rows]).flatten(0, 1) for x in (student, before[source]))
                moments.add(seen.float(), wanted.float())
            mapped = fit_ridge(moments, torch.eye(student.shape[-1], device=student.device), penalty)  # (D, D)
            for name in self.part.readers:
                weight = layer.get_submodule(name).weight
                weight.copy_(weight.double() @ mapped.T)  # (rows, D) (D, D)

    def fit_writer(self, student: torch.Tensor, target: torch.Tensor, penalty: float) -> torch.Tensor:
        """Fit the writer, choosing units first if there are too many; return the student's states after this half."""
        features = self._read(student)  # (S, T, F), of all sources side by side
        weights = token_weights(target)  # (S, T)
        writers = [layer.get_submodule(self.part.writer) for layer in self.layers]
        prior = torch.cat([writer.weight for writer in writers], dim=1).T  # (D, F) -> (F, D)
        units = torch.zeros(len(prior), dtype=torch.long, device=prior.device)
        if len(self.layers) > 1:
            features, prior, units = self._shortlist(features, prior)
        moments = Moments(len(prior), student.shape[-1], student.device)
        for rows in self.walk.fitted:
            wanted = target[rows] - student[rows]  # (s, T, D)
            phi = features[rows]  # (s, T, F)
            if self.part.post_norm:
                gain = self.walk.family.gain_offset + self.layers[0].get_submodule(self.part.post_norm).weight
                wanted = undo_post_norm(wanted, phi @ prior, gain)
            if (bias := writers[0].bias) is not None:
                wanted = wanted - bias
            # (s T, F), (s T, D), (s T,)
            moments.add(phi.flatten(0, 1).float(), wanted.flatten(0, 1).float(), weights[rows].flatten())
        if len(self.layers) > 1:
            columns = self._choose(moments, prior, units, penalty)  # (F',), those of one layer
            features, prior, moments = features[..., columns], prior[columns], moments.take(columns)
        self.made.get_submodule(self.part.writer).weight.copy_(fit_ridge(moments, prior, penalty).T)
        if self.part.post_norm:
            self._fit_post_norm(student, features, target, weights)
        batches = self.walk.fitted + self.walk.heldout
        return torch.cat([student[b] + write_features(self.made, self.part, features[b]) for b in batches])

    def _read(self, student: torch.Tensor) -> torch.Tensor:
        def read(states: torch.Tensor) -> torch.Tensor:
            read_one = (read_features(x, self.part, read_norm(x, self.part, states), self.context) for x in self.layers)
            return torch.cat(list(read_one), dim=-1)  # of each source (s, T, F / sources) -> (s, T, F)

        return torch.cat([read(student[rows]) for rows in self.walk.fitted + self.walk.heldout])

    def _shortlist(
        self, features: torch.Tensor, prior: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keep twice the units there is room for, those that write most: ``E[phi_j^2] |W0_j|^2``.

        Choosing among all would cost the cube of their number. Returns features, prior and the unit of each feature.
        """
        units, count = count_units(self.made, self.part), len(self.sources)
        owner = torch.arange(len(prior), device=prior.device) * units * count // len(prior)  # (F,)
        if count == 2:
            return features, prior, owner
        # Of each batch (s, T, F) -> (F,); the mean over batches.
        energy = torch.stack([features[b].float().square().mean((0, 1)) for b in self.walk.fitted]).mean(0)
        written = torch.zeros(units * count, device=prior.device)
        written.index_add_(0, owner, energy * prior.float().square().sum(1))  # (F,) summed by unit
        columns = torch.isin(owner, written.topk(2 * units).indices).nonzero().squeeze(1)  # (F', 1) -> (F',)
        return features[..., columns], prior[columns], owner[columns]

    def _choose(self, moments: Moments, prior: torch.Tensor, owner: torch.Tensor, penalty: float) -> torch.Tensor:
        """Put the units that predict the target best into the layer made; return their columns, (F,)."""
        units, count = count_units(self.made, self.part), len(self.sources)
        kept = select_features(moments, prior, owner, units, penalty=penalty)  # (units,), of units * count
        picks = [kept[kept // units == k] - k * units for k in range(count)]  # of each source, in its own numbers
        offset = self.walk.family.gain_offset
        for name in self.part.readers:
            readers = [layer.get_submodule(name) for layer in self.layers]
            # Each source reads through its own gains; folded into its rows, one norm without gains serves all.
            folded = [  # (rows, D) * (D,)
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


def undo_post_norm(wanted: torch.Tensor, now: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Return what a writer has to give so that its post-norm makes ``wanted`` of it, (s, T, D).

    The norm divides by the root mean square of its input and multiplies by the gains g, so ``wanted / g`` times any
    size will do; the size the writer gives now keeps a fit near its prior. Channels of almost no gain cannot be fitted
    and ask for what they have.

    Args:
        wanted: what the half shall add, (s, T, D).
        now: what the writer gives, (s, T, D).
        gain: g, (D,).
    """
    size = now.square().mean(-1, keepdim=True).sqrt()
    usable = gain.abs() > 0.05 * gain.abs().mean()
    return torch.where(usable, wanted / torch.where(usable, gain, 1.0) * size, now)


def token_weights(target: torch.Tensor) -> torch.Tensor:
    """Return ``1 / |h_t|^2`` of the target states, clipped and with mean 1, (S, T)."""
    energy = target.float().square().sum(-1)
    weights = 1.0 / energy.clamp_min(CLIP * float(energy.median()))
    return weights / weights.mean()


def relative_error(student: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted squared distance of states from the base's, relative to those, a float64 scalar.

    Args:
        student: the states, (S, T, D).
        target: the base's, (S, T, D).
        weights: of the tokens, (S, T); see `token_weights`.
    """
    wrong = ((student - target).square().sum(-1) * weights).sum(dtype=torch.float64)  # (S, T, D) -> (S, T) -> ()
    return wrong / (target.square().sum(-1) * weights).sum(dtype=torch.float64)
