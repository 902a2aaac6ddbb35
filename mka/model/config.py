"""A model's config.json: read into what stock makes of it, written so that older readers understand it too."""

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from mka.errors import CheckpointError
from mka.model.families import ALTERNATING, FAMILIES

# Ours to set, whatever a fine-tune left behind: how attention is computed, and what a call returns.
_ATTENTION = (
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    "_attn_implementation_autoset",
)
_CALL = {
    **{"return_dict": True, "use_return_dict": True, "use_cache": True},
    **{"torchscript": False, "output_hidden_states": False, "output_attentions": False},
}
_TOKENIZER = "AutoTokenizer"
_SLIDING = "sliding_attention"
# What was made a list, and what makes the list where it is not spelled out.
_SUPERSEDED = {
    "layer_types": ("sliding_window_pattern", "_sliding_window_pattern", "max_window_layers"),
    "no_rope_layers": ("no_rope_layer_interval",),
}


def clear_config(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the defaults of what is a run's own to set, and without code in stock's classes' place.

    Phi-3's first names of its rotary scaling become the present one, as its own code has it.
    """
    cleared = {key: deepcopy(_CALL.get(key, value)) for key, value in body.items() if key not in _ATTENTION}
    auto_map = cleared.pop("auto_map", None)
    if isinstance(auto_map, dict) and _TOKENIZER in auto_map:
        cleared["auto_map"] = {_TOKENIZER: auto_map[_TOKENIZER]}
    if body.get("model_type") == "phi3":
        for scaling in (cleared.get("rope_scaling"), cleared.get("rope_parameters")):
            for key in ("type", "rope_type"):
                if isinstance(scaling, dict) and scaling.get(key) in ("su", "yarn"):
                    scaling[key] = "longrope"
    return cleared


def build_config(body: Mapping[str, Any], where: str | Path) -> Any:
    """Return the config stock's class makes of a config.json; attention and return type are the library's defaults.

    Args:
        body: config.json as read, of a supported family.
        where: for the refusal.

    Raises:
        CheckpointError: if transformers refuses it.
    """
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[body["model_type"]].from_dict(clear_config(body))
    except Exception as error:
        raise CheckpointError(f"{where}: config.json is refused: {' '.join(str(error).split())[:300]}") from None


def write_config(folder: Path, body: Mapping[str, Any]) -> None:
    """Write config.json as `spell_config` has it."""
    document = spell_config(body, folder)
    (folder / "config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def spell_config(body: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    """Return a config that older readers take for the same model.

    Rotary settings stand there in both spellings. Keys from which readers once made per-layer lists say what the list
    says, or are left out where they cannot.

    Args:
        body: a config that stock loads.
        where: for a refusal.

    Raises:
        CheckpointError: if transformers refuses it.
    """
    spelled = clear_config(body)
    found = build_config(body, where).to_dict()
    _spell_rotary(spelled, found)
    for name, keys in _SUPERSEDED.items():
        if spelled.get(name):
            for key in keys:
                spelled.pop(key, None)
    older, types = FAMILIES[spelled["model_type"]].older_kinds, spelled.get("layer_types")
    if older and older != ALTERNATING and types and (value := _DERIVE[older](types)) is not None:
        spelled[older] = value
    return spelled


def _spell_rotary(spelled: dict[str, Any], found: Mapping[str, Any]) -> None:
    """Add the older spelling of what stock made of the rotary settings, beside the present one."""
    parameters = found.get("rope_parameters")
    if not isinstance(parameters, dict) or not parameters:
        return
    parameters = _drop_type(parameters)
    whole = parameters.get("full_attention", parameters)
    local = parameters.get(_SLIDING)
    spelled["rope_parameters"] = parameters
    spelled["rope_theta"] = whole["rope_theta"]
    if isinstance(local, dict):
        spelled["rope_local_base_freq"] = local["rope_theta"]
    if "partial_rotary_factor" in whole:
        spelled["partial_rotary_factor"] = whole["partial_rotary_factor"]
    if not spelled.get("rope_scaling"):
        scaling = {k: v for k, v in whole.items() if k not in ("rope_theta", "partial_rotary_factor")}
        spelled["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    if spelled.get("model_type") == "phi3" and spelled["rope_scaling"]:
        spelled["original_max_position_embeddings"] = found["original_max_position_embeddings"]
        spelled["rope_scaling"] = _spell_longrope(spelled["rope_scaling"])


def _drop_type(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Leave the older name of ``rope_type`` out of settings, which may be apart for kinds of layers."""
    kept = {key: value for key, value in parameters.items() if key != "type"}
    return {key: _drop_type(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _spell_longrope(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Phi-3's readers once refused anything but these three keys; what says more is left as it is."""
    known = {"type", "rope_type", "short_factor", "long_factor", "original_max_position_embeddings"}
    if scaling.keys() - known:
        return dict(scaling)
    return {"type": "longrope", "short_factor": scaling["short_factor"], "long_factor": scaling["long_factor"]}


def find_period(types: Sequence[str]) -> int | None:
    """Return p if every p-th layer, and no other, looks at everything; None if there is no such p."""
    for period in range(1, len(types) + 2):
        if all((kind == _SLIDING) == bool((i + 1) % period) for i, kind in enumerate(types)):
            return period
    return None


def _count_full(types: Sequence[str]) -> int | None:
    """Return k if the first k layers look at everything and all others do not; None if there is no such k."""
    count = next((i for i, kind in enumerate(types) if kind == _SLIDING), len(types))
    return count if set(types[count:]) <= {_SLIDING} else None


def _count_alternating(types: Sequence[str]) -> int | None:
    """Return 2 if the first of every two layers does not look at everything; else None."""
    return 2 if all((kind == _SLIDING) == (i % 2 == 0) for i, kind in enumerate(types)) else None


_DERIVE: dict[str, Callable[[Sequence[str]], int | None]] = {
    "sliding_window_pattern": find_period,
    "max_window_layers": _count_full,
    ALTERNATING: _count_alternating,
}
# The first readers of kinds of layers from a list, and of rotary scaling by the names it has now.
_LISTS, _SCALING = "4.53", "4.45"


def find_reader(body: Mapping[str, Any]) -> str | None:
    """Return the oldest transformers that takes a config for the same model, as ``"4.53"``; None if it is not known."""
    family = FAMILIES[body["model_type"]]
    if family.known_since is None or body.get("quantization_config") is not None:
        return None
    needed, types = [family.known_since], body.get("layer_types") or []
    # Of Qwen's readers before, only those with flash attention looked back over a window at all.
    windowed = family.older_kinds == "max_window_layers" and _SLIDING in types
    if windowed or (types and family.older_kinds and _DERIVE[family.older_kinds](types) is None):
        needed.append(_LISTS)
    if body.get("rope_scaling"):
        needed.append(_SCALING)
    return max(needed)
