"""What llama.cpp calls the families, what it reads of a config, and what it has no place for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gguf import RopeScalingType

from mka.errors import CheckpointError
from mka.model.config import find_period

_SLIDING = "sliding_attention"
_QKV = ("attn_q", "attn_k", "attn_v")
_MLP = ("ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's, as far as its files must differ from a stock folder.

    Attributes:
        name: GGUF's ``general.architecture``.
        interleaved: whether rotary turns neighbours, where stock turns halves; rows of queries and keys are put in
            that order.
        biases: modules of a layer whose bias it reads.
        activation: the only one it computes.
        period: whether the file may say that every p-th layer looks at everything and the others over a window. Where
            it may not, nothing is windowed.
        factors: the rotary scaling it takes as one factor per frequency; others than this and those that every
            architecture has are refused.
        scaled: the module whose output the query is, times a constant; None if the scale of attention is always that
            of the head's width.
        large: number of layers from which it concludes that this is the family's largest model, whose scale of
            attention is another.
        plain: every p-th layer has no rotary, and this p is built in.
        tied: whether the head is always the embedding.
    """

    name: str
    interleaved: bool = False
    biases: tuple[str, ...] = _QKV
    activation: str = "silu"
    period: bool = False
    factors: str | None = None
    scaled: str | None = None
    large: int | None = None
    plain: int | None = None
    tied: bool = False


_LLAMA = Architecture("llama", True, (*_QKV, "attn_output", *_MLP), factors="llama3")
_TANH = "gelu_pytorch_tanh"
# Family -> architecture. Sources: src/models of llama.cpp.
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "smollm3": Architecture("smollm3", True, plain=4),
    "phi3": Architecture("phi3", biases=(), factors="longrope"),
    "gemma2": Architecture("gemma2", activation=_TANH, period=True, scaled="attn_q", large=46, tied=True),
    "gemma3_text": Architecture("gemma3", activation=_TANH, period=True, scaled="attn_q_norm", large=62),
}


