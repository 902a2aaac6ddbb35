"""The target of a recipe, as layers of its base: what was asked for outright, or the most that keep every bound."""

from collections.abc import Callable, Sequence
from functools import partial

from mka.engines.expected import Held, count_carried, count_growth, count_held, expect_decode, expect_prefill
from mka.engines.subject import count_token_bytes
from mka.errors import RecipeError
from mka.kernels import LLAMA_CPP
from mka.model.checkpoint import Checkpoint
from mka.plan.target import Aim, Bound, fit_layers, resolve_target
from mka.recipe import DEPTHS, QuantizeSettings, Target
from mka.transforms import Treatment, get_quantizer, list_options, outline_treated

# What floating-point weights and the cache are served in, and the prompts that are read.
SERVED, PROMPT_TOKENS = "bfloat16", 256
# Bits per weight, scales included, down to which fewer bits lose less than fewer layers (DECISIONS.md): below them a
# target in bytes takes layers out.
WORTH_BITS = 3.5
UNROUNDED = QuantizeSettings()
# Bounds from above; the others are from below.
AT_MOST = ("bytes", "cache_bytes_per_token")


def resolve_aim(
    target: Target, base: Checkpoint, rounding: QuantizeSettings = UNROUNDED, treatments: Sequence[Treatment] = ()
) -> Aim:
    """Turn a recipe's target into layers of this checkpoint.

    Args:
        target: what was asked for.
        base: the opened base.
        rounding: how what remains is rounded.
        treatments: what is done to it before.

    Raises:
        RecipeError: if the target is below 1, above the layer count, or out of reach.
    """
    asked = {name: getattr(target, name) for name in DEPTHS}
    outright = None
    if any(value is not None for value in asked.values()):
        outright = resolve_target(base.layers, base.layer_nbytes, base.nbytes, **asked)
    fewest = max(1, min(base.layers, target.protect_first + target.protect_last))
    outline = outline_treated(base, treatments)[-1]
    try:
        layers_out = fit_layers(list_bounds(target, outline, rounding, WORTH_BITS), base.layers, fewest, outright)
    except RecipeError:
        layers_out = fit_layers(list_bounds(target, outline, rounding), base.layers, fewest, outright)
    return Aim(layers_out, target.protect_first, target.protect_last)


def list_bounds(target: Target, outline: Checkpoint, rounding: QuantizeSettings, bits: float = 0.0) -> list[Bound]:
    """Return what a target bounds, with what models of one to all layers of a checkpoint have.

    Bytes, keys and values are those of the mean layer. Speeds are arithmetic: see `mka.engines.expected`.

    Args:
        target: what was asked for.
        outline: the base after what is done to its weights.
        rounding: how they are rounded then.
        bits: fewest bits per weight, scales included, that a share of the target's bytes may come to.
    """
    least = [rounding]
    if rounding.bytes is not None:
        least = [
            rounding.model_copy(update={"bytes": 1.0}),
            rounding.model_copy(update={"bytes": None, "bits_per_weight": bits}),
        ]

    def reach(name: str, layers: int) -> float:
        if name == "bytes":
            return max(foresee_rounded(outline, one, layers) for one in least)
        return GAINS[name](outline, rounding, layers)

    unrounded = "quantize.embeddings: int8 makes room" if rounding.embeddings == "off" else ""
    hints = {
        "bytes": unrounded if rounding.scheme != "off" else "rounding makes room (quantize.scheme, quantize.embeddings)"
    }
    return [
        Bound(f"target.{name}", asked, partial(reach, name), name in AT_MOST, hints.get(name, ""))
        for name, asked in target.bounds.items()
    ]


# What a model of so many layers has by arithmetic, given the base after what is done to its weights, and how they are
# rounded then: times the base's speed, and bytes of keys and values.
GAINS: dict[str, Callable[[Checkpoint, QuantizeSettings, int], float]] = {
    "decode_speed": lambda outline, rounding, layers: expect_decode(
        count_held(outline, SERVED), hold_rounded(outline, rounding, layers)
    ),
    "prefill_speed": lambda outline, rounding, layers: expect_prefill(
        count_held(outline, SERVED), layers / outline.layers, PROMPT_TOKENS
    ),
    "cache_bytes_per_token": lambda outline, rounding, layers: (
        count_token_bytes(outline, SERVED) / outline.layers * layers
    ),
}


