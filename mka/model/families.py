"""What differs between model families, as data. A family that is not here is refused, never guessed at."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mka.errors import CheckpointError, nearest
from mka.model.parts import Sublayer

LAYER_KEY = re.compile(r"^model\.layers\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Family:
    """One decoder architecture.

    Attributes:
        model_type: the config's ``model_type``.
        folds: norm -> the linear layers that read its output. RMSNorm multiplies by a gain that may be moved into
            the columns of those layers without changing the function, ``W (g * x) = (W g) x``.
        gain_offset: the norm multiplies by ``gain_offset + weight`` (Gemma stores its gains around zero).
        per_layer_config: config entries with one value per layer. They are cut with the layers, and layers that
            differ in any of them are of different kinds and never merged.
        post_norms: module -> the norm its output passes before it is added to the residual stream.
    """

    model_type: str
    folds: Mapping[str, tuple[str, ...]]
    gain_offset: float = 0.0
    per_layer_config: tuple[str, ...] = ("layer_types",)
    post_norms: Mapping[str, str] = field(default_factory=dict)

    @property
    def attention(self) -> Sublayer:
        """The first half of a layer."""
        return self._sublayer("self_attn", "self_attn.o_proj")

    @property
    def mlp(self) -> Sublayer:
        """The second half of a layer."""
        return self._sublayer("mlp", "mlp.down_proj")

    def _sublayer(self, module: str, writer: str) -> Sublayer:
        norm, readers = next(item for item in self.folds.items() if item[1][0].startswith(f"{module}."))
        return Sublayer(module, norm, readers, writer, self.post_norms.get(writer))

    def residual_writer(self, module: str) -> str:
        """Return the module of a layer whose output is added to the residual stream.

        Args:
            module: the sublayer's last linear layer, ``"self_attn.o_proj"`` or ``"mlp.down_proj"``.
        """
        return self.post_norms.get(module, module)


_SPLIT = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_FUSED = {
    "input_layernorm": ("self_attn.qkv_proj",),
    "post_attention_layernorm": ("mlp.gate_up_proj",),
}
# Gemma norms the output of each sublayer as well; those gains sit behind a norm and cannot be folded.
_SANDWICHED = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "pre_feedforward_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_POST_NORMS = {
    "self_attn.o_proj": "post_attention_layernorm",
    "mlp.down_proj": "post_feedforward_layernorm",
}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", _SPLIT),
        Family("mistral", _SPLIT),
        Family("qwen2", _SPLIT),
        Family("qwen3", _SPLIT),
        Family("smollm3", _SPLIT, per_layer_config=("layer_types", "no_rope_layers")),
        Family("phi3", _FUSED),
        Family("gemma2", _SANDWICHED, gain_offset=1.0, post_norms=_POST_NORMS),
        Family("gemma3_text", _SANDWICHED, gain_offset=1.0, post_norms=_POST_NORMS),
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
