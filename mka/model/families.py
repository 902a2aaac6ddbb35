"""What differs between model families, as data. A family that is not here is refused, never guessed at."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mka.errors import CheckpointError, PlanError, nearest
from mka.model.parts import ATTENTION, MLP, Part

# Kinds of layers that no key of a config named: the even ones look back over a window.
ALTERNATING = "alternating"


@dataclass(frozen=True)
class Family:
    """One decoder architecture: its layout, in module paths that are also the stems of tensor names.

    Attributes:
        model_type: the config's ``model_type``.
        parts: of a layer, in the order they run. Where layers differ in kind, the parts of all kinds; a layer has those
            whose tensors it has. The gain of a part's norm may be moved into the columns of its readers without
            changing the function, ``W (g * x) = (W g) x``.
        gain_offset: norms multiply by ``gain_offset + weight`` (Gemma stores its gains around zero).
        per_layer_config: config entries with one value per layer. They are cut with the layers, and layers that
            differ in any of them are of different kinds and never merged.
        backbone: everything but the head.
        layers: the decoder layers.
        embedding: of tokens.
        norm: the final norm.
        head: the language-model head.
        known_since: the first transformers that knows it, as ``"4.53"``; None if nobody looked.
        older_kinds: the config key from which readers before 4.53 make kinds of layers; `ALTERNATING` if from none,
            every other one; None if layers never differed then.
    """

    model_type: str
    parts: tuple[Part, ...]
    gain_offset: float = 0.0
    per_layer_config: tuple[str, ...] = ("layer_types",)
    backbone: str = "model"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    known_since: str | None = None
    older_kinds: str | None = None

    def part(self, kind: str) -> Part:
        """Return a layer's part of a kind.

        Raises:
            PlanError: if its layers have none.
        """
        for part in self.parts:
            if part.kind == kind:
                return part
        kinds = ", ".join(part.kind for part in self.parts)
        raise PlanError(f"layers of architecture {self.model_type!r} have no part {kind!r}; they have: {kinds}")

    @property
    def attention(self) -> Part:
        """The part that mixes positions."""
        return self.part(ATTENTION)

    @property
    def mlp(self) -> Part:
        """The part that reads each position alone."""
        return self.part(MLP)

    @property
    def folds(self) -> Mapping[str, tuple[str, ...]]:
        """Norm -> the linear layers that read its output."""
        folds: dict[str, tuple[str, ...]] = {}
        for part in self.parts:
            folds[part.norm] = (*folds.get(part.norm, ()), *part.readers)
        return folds

    @property
    def embedding_tensor(self) -> str:
        """Name of the embedding's weight, (V, D)."""
        return f"{self.embedding}.weight"

    @property
    def norm_tensor(self) -> str:
        """Name of the final norm's gain, (D,)."""
        return f"{self.norm}.weight"

    @property
    def head_tensor(self) -> str:
        """Name of the language-model head's weight, (V, D); a tied head is often not stored."""
        return f"{self.head}.weight"

    def layer_tensor(self, layer: int, suffix: str) -> str:
        """Return a tensor's name from its layer and its name within it."""
        return f"{self.layers}.{layer}.{suffix}"

    def split_tensor(self, name: str) -> tuple[int, str] | None:
        """Return a tensor's layer and its name within it; None of a tensor outside the layers."""
        match = re.fullmatch(rf"{re.escape(self.layers)}\.(\d+)\.(.+)", name)
        return (int(match[1]), match[2]) if match else None

    def stored_pieces(self, name: str, count: int) -> tuple[str, ...]:
        """Return the stored tensors that make a parameter, row behind row: itself, unless files hold it in pieces.

        Args:
            name: of the parameter.
            count: length of its first dimension.
        """
        if (place := self.split_tensor(name)) is not None:
            layer, suffix = place
            patterns = next((part.stacked[suffix] for part in self.parts if suffix in part.stacked), None)
            if patterns is not None:
                pieces = (pattern.format(number) for number in range(count) for pattern in patterns)
                return tuple(self.layer_tensor(layer, piece) for piece in pieces)
        return (name,)

    def is_derived(self, name: str) -> bool:
        """Whether a stored tensor is a buffer that every reader makes of the config: rotary frequencies of old."""
        place = self.split_tensor(name)
        return place is not None and place[1].endswith("rotary_emb.inv_freq")

    def stored_offset(self, name: str) -> float:
        """Return what has to be added to a tensor to get what it means: `gain_offset` of a norm's weight, else 0."""
        return self.gain_offset if name.endswith("norm.weight") else 0.0

    def get_backbone(self, model: Any) -> Any:
        """Return the module of a loaded model that ends with the final norm."""
        return model.get_submodule(self.backbone)

    def get_layers(self, model: Any) -> Any:
        """Return the decoder layers of a loaded model."""
        return model.get_submodule(self.layers)

    def get_embedding(self, model: Any) -> Any:
        """Return the embedding of a loaded model."""
        return model.get_submodule(self.embedding)

    def get_norm(self, model: Any) -> Any:
        """Return the final norm of a loaded model."""
        return model.get_submodule(self.norm)

    def get_head(self, model: Any) -> Any:
        """Return the language-model head of a loaded model."""
        return model.get_submodule(self.head)


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_SPLIT = (
    Part(ATTENTION, "self_attn", "input_layernorm", _QKV, "self_attn.o_proj"),
    Part(MLP, "mlp", "post_attention_layernorm", _GATE_UP, "mlp.down_proj"),
)
_FUSED = (
    Part(ATTENTION, "self_attn", "input_layernorm", ("self_attn.qkv_proj",), "self_attn.o_proj"),
    Part(MLP, "mlp", "post_attention_layernorm", ("mlp.gate_up_proj",), "mlp.down_proj"),
)
# Gemma norms the output of each part as well; those gains sit behind a norm and cannot be folded.
_SANDWICHED = (
    Part(ATTENTION, "self_attn", "input_layernorm", _QKV, "self_attn.o_proj", "post_attention_layernorm"),
    Part(MLP, "mlp", "pre_feedforward_layernorm", _GATE_UP, "mlp.down_proj", "post_feedforward_layernorm"),
)

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", _SPLIT, known_since="4.28"),
        Family("mistral", _SPLIT, known_since="4.34"),
        Family("qwen2", _SPLIT, known_since="4.37", older_kinds="max_window_layers"),
        Family("qwen3", _SPLIT, known_since="4.51", older_kinds="max_window_layers"),
        Family("smollm3", _SPLIT, per_layer_config=("layer_types", "no_rope_layers"), known_since="4.53"),
        Family("phi3", _FUSED, known_since="4.41"),
        Family("gemma2", _SANDWICHED, gain_offset=1.0, known_since="4.42", older_kinds=ALTERNATING),
        Family("gemma3_text", _SANDWICHED, 1.0, known_since="4.50", older_kinds="sliding_window_pattern"),
    )
}


def get_family(model_type: str | None, where: str) -> Family:
    """Return the family of a ``model_type``.

    Raises:
        CheckpointError: if it is not supported; the message lists the ones that are.
    """
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    raise CheckpointError(
        f"{where}: architecture {model_type!r} is not supported{nearest(str(model_type), FAMILIES)}; "
        f"supported: {', '.join(sorted(FAMILIES))}"
    )


def layer_kinds(config: Any, family: Family) -> tuple[tuple[Any, ...], ...]:
    """Return one tuple per layer, a value (or None) per entry of ``family.per_layer_config``.

    Layers may be merged only if their tuples are equal.

    Args:
        config: a transformers config (it resolves per-layer lists that config.json leaves implicit).
        family: the config's family.

    Raises:
        CheckpointError: if a per-layer list has another length than the model.
    """
    count = config.num_hidden_layers
    lists = [getattr(config, name, None) for name in family.per_layer_config]
    for name, values in zip(family.per_layer_config, lists):
        if values and len(values) != count:
            raise CheckpointError(f"{name} has {len(values)} entries for {count} layers; the two must agree")
    return tuple(tuple(values[i] if values else None for values in lists) for i in range(count))
