"""How much faster a candidate can be than its base by what is left of it, before anything is timed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mka.engines.subject import WIDTHS
from mka.model.checkpoint import Checkpoint
from mka.model.tensors import FLOATS, TensorInfo
from mka.recipe import QuantizeSettings
from mka.transforms import SCHEMES


@dataclass(frozen=True)
class Held:
    """Bytes of a model's weights as an engine holds them.

    Attributes:
        layers: of all its layers.
        head: of the head, which may be the embedding.
    """

    layers: float
    head: float


def expect_ratios(
    base: Checkpoint,
    candidate: Checkpoint,
    dtype: str,
    prompt_tokens: int,
    files: Mapping[str, Path] | None = None,
) -> dict[str, float]:
    """Return figure of speed -> candidate / base, as fewer layers and smaller numbers allow it.

    Args:
        base: what it is timed beside.
        candidate: the model.
        dtype: of floating-point weights in the engine.
        prompt_tokens: length of a prompt.
        files: GGUF files of "base" and "candidate", where the engine loads those: their weights stay as they are there.
    """
    held = [count_held(model, dtype) for model in (base, candidate)]
    decoded = [count_file(files[role]) for role in ("base", "candidate")] if files else held
    return {
        "prefill_tokens_per_second": expect_prefill(held[0], candidate.layers / base.layers, prompt_tokens),
        "decode_tokens_per_second": expect_decode(*decoded),
    }


def expect_prefill(base: Held, share: float, prompt_tokens: int) -> float:
    """Return how many times as fast prompts are read where a share of the layers remains.

    Reading a prompt multiplies with the layers' weights for each of its tokens and with the head's for the last one, so
    that multiplications count, and smaller numbers promise nothing. Bytes of the base in one dtype stand for them;
    layers of a model are alike. What an engine spends on each step is left out, here and below.
    """
    asked_once = base.head / prompt_tokens
    return (base.layers + asked_once) / (base.layers * share + asked_once)


def expect_decode(base: Held, candidate: Held) -> float:
    """Return how many times as fast tokens are decoded.

    A step reads every weight of the layers and of the head once, so that bytes count: of floating-point weights in the
    engine's dtype, of rounded ones as stored. Keys and values and the arithmetic of norms are left out.
    """
    return (base.layers + base.head) / (candidate.layers + candidate.head)


def count_held(model: Checkpoint, dtype: str) -> Held:
    """Return the bytes of all layers and of the head with floating-point weights in an engine's dtype."""
    width, family = WIDTHS[dtype], model.family

    def held(tensor: TensorInfo) -> int:
        return tensor.parameters * width if tensor.dtype in FLOATS else tensor.nbytes

    def total(module: str) -> int:
        return sum(held(tensor) for name, tensor in model.tensors.items() if name.startswith(f"{module}."))

    layers = sum(held(tensor) for name, tensor in model.tensors.items() if family.split_tensor(name))
    return Held(layers, total(family.head) or total(family.embedding))


def count_file(file: Path) -> Held:
    """Return the bytes of all layers and of the head in a GGUF file."""
    from gguf import GGUFReader

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(file).tensors}
    layers = sum(nbytes for name, nbytes in sizes.items() if name.startswith("blk."))
    return Held(layers, sizes.get("output.weight", sizes["token_embd.weight"]))


def count_growth(outline: Checkpoint, settings: QuantizeSettings) -> int:
    """Return the bytes by which rounded layers grow in a GGUF file that keeps their numbers.

    Args:
        outline: the model before it is rounded.
        settings: one scheme for all linear layers.
    """
    from mka.transforms.packing import count_kept, find_linear

    bits = SCHEMES[settings.scheme].bits
    return sum(
        count_carried(info.shape, bits, settings.group_size) - count_kept(outline, info, settings.scheme, settings)
        for info in find_linear(outline)
    )


def count_carried(shape: tuple[int, ...], bits: int, group: int) -> int:
    """Return the bytes of a rounded matrix (R, C) in the GGUF type that keeps its numbers, else in float16."""
    from mka.export.carrying import choose_carrier
    from mka.export.ggml import Kind, count_row_bytes

    rows, width = shape
    return rows * count_row_bytes(width, choose_carrier(bits, group, width) or Kind.F16)
