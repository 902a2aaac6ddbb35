"""A planned model in memory, sharing every unchanged tensor with its base, and how far it is from it."""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from mka.errors import NumericsError
from mka.families import LAYER_KEY, get_family, layer_kinds
from mka.merging import combine_layers, cut_config
from mka.observe import pad, tokenize
from mka.plan import LayerRecipe


def build_candidate(model: Any, layers: Sequence[LayerRecipe]) -> Any:
    """Build the planned model beside its base.

    Copied layers share their tensors with ``model``; only merged layers take memory. The arithmetic is
    `mka.merging.combine_layers`, the same that writes checkpoints.

    Args:
        model: the base, a transformers causal language model.
        layers: output layers of a plan.
    """
    from accelerate import init_empty_weights

    family = get_family(model.config.model_type, "model")
    config = copy.deepcopy(model.config)
    for key, value in cut_config({}, layer_kinds(model.config, family), family, layers).items():
        setattr(config, key, value)
    with init_empty_weights(include_buffers=False):
        candidate = type(model)(config)
    state = model.state_dict()
    mapped = {name: tensor for name, tensor in state.items() if not LAYER_KEY.match(name)}
    suffixes = sorted({match[2] for name in state if (match := LAYER_KEY.match(name))})
    for position, layer in enumerate(layers):
        for suffix in suffixes:
            if f"model.layers.{layer.sources[0]}.{suffix}" in state:
                mapped[f"model.layers.{position}.{suffix}"] = combine_layers(
                    layer, suffix, family, lambda i, s: state[f"model.layers.{i}.{s}"]
                )
    candidate.load_state_dict(mapped, strict=True, assign=True)
    candidate.tie_weights()
    candidate.to(model.device)
    return candidate.eval()


class Divergence:
    """KL divergence of planned models from their base on calibration tokens.

    ``KL(base || candidate)`` in nats per token, averaged over all real positions. The base's logits are computed once
    and kept (tokens x vocabulary x 4 bytes). Layers that the plan leaves untouched at the start are run once and
    their output is reused while only later layers change, which is what a line search does.
    """

    def __init__(self, model: Any, tokenizer: Any, texts: Sequence[str], *, max_tokens: int, tokens: int) -> None:
        """Take texts in order until ``tokens`` tokens are there, each cut to ``max_tokens``."""
        self.model = model
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []
        sequences: list[list[int]] = []
        taken = 0
        for ids in tokenize(tokenizer, texts, max_tokens):
            if taken >= tokens:
                break
            sequences.append(ids)
            taken += len(ids)
        self.tokens = taken
        self.ids, self.mask = pad(sequences, model.device)
        self._base: torch.Tensor | None = None
        self._prefix: tuple[int, torch.Tensor] | None = None

    @torch.inference_mode()
    def _logits(self, model: Any, embedded: torch.Tensor | None) -> torch.Tensor:
        inputs = {"input_ids": self.ids} if embedded is None else {"inputs_embeds": embedded}
        hidden = model.model(**inputs, attention_mask=self.mask, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[self.mask.bool()]).float()
        cap = getattr(model.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @torch.inference_mode()
    def _hidden_before(self, depth: int) -> torch.Tensor:
        """Return the base's hidden states at the input of layer ``depth``, (S, T, D)."""
        if self._prefix is None or self._prefix[0] != depth:
            caught: list[torch.Tensor] = []

            def stop(module: Any, args: Any, kwargs: Any) -> None:
                caught.append(args[0] if args else kwargs["hidden_states"])
                raise _Caught

            handle = self.model.model.layers[depth].register_forward_pre_hook(stop, with_kwargs=True)
            try:
                self.model.model(input_ids=self.ids, attention_mask=self.mask, use_cache=False)
            except _Caught:
                pass
            finally:
                handle.remove()
            self._prefix = (depth, caught[0])
        return self._prefix[1]

    @torch.inference_mode()
    def __call__(self, layers: Sequence[LayerRecipe]) -> float:
        """Return nats per token for the model these output layers make.

        Raises:
            NumericsError: if the candidate's logits are not finite.
        """
        if self._base is None:
            self._base = torch.log_softmax(self._logits(self.model, None), dim=-1)
        depth = 0
        while depth < len(layers) - 1 and layers[depth] == LayerRecipe((depth,), (1.0,)):
            depth += 1
        embedded = self._hidden_before(depth) if depth else None
        logits = self._logits(build_candidate(self.model, layers[depth:]), embedded)
        if not bool(logits.isfinite().all()):
            raise NumericsError("the candidate's logits are NaN or infinite; the merge destroyed the model")
        candidate = torch.log_softmax(logits, dim=-1)
        total = 0.0
        for base, other in zip(self._base.split(256), candidate.split(256)):
            total += float((base.exp() * (base - other)).sum(dtype=torch.float64))
        return total / self._base.shape[0]


class _Caught(Exception):
    """Ends a forward pass once the wanted hidden states are in hand."""