def expect_gains(outline: Checkpoint, rounding: QuantizeSettings, layers: int) -> dict[str, float]:
    """Return all of `GAINS` of a model with so many layers."""
    return {name: gain(outline, rounding, layers) for name, gain in GAINS.items()}


def foresee_rounded(outline: Checkpoint, settings: QuantizeSettings, layers: int) -> int:
    """Return the bytes of the tensors of a checkpoint with so many layers, of the mean layer, once it is rounded."""
    if settings.bytes is not None:
        least, most = (foresee_rounded(outline, settle(settings, name), layers) for name in _extremes(settings))
        return min(max(int(settings.bytes), least), most)
    share, of_layers = layers / outline.layers, sum(outline.layer_nbytes)
    if settings.scheme == "off":
        return round(outline.nbytes - of_layers * (1 - share))
    foresee = get_quantizer(settings).foresee
    left = of_layers - (outline.nbytes - foresee(outline, _without_embeddings(settings)))
    return round(foresee(outline, settings) - left * (1 - share))


def least_bytes(outline: Checkpoint, settings: QuantizeSettings, layers: int) -> int:
    """Return the bytes of the tensors with so many layers under the smallest of the schemes that are mixed."""
    return foresee_rounded(outline, settings.model_copy(update={"bytes": 1.0}), layers)


def refuse_bytes(outline: Checkpoint, settings: QuantizeSettings, layers: int) -> None:
    """Refuse a budget of mixed bits that is less than the fewest bits take.

    Raises:
        RecipeError: naming what they take.
    """
    if settings.bytes is not None:
        bound = Bound("quantize.bytes", settings.bytes, partial(least_bytes, outline, settings), True)
        if not bound.holds(layers):
            raise bound.refuse(layers, "")


def hold_rounded(outline: Checkpoint, settings: QuantizeSettings, layers: int) -> Held:
    """Return what an engine holds of a checkpoint with so many layers once it is rounded, see `count_held`.

    Without an engine that has kernels for it, what was rounded is unpacked before it is read; llama.cpp holds what a
    GGUF file does, where a number of few bits may take more than in the folder.
    """
    held, family = count_held(outline, SERVED), outline.family
    if settings.scheme == "off" or settings.serve_on is None:
        return Held(held.layers * layers / outline.layers, held.head)
    alike = settle(settings, _extremes(settings)[0])
    beside = _without_embeddings(alike)
    in_layers = float(foresee_rounded(outline, settings, layers) - foresee_rounded(outline, alike, 0))
    in_file = settings.serve_on == LLAMA_CPP.serve_on
    if in_file:
        in_layers += _grow(outline, settings, layers, in_layers)
    if settings.embeddings == "off":
        return Held(in_layers, held.head)
    ends = [outline.tensors[name] for name in (family.embedding_tensor, family.head_tensor) if name in outline.tensors]
    if in_file:
        return Held(in_layers, count_carried(ends[-1].shape, 8, ends[-1].shape[1]))
    saved = foresee_rounded(outline, beside, 0) - foresee_rounded(outline, alike, 0)
    return Held(in_layers, (sum(tensor.nbytes for tensor in ends) - saved) / len(ends))


def _grow(outline: Checkpoint, settings: QuantizeSettings, layers: int, nbytes: float) -> float:
    """Return what rounded layers of so many bytes grow by in a GGUF file.

    Which layers get which bits is not known yet where they are mixed: they are taken for those of two neighbouring
    numbers of bits, whose mean is there.
    """
    import numpy as np

    stored, grown = [], []
    for name in reversed(list_options(settings)):
        alike = settle(settings, name)
        stored.append(foresee_rounded(outline, alike, layers) - foresee_rounded(outline, alike, 0))
        grown.append(count_growth(outline, alike) * layers / outline.layers)
    return float(np.interp(nbytes, stored, grown))


def settle(settings: QuantizeSettings, scheme: str) -> QuantizeSettings:
    """Return the same with one scheme for all layers, in place of a budget."""
    return settings.model_copy(update={"scheme": scheme, "bytes": None, "bits_per_weight": None})


def _extremes(settings: QuantizeSettings) -> tuple[str, str]:
    """The smallest and the largest of the schemes that are mixed."""
    names = list_options(settings)
    return names[-1], names[0]


def _without_embeddings(settings: QuantizeSettings) -> QuantizeSettings:
    return settings.model_copy(update={"embeddings": "off"})
