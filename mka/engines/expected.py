"""How much faster a candidate can be than its base by what is left of it, before anything is timed."""

from mka.engines.subject import WIDTHS
from mka.model.checkpoint import Checkpoint
from mka.model.tensors import FLOATS, TensorInfo


def expect_ratios(base: Checkpoint, candidate: Checkpoint, dtype: str, prompt_tokens: int) -> dict[str, float]:
    """Return figure of speed -> candidate / base, as fewer layers and smaller numbers allow it.

    A step of decoding reads every weight of the layers and of the head once, so that bytes count: of floating-point
    weights in the engine's dtype, of rounded ones as stored. Reading a prompt multiplies with the layers' weights for
    each of its tokens and with the head's for the last one, so that multiplications count, and smaller numbers promise
    nothing. Keys and values, norms' arithmetic and what an engine spends on each step are left out.

    Args:
        base: what it is timed beside.
        candidate: the model.
        dtype: of floating-point weights in the engine.
        prompt_tokens: length of a prompt.
    """
    (all_layers, head), (fewer_layers, new_head) = (_count_bytes(model, dtype) for model in (base, candidate))
    # Bytes of the base in one dtype stand for its multiplications; layers of a model are alike.
    left = all_layers * candidate.layers / base.layers
    asked_once = head / prompt_tokens
    return {
        "prefill_tokens_per_second": (all_layers + asked_once) / (left + asked_once),
        "decode_tokens_per_second": (all_layers + head) / (fewer_layers + new_head),
    }


def _count_bytes(model: Checkpoint, dtype: str) -> tuple[int, int]:
    """Return the bytes of all layers and of the head, which may be the embedding, as an engine holds them."""
    width, family = WIDTHS[dtype], model.family

    def held(tensor: TensorInfo) -> int:
        return tensor.parameters * width if tensor.dtype in FLOATS else tensor.nbytes

    def total(module: str) -> int:
        return sum(held(tensor) for name, tensor in model.tensors.items() if name.startswith(f"{module}."))

    layers = sum(held(tensor) for name, tensor in model.tensors.items() if family.split_tensor(name))
    return layers, total(family.head) or total(family.embedding)