def get_architecture(model_type: str) -> Architecture:
    """Return llama.cpp's architecture of a family.

    Raises:
        CheckpointError: if it has none.
    """
    if model_type not in ARCHITECTURES:
        raise CheckpointError(
            f"architecture {model_type!r} is none that GGUF files can hold; those are: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_type]


def head_width(config: Any) -> int:
    """Return the width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def describe_config(config: Any, architecture: Architecture, count_vocabulary: int) -> dict[str, Any]:
    """Return what a file says of a model, by the names of `gguf.GGUFWriter`'s methods without their ``add_``.

    Args:
        config: a transformers config.
        architecture: its.
        count_vocabulary: rows of the embedding.

    Raises:
        CheckpointError: naming what llama.cpp would compute otherwise.
    """
    _refuse(config, architecture)
    width = head_width(config)
    found = {
        "vocab_size": count_vocabulary,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "key_length": width,
        "value_length": width,
        "layer_norm_rms_eps": config.rms_norm_eps,
    }
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None):
            found[name] = getattr(config, name)
    return found | _describe_windows(config, architecture) | _describe_rotary(config, architecture)


def query_factor(config: Any, architecture: Architecture) -> float:
    """Return what queries must be multiplied by so that llama.cpp's scale of attention becomes the config's.

    The files have no place for the scale: it is 1/sqrt(head width), or, of a family's largest model, which is told by
    its number of layers alone, 1/sqrt(hidden size / heads). A model with fewer layers is taken for another.
    """
    if architecture.scaled is None:
        return 1.0
    assumed = head_width(config)
    if config.num_hidden_layers == architecture.large:
        assumed = config.hidden_size // config.num_attention_heads
    return float((assumed / config.query_pre_attn_scalar) ** 0.5)


def list_factors(config: Any, architecture: Architecture) -> dict[str, list[float]]:
    """Return the tensors that hold rotary scaling, one divisor per frequency; none if there is no such scaling."""
    scaling = _read_scaling(config)
    if scaling.get("rope_type", "default") != architecture.factors:
        return {}
    if architecture.factors == "longrope":
        return {f"rope_factors_{length}.weight": scaling[f"{length}_factor"] for length in ("long", "short")}
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS[architecture.factors](config, None)
    width, theta = head_width(config), scaling["rope_theta"]
    plain = [theta ** (-2 * i / width) for i in range(width // 2)]
    return {"rope_freqs.weight": [own / value for own, value in zip(plain, scaled.tolist())]}


def _refuse(config: Any, architecture: Architecture) -> None:
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != architecture.activation:
        raise _unlike(architecture, "activation", activation, architecture.activation)
    across = head_width(config) * config.num_attention_heads
    if architecture.name == "phi3" and across != config.hidden_size:
        raise _unlike(architecture, "heads that are together as wide as", across, f"hidden_size, {config.hidden_size}")
    plain = architecture.plain
    rotary = [bool(value) for value in getattr(config, "no_rope_layers", None) or ()]
    if plain and rotary != [bool((i + 1) % plain) for i in range(len(rotary))]:
        raise _unlike(architecture, "no_rope_layers", [int(value) for value in rotary], f"0 in every {plain}th place")
    if architecture.tied and not config.tie_word_embeddings:
        raise _unlike(architecture, "tie_word_embeddings", False, "true")
    caps = [bool(getattr(config, name, None)) for name in ("attn_logit_softcapping", "final_logit_softcapping")]
    if architecture.name == "gemma2" and caps != [True, True]:
        raise _unlike(architecture, "logit softcapping", None, "both caps")
    if architecture.name == "gemma3" and (caps[0] or getattr(config, "use_bidirectional_attention", False)):
        raise _unlike(architecture, "attention", "capped or bidirectional", "causal, without a cap")


def _unlike(architecture: Architecture, what: str, found: Any, allowed: Any) -> CheckpointError:
    return CheckpointError(
        f"GGUF architecture {architecture.name!r} cannot hold {what} {found}, llama.cpp would compute something else; "
        f"allowed: {allowed}"
    )


def _describe_windows(config: Any, architecture: Architecture) -> dict[str, Any]:
    """Say which layers look back over a window, or keep the context within it, where all layers see the same."""
    kinds = getattr(config, "layer_types", None) or ()
    window = getattr(config, "sliding_window", None)
    if not window or (kinds and _SLIDING not in kinds):
        # Gemma 2's files are taken to have windows in every other layer.
        return {"sliding_window_pattern": 1} if architecture.name == "gemma2" else {}
    within = {"context_length": min(config.max_position_embeddings, window)}
    if not architecture.period or not kinds:
        return within
    if (period := find_period(kinds)) is not None:
        return {"sliding_window": window, "sliding_window_pattern": period}
    if _SLIDING in config.rope_parameters:  # kinds differ in their rotary as well, which no context makes alike
        raise _unlike(architecture, "layer_types", kinds, "full_attention in every p-th place, for one p")
    return {"sliding_window": window} | within


def _read_scaling(config: Any) -> Mapping[str, Any]:
    """Return the rotary settings of layers that look at everything."""
    parameters = config.rope_parameters
    return parameters.get("full_attention", parameters)


def _describe_rotary(config: Any, architecture: Architecture) -> dict[str, Any]:
    scaling, width = _read_scaling(config), head_width(config)
    turned = int(width * scaling.get("partial_rotary_factor", 1.0))
    if turned != width and architecture.name != "phi3":
        raise _unlike(architecture, "partial_rotary_factor", scaling["partial_rotary_factor"], 1)
    found: dict[str, Any] = {"rope_freq_base": scaling["rope_theta"], "rope_dimension_count": turned}
    local = config.rope_parameters.get(_SLIDING)
    if isinstance(local, dict):
        if local.get("rope_type", "default") != "default":
            raise _unlike(architecture, "rope_type of windowed layers", local["rope_type"], "default")
        found["rope_freq_base_swa"] = local["rope_theta"]
    kind = scaling.get("rope_type", "default")
    if kind in _SCALINGS:
        return found | _SCALINGS[kind](config, scaling)
    if kind == architecture.factors:
        return found | (_describe_longrope(config, scaling) if kind == "longrope" else {})
    allowed = [*_SCALINGS, *([architecture.factors] if architecture.factors else [])]
    raise _unlike(architecture, "rope_type", kind, ", ".join(allowed))


def _describe_linear(config: Any, scaling: Mapping[str, Any]) -> dict[str, Any]:
    return {"rope_scaling_type": RopeScalingType.LINEAR, "rope_scaling_factor": scaling["factor"]}


def _describe_yarn(config: Any, scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Say YaRN's factor and lengths; its factor of attention is llama.cpp's own, 1 + 0.1 ln(factor)."""
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
        if scaling.get(name) is not None:
            raise CheckpointError(f"GGUF files cannot hold YaRN with {name} {scaling[name]}; allowed: none")
    if not scaling.get("truncate", True):
        raise CheckpointError("GGUF files cannot hold YaRN with truncate false; allowed: true")
    found = {
        "rope_scaling_type": RopeScalingType.YARN,
        "rope_scaling_factor": scaling["factor"],
        "rope_scaling_orig_ctx_len": scaling["original_max_position_embeddings"],
    }
    for name in ("beta_fast", "beta_slow"):
        if scaling.get(name):
            found[f"rope_scaling_yarn_{name}"] = scaling[name]
    return found


def _describe_longrope(config: Any, scaling: Mapping[str, Any]) -> dict[str, Any]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    _, attention = ROPE_INIT_FUNCTIONS["longrope"](config, None)
    length = scaling["original_max_position_embeddings"]
    return {"rope_scaling_orig_ctx_len": length, "rope_scaling_attn_factors": attention}


# What every architecture takes as numbers.
_SCALINGS: dict[str, Callable[[Any, Mapping[str, Any]], dict[str, Any]]] = {
    "default": lambda config, scaling: {},
    "linear": _describe_linear,
    "yarn": _describe_yarn,
}
