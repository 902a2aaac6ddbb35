"""The residual stream of a model around the cuts of a plan, in one walk from layer to layer."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from mka.evidence.cuts import Cut, CutTokens
from mka.evidence.walk import walk_layers
from mka.model.decoder import Decoder, as_decoder
from mka.model.walk import Batch, enter_texts
from mka.plan.plan import identity_layers
from mka.texts.tokens import tokenize


@contextmanager
def _tap_writers(decoder: Decoder, layers: Iterable[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Keep what the MLPs of some layers add to the stream, the last batch of each, while the block runs."""
    written: dict[int, torch.Tensor] = {}

    def keep(index: int, module: Any, args: Any, output: torch.Tensor) -> None:
        written[index] = output

    with ExitStack() as stack:
        for index in layers:
            writer = decoder.layers[index].get_submodule(decoder.family.mlp.residual_writer)
            stack.callback(writer.register_forward_hook(partial(keep, index)).remove)
        yield written


@torch.inference_mode()
def stream_cuts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    cuts: Sequence[Cut],
    *,
    max_tokens: int,
    batch_size: int = 16,
    on_layer: Callable[[int], Any] | None = None,
) -> Iterator[tuple[Cut, CutTokens]]:
    """Walk texts through a model; yield what its residual stream holds at each cut, without padding.

    Memory is one layer, and three arrays of hidden states of all tokens. Layers behind the last cut are not run.

    Args:
        model: the base, a transformers causal language model or a `mka.model.decoder.Decoder`.
        tokenizer: its tokenizer.
        texts: calibration texts.
        cuts: of `mka.evidence.cuts.find_cuts`, from the first layer on.
        max_tokens: tokens kept of each text.
        batch_size: texts per pass.
        on_layer: called with the number of tokens that have passed a layer.

    Yields:
        Cut by cut, its tokens batch by batch.

    Raises:
        CalibrationError: if a text has no tokens.
    """
    decoder = as_decoder(model)
    batches = enter_texts(decoder, tokenize(tokenizer, texts, max_tokens), batch_size)
    first, last = ({cut.deleted[end]: cut for cut in cuts} for end in (0, -1))
    # Of the one cut the walk is at, batch by batch: what entered it, and what the MLP before it added.
    entering: deque[torch.Tensor] = deque()
    mlps: deque[torch.Tensor] = deque()
    with _tap_writers(decoder, [index - 1 for index in first if index]) as written:
        for index, batch, before in walk_layers(decoder, identity_layers(max(last) + 1), batches, on_layer):
            if index in written:
                mlps.append(written.pop(index))
            if index in first:
                entering.append(before)
            if index in last:
                cut = last[index]
                mlp = mlps.popleft() if cut.deleted[0] else None
                yield cut, _read_real(batch, entering.popleft(), mlp)


def _read_real(batch: Batch, entering: torch.Tensor, mlp: torch.Tensor | None) -> CutTokens:
    """Take the real tokens, n of (S, T), of a batch that has left a cut; padding stays behind."""
    real = batch.mask.bool()
    x, y, m = (None if s is None else s[real].double().cpu().numpy() for s in (entering, batch.states, mlp))
    assert x is not None and y is not None
    return CutTokens(x, y, m)
