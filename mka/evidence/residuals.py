"""The residual stream of a model around the cuts of a plan, batch by batch, in one forward pass."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from mka.evidence.cuts import Cut, CutTokens
from mka.model.families import get_family
from mka.texts.tokens import batch_by_length, tokenize
from mka.transforms.fold import DOWN


class _StreamTap:
    """Forward hooks that keep one batch of what the cuts ask for."""

    def __init__(self, layers: torch.nn.ModuleList, cuts: Sequence[Cut], writer: str) -> None:
        self.outputs: dict[int, torch.Tensor] = {}
        self.written: dict[int, torch.Tensor] = {}
        self.handles = [layers[0].register_forward_pre_hook(self._embedding, with_kwargs=True)]
        before = {cut.deleted[0] - 1 for cut in cuts} - {-1}
        for index in before | {cut.deleted[-1] for cut in cuts}:
            self.handles.append(layers[index].register_forward_hook(self._keep(self.outputs, index)))
        for index in before:
            module = layers[index].get_submodule(writer)
            self.handles.append(module.register_forward_hook(self._keep(self.written, index)))

    def _embedding(self, module: Any, args: Any, kwargs: Any) -> None:
        self.outputs[-1] = args[0] if args else kwargs["hidden_states"]

    def _keep(self, place: dict[int, torch.Tensor], index: int) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            place[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def read(self, cut: Cut, real: torch.Tensor) -> CutTokens:
        before = cut.deleted[0] - 1
        states = (self.outputs[before], self.outputs[cut.deleted[-1]], self.written.get(before))
        entering, leaving, mlp = (None if s is None else s[real].double().cpu().numpy() for s in states)
        assert entering is not None and leaving is not None
        return CutTokens(entering, leaving, mlp)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@torch.inference_mode()
def stream_cuts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    cuts: Sequence[Cut],
    *,
    max_tokens: int,
    batch_size: int = 16,
    on_batch: Callable[[int], Any] | None = None,
) -> Iterator[tuple[Cut, CutTokens]]:
    """Run a model over texts; yield what its residual stream holds at each cut, without padding.

    Args:
        model: the base, a transformers causal language model.
        tokenizer: its tokenizer.
        texts: calibration texts.
        cuts: of `mka.evidence.cuts.find_cuts`.
        max_tokens: tokens kept of each text.
        batch_size: texts per pass.
        on_batch: called with the number of real tokens of each batch.

    Raises:
        CalibrationError: if a text has no tokens.
    """
    sequences = tokenize(tokenizer, texts, max_tokens)
    writer = get_family(model.config.model_type, "model").residual_writer(DOWN)
    tap = _StreamTap(model.model.layers, cuts, writer)
    try:
        for _, ids, mask in batch_by_length(sequences, batch_size, model.device):
            model.model(input_ids=ids, attention_mask=mask, use_cache=False)
            real = mask.bool()
            for cut in cuts:
                yield cut, tap.read(cut, real)
            if on_batch:
                on_batch(int(mask.sum()))
    finally:
        tap.remove()
