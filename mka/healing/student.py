"""Teacher and student side by side: where they begin to differ, and how far apart their readings are."""

from typing import Any

import torch

from mka.errors import CheckpointError
from mka.model.checkpoint import Checkpoint
from mka.model.decoder import Decoder
from mka.model.readout import read_logits, read_out, sum_divergence
from mka.model.walk import own_context, run_layer

# Positions whose logits are in memory at a time where nothing is trained.
ROWS = 256


def check_student(base: Checkpoint, student: Checkpoint) -> None:
    """Refuse a student that cannot follow this base.

    Raises:
        CheckpointError: if architecture, width or vocabulary differ, or one of them is quantized.
    """
    for checkpoint in (base, student):
        if checkpoint.is_quantized:
            raise CheckpointError(f"{checkpoint.path}: weights are quantized; heal before quantizing")
    for key in ("model_type", "hidden_size", "vocab_size"):
        there, given = base.config.get(key), student.config.get(key)
        if there != given:
            raise CheckpointError(
                f"{student.path} has {key} {given!r} and the base {base.path} {there!r}; name the base it was made of"
            )
    if student.layers > base.layers:
        raise CheckpointError(
            f"{student.path} has {student.layers} layers and the base {base.path} {base.layers}; name the model and "
            "its base the other way round"
        )


def count_shared(base: Checkpoint, student: Checkpoint) -> int | None:
    """Return how many layers at the start are the base's own, bit by bit, with the embedding in front of them.

    What runs through them is the same in both models and needs no gradient.

    Returns:
        The number of layers; None if the embeddings differ.

    Raises:
        CheckpointError: if student and base are the same model.
    """
    family = base.family
    with base.reader() as read, student.reader() as read_student:

        def agree(name: str) -> bool:
            if (name in base.tensors) != (name in student.tensors):
                return False
            return name not in base.tensors or torch.equal(read(name), read_student(name))

        if not agree(family.embedding_tensor):
            return None
        shared = 0
        while shared < student.layers and base.kinds[shared] == student.kinds[shared]:
            suffixes = base.layer_tensors(shared).keys() | student.layer_tensors(shared).keys()
            if not all(agree(family.layer_tensor(shared, suffix)) for suffix in sorted(suffixes)):
                break
            shared += 1
        if shared == base.layers and agree(family.norm_tensor) and agree(family.head_tensor):
            raise CheckpointError(f"{student.path} equals its base {base.path}; there is nothing to heal")
    return shared


@torch.inference_mode()
def measure_divergence(base: Decoder, student: Decoder, windows: torch.Tensor) -> float:
    """Return KL(base || student), nats per token, of two decoders that are walked layer by layer.

    Args:
        base: a decoder.
        student: another, of the same vocabulary.
        windows: token ids, (H, T).
    """
    finals = []
    for decoder in (base, student):
        states, contexts = decoder.enter(windows)
        for index, layer in enumerate(decoder.layers):
            with decoder.hold(index):
                states = run_layer(layer, states, contexts[index])
        finals.append(decoder.norm(states).flatten(0, 1))  # (H, T, D) -> (H T, D)
    total = 0.0
    with base.hold_head(), student.hold_head():
        for wanted, given in zip(*(states.split(ROWS) for states in finals)):
            total += sum_divergence(read_out(base, wanted), read_out(student, given))
    return total / windows.numel()


class Student(torch.nn.Module):
    """The part of a student that is trained, and the distance of its readings from the base's.

    Its parameters are those trained, its state alone is what a trainer stores. The layers in front of the first change
    run once for both models and without a gradient; the base runs without one, too.
    """

    def __init__(
        self,
        base: Any,
        student: Any,
        shared: int | None,
        trained: torch.nn.ModuleDict,
        *,
        positions: float,
        length: int,
    ) -> None:
        """Put the two models side by side.

        Args:
            base: transformers causal language model.
            student: the same, the layers of which are trained in place.
            shared: of `count_shared`.
            trained: modules of the student that hold what is trained; only this is stored by a trainer.
            positions: share of the positions whose logits are compared while training; all are where it is evaluated.
            length: tokens per window, T.
        """
        super().__init__()
        self.trained, self.positions, self.shared = trained, positions, shared
        # In a tuple, so that they are no modules of this one.
        self._models = (Decoder(base), Decoder(student))
        ids = torch.zeros((1, length), dtype=torch.long)
        self._contexts = [own_context(decoder.enter(ids)[1]) for decoder in self._models]

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Have the student's layers keep their inputs alone; called by the trainer."""
        model = self._models[1].model
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)
        model.train()

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return KL(base || student), in nats per compared position, under "loss".

        Args:
            input_ids: windows, (S, T).
        """
        teacher, pupil = self._models
        count = len(teacher.layers)
        with torch.no_grad():
            states = teacher.enter(input_ids)[0].clone()  # what inference mode makes cannot be kept for a gradient
            states = self._run(0, states, 0, self.shared or 0)
            target = teacher.norm(self._run(0, states, self.shared or 0, count))
            if self.shared is None:
                states = pupil.enter(input_ids)[0].clone()
        read = pupil.norm(self._run(1, states, self.shared or 0, len(pupil.layers)))
        width = read.shape[-1]
        target, read = target.reshape(-1, width), read.reshape(-1, width)  # (S T, D)
        if not torch.is_grad_enabled():
            pairs = zip(target.split(ROWS), read.split(ROWS))
            return {"loss": sum((self._diverge(*pair) for pair in pairs), target.new_zeros(())) / len(target)}
        compared = max(1, round(self.positions * len(target)))
        chosen = torch.randperm(len(target))[:compared].to(target.device)
        return {"loss": self._diverge(target[chosen], read[chosen]) / compared}

    def _run(self, which: int, states: torch.Tensor, first: int, last: int) -> torch.Tensor:
        decoder, contexts = self._models[which], self._contexts[which]
        for index in range(first, last):
            states = run_layer(decoder.layers[index], states, contexts[index])
        return states

    def _diverge(self, target: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """KL of the heads' readings of normed states, (R, D) each, summed over R."""
        teacher, pupil = self._models
        with torch.no_grad():
            wanted = torch.log_softmax(read_logits(teacher, target), dim=-1)
        given = torch.log_softmax(read_logits(pupil, read), dim=-1)
        return torch.nn.functional.kl_div(given, wanted, log_target=True, reduction="sum")
