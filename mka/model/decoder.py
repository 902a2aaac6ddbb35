"""A decoder that is walked layer by layer. Of a streamed one, only the layers somebody holds are in memory."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mka.errors import CalibrationError
from mka.model.checkpoint import Checkpoint
from mka.model.device import find_device, refuse_single
from mka.model.families import Family, get_family
from mka.model.outline import build_outline, find_pieces
from mka.model.tensors import TRIM_BYTES, TensorReader, give_memory_back


class Decoder:
    """A transformers causal language model, in memory as a whole.

    Attributes:
        model: the model; what a streamed one does not hold has no values.
        family: its family.
        device: where it computes.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.family: Family = get_family(model.config.model_type, "model")
        self.device: torch.device = model.device

    @property
    def layers(self) -> Any:
        """The decoder layers; those that are not held must not be run."""
        return self.family.get_layers(self.model)

    @property
    def norm(self) -> Any:
        """The final norm, which is always held."""
        return self.family.get_norm(self.model)

    @property
    def is_tied(self) -> bool:
        """Whether the language-model head is the embedding."""
        return bool(self.model.config.tie_word_embeddings)

    @contextmanager
    def hold(self, *layers: int) -> Iterator[None]:
        """Have these layers in memory within the block; blocks may be nested."""
        yield

    @contextmanager
    def hold_head(self) -> Iterator[None]:
        """Have the language-model head in memory within the block."""
        yield

    def tidy(self) -> None:
        """Called when a lot of memory has been let go of."""

    @contextmanager
    def _hold_rows(self, ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """Have the embeddings of these tokens in memory within the block; yields ids that name them there."""
        yield ids

    @torch.inference_mode()
    def enter(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """Return what enters the first layer and what the decoder hands to each layer beside it; runs no layer.

        Args:
            ids: token ids, (S, T).
            mask: 1 for real tokens, (S, T); None if all are.

        Returns:
            Hidden states (S, T, D), and one dictionary of keyword arguments (masks, positions) per layer. Without a
            mask they serve any number of sequences of T tokens.

        Raises:
            CalibrationError: if the embedding has no row for a token.
        """
        if (largest := int(ids.max())) >= (rows := self.model.config.vocab_size):
            raise CalibrationError(
                f"a text holds token {largest}, and the embedding has {rows} rows; take what it stands for out"
            )
        states: list[torch.Tensor] = []
        contexts: list[dict[str, Any]] = []

        def catch(hidden_states: torch.Tensor, **context: Any) -> torch.Tensor:
            states.append(hidden_states)
            contexts.append(context)
            return hidden_states

        # On the instance, so that everything the decoder reads of a layer (its kind of attention) is still there.
        for layer in self.layers:
            layer.forward = catch
        try:
            with self._hold_rows(ids.to(self.device)) as held:
                mask = mask if mask is None else mask.to(self.device)
                self.family.get_backbone(self.model)(input_ids=held, attention_mask=mask, use_cache=False)
        finally:
            for layer in self.layers:
                del layer.forward
        return states[0], contexts


def as_decoder(model: Any) -> Decoder:
    """Return a decoder as it is, and a transformers model as one."""
    return model if isinstance(model, Decoder) else Decoder(model)


class StreamedDecoder(Decoder):
    """A decoder whose weights are read when they are held, and let go of afterwards.

    The final norm stays; of the embedding only the rows of the tokens that enter are read. The memory of a layer let go
    of is that of the next one held.
    """

    def __init__(self, checkpoint: Checkpoint, read: TensorReader, dtype: str) -> None:
        """Build the model without its weights, where models are run.

        Args:
            checkpoint: unquantized.
            read: of the checkpoint, open for as long as the decoder is used.
            dtype: what weights are cast to, e.g. "float32".

        Raises:
            CheckpointError: if a weight is missing, left over or of another shape than the config says.
            RecipeError: if that device cannot hold the sums that are made of what is walked.
        """
        device = find_device()
        refuse_single(device, "what is seen layer by layer")
        self.read, self.dtype = read, getattr(torch, dtype)
        model = build_outline(checkpoint, self.dtype)
        self._pieces = find_pieces(checkpoint, model)
        super().__init__(model)
        self.device = device
        # Only gradients read it, and rows are numbered anew.
        self.family.get_embedding(model).padding_idx = None
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        self._held: Counter[int] = Counter()
        self._passed = 0
        self._spare: defaultdict[torch.Size, list[torch.Tensor]] = defaultdict(list)
        largest = max(t.nbytes for i in range(checkpoint.layers) for t in checkpoint.layer_tensors(i).values())
        self._raw = torch.empty(largest, dtype=torch.uint8)
        self._fill(self.family.get_norm(model), {"weight": (self.family.norm_tensor,)})

    @contextmanager
    def hold(self, *layers: int) -> Iterator[None]:
        """Have these layers in memory within the block; blocks may be nested."""
        for index in layers:
            if not self._held[index]:
                layer = self.layers[index]
                names = {name: self.family.layer_tensor(index, name) for name, _ in layer.named_parameters()}
                self._fill(layer, {name: self._pieces[full] for name, full in names.items()})
            self._held[index] += 1
        try:
            yield
        finally:
            for index in layers:
                self._held[index] -= 1
                if not self._held[index]:
                    for value in _empty(self.layers[index]):
                        self._spare[value.shape].append(value)
                        self._passed += value.nbytes
            if self._passed > TRIM_BYTES:
                self._passed = 0
                self.tidy()

    def tidy(self) -> None:
        """Give free memory back to the system."""
        give_memory_back()

    @contextmanager
    def hold_head(self) -> Iterator[None]:
        """Have the language-model head in memory within the block."""
        name = self.family.embedding_tensor if self.is_tied else self.family.head_tensor
        head = self.family.get_head(self.model)
        put_tensor(head, "weight", self.read(name).to(self.device, self.dtype))
        try:
            yield
        finally:
            _empty(head)

    @contextmanager
    def _hold_rows(self, ids: torch.Tensor) -> Iterator[torch.Tensor]:
        wanted, held = ids.unique(return_inverse=True)
        rows = [self.read(self.family.embedding_tensor, slice(row, row + 1)) for row in wanted.tolist()]
        embedding = self.family.get_embedding(self.model)
        put_tensor(embedding, "weight", torch.cat(rows).to(self.device, self.dtype))
        try:
            yield held
        finally:
            _empty(embedding)

    @torch.inference_mode()
    def _fill(self, module: Any, names: Mapping[str, Sequence[str]]) -> None:
        """Give a module's parameters the values of the checkpoint's tensors, one or several behind one another."""
        for name, tensors in names.items():
            shape = module.get_parameter(name).shape
            spare = self._spare[shape]
            value = spare.pop() if spare else torch.empty(shape, dtype=self.dtype, device=self.device)
            rest = value.view(-1)
            for tensor in tensors:
                piece = self.read(tensor, into=self._raw).view(-1)
                rest[: len(piece)].copy_(piece)
                rest = rest[len(piece) :]
            put_tensor(module, name, value)


def _empty(module: Any) -> list[torch.Tensor]:
    """Take a module's values away; returns them."""
    values = dict(module.named_parameters())
    for name, value in values.items():
        put_tensor(module, name, torch.empty_like(value, device="meta"))
    return [value.data for value in values.values()]


def put_tensor(module: Any, name: str, value: torch.Tensor) -> None:
    """Make a tensor the parameter of a module that has this name; it is not copied."""
    holder, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(holder), leaf, torch.nn.Parameter(value, requires_grad=False))
