"""Oracles: what planned models do to calibration text, as one number each."""

from collections.abc import Sequence
from typing import Any

import torch

from mka.errors import CalibrationError, NumericsError
from mka.evidence.walk import walk_layers
from mka.model.decoder import as_decoder
from mka.model.readout import read_out, sum_divergence
from mka.model.walk import Batch
from mka.plan.plan import MergedLayer, identity_layers
from mka.texts.tokens import pad, take_tokens

# Positions whose logits are in memory at a time.
ROWS = 256


class Oracle:
    """Runs planned models on calibration tokens, all in one padded batch, one output layer in memory at a time.

    The input of every layer of the last model run is kept (layers x tokens x hidden size), and a model that begins with
    the same output layers goes on from there. A search saves most when it tries changes from the deepest layer up.
    What was measured is remembered, so that a search for fewer layers starts where one for more layers ended.
    """

    def __init__(self, model: Any, tokenizer: Any, texts: Sequence[str], *, max_tokens: int, tokens: int) -> None:
        """Take texts in order until ``tokens`` tokens are there, each cut to ``max_tokens``.

        The model is a transformers causal language model, or a `mka.model.decoder.Decoder`, open while this is used.
        """
        self.decoder = as_decoder(model)
        sequences = take_tokens(tokenizer, texts, max_tokens, tokens)
        self.tokens = sum(map(len, sequences))
        self.ids, self.mask = pad(sequences, self.decoder.device)
        start, self._contexts = self.decoder.enter(self.ids, self.mask)
        self._layers: tuple[MergedLayer, ...] = ()
        self._inputs = [start]
        self._measured: dict[tuple[MergedLayer, ...], float] = {}

    @property
    def base_layers(self) -> tuple[MergedLayer, ...]:
        """Output layers that make the base."""
        return identity_layers(len(self.decoder.layers))

    @torch.inference_mode()
    def run(self, layers: Sequence[MergedLayer]) -> torch.Tensor:
        """Return the final-normed hidden states, (S, T, D), of the model these output layers make."""
        layers = tuple(layers)
        shared, limit = 0, min(len(layers), len(self._inputs)) - 1
        while shared < limit and layers[shared] == self._layers[shared]:
            shared += 1
        batch = Batch(torch.arange(len(self.mask)), self.mask, self._inputs[shared], self._contexts)
        inputs = [before for _, _, before in walk_layers(self.decoder, layers[shared:], [batch])]
        self._layers, self._inputs = layers, self._inputs[:shared] + inputs
        hidden = self.decoder.norm(batch.states)
        if not bool(hidden[self.mask.bool()].isfinite().all()):
            raise NumericsError("the candidate's hidden states are NaN or infinite; the merge destroyed the model")
        return hidden

    def __call__(self, layers: Sequence[MergedLayer]) -> float:
        """Measure the model these output layers make; refusals are those of `measure`."""
        layers = tuple(layers)
        if layers not in self._measured:
            self._measured[layers] = self.measure(layers)
        return self._measured[layers]

    def measure(self, layers: Sequence[MergedLayer]) -> float:
        """Run and measure the model these output layers make."""
        raise NotImplementedError

    def read_out(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities, (R, V) float32, of R final-normed hidden states, (R, D); the head is held."""
        return read_out(self.decoder, hidden)


class Divergence(Oracle):
    """KL divergence of planned models from their base on calibration tokens.

    ``KL(base || candidate)`` in nats per token, averaged over all real positions. The base's logits are computed once
    and kept (tokens x vocabulary x 4 bytes).
    """

    _base: torch.Tensor | None = None

    @torch.inference_mode()
    def measure(self, layers: Sequence[MergedLayer]) -> float:
        """Return nats per token for the model these output layers make.

        Raises:
            NumericsError: if the candidate's hidden states or logits are not finite.
        """
        real = self.mask.bool()
        if self._base is None:
            base_states = self.run(self.base_layers)[real]
            with self.decoder.hold_head():
                self._base = self.read_out(base_states)
        states, total = self.run(layers)[real], 0.0
        with self.decoder.hold_head():
            for base, hidden in zip(self._base.split(ROWS), states.split(ROWS)):
                total += sum_divergence(base, self.read_out(hidden))
        return total / self._base.shape[0]


class Loss(Oracle):
    """Mean negative log-likelihood of calibration tokens under planned models, each given those before it."""

    @torch.inference_mode()
    def measure(self, layers: Sequence[MergedLayer]) -> float:
        """Return nats per predicted token (the first token of a text is given) for the model these layers make.

        Raises:
            CalibrationError: if no text has a second token.
            NumericsError: if the candidate's hidden states or logits are not finite.
        """
        predicted = self.mask[:, 1:].bool()
        targets = self.ids[:, 1:][predicted]
        if not len(targets):
            raise CalibrationError("every calibration text has one token only; a loss needs two, give longer texts")
        states, total = self.run(layers)[:, :-1][predicted], 0.0
        with self.decoder.hold_head():
            for hidden, target in zip(states.split(ROWS), targets.split(ROWS)):
                total -= float(self.read_out(hidden).gather(1, target[:, None]).sum(dtype=torch.float64))
        return total / len(targets)


class OutputSimilarity(Oracle):
    """Mean cosine, over texts, of the base's and planned models' final hidden states at the last real token.

    Final means after the final norm: what the language-model head reads.
    """

    _base: torch.Tensor | None = None

    @torch.inference_mode()
    def measure(self, layers: Sequence[MergedLayer]) -> float:
        """Return the mean cosine, -1 to 1, for the model these output layers make.

        Raises:
            NumericsError: if the candidate's hidden states are not finite.
        """
        if self._base is None:
            self._base = self._last(self.base_layers)
        return float(torch.nn.functional.cosine_similarity(self._base, self._last(layers), dim=-1).mean())

    def _last(self, layers: Sequence[MergedLayer]) -> torch.Tensor:
        rows = torch.arange(len(self.mask), device=self.mask.device)
        return self.run(layers)[rows, self.mask.sum(dim=1) - 1].double()
