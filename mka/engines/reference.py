"""What transformers itself continues prompts by: greedy tokens, and how likely every token near the top is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What ends a text, whichever of its tokens a model has for it.
END = -1
# Most likely tokens that are kept of a step; an engine's choice beyond them is far off.
KEPT = 100


@dataclass(frozen=True)
class Reference:
    """A greedy continuation by transformers.

    Attributes:
        tokens: ids, the last one `END` if the text ended.
        steps: for each token the `KEPT` most likely ids with their natural log-probabilities.
    """

    tokens: tuple[int, ...]
    steps: tuple[Mapping[int, float], ...]


def continue_greedily(
    folder: Path,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    dtype: str,
    trust_remote_code: bool = False,
) -> tuple[tuple[Reference, ...], tuple[int, ...]]:
    """Load a folder into transformers, continue prompts, and let go of the model.

    Args:
        folder: stock folder.
        prompts: token ids of each.
        new_tokens: tokens to continue by, at most.
        dtype: of the weights and of the arithmetic.
        trust_remote_code: run code that comes with the tokenizer.

    Returns:
        One per prompt, and the token ids that end a text.

    Raises:
        CheckpointError: if it does not load whole.
    """
    import gc

    import torch

    from mka.model.loading import load_model

    model, _ = load_model(folder, dtype, trust_remote_code)
    ends = list_ends(model)
    with torch.inference_mode():
        found = tuple(_continue(model, prompt, new_tokens, ends) for prompt in prompts)
    # The engine wants the memory.
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found, ends


def list_ends(model: Any) -> tuple[int, ...]:
    """Return the token ids that end a text of a loaded model."""
    ends = model.generation_config.eos_token_id
    return tuple(ends) if isinstance(ends, list | tuple) else () if ends is None else (ends,)


def _continue(model: Any, prompt: Sequence[int], new_tokens: int, ends: Sequence[int]) -> Reference:
    import torch

    ids, cache = torch.tensor([list(prompt)], device=model.device), None
    tokens: list[int] = []
    steps: list[dict[int, float]] = []
    for _ in range(new_tokens):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        likely = output.logits[0, -1].float().log_softmax(dim=-1)  # (vocabulary,)
        values, order = likely.topk(min(KEPT, len(likely)))
        token = int(order[0])
        step = dict(zip(order.tolist(), values.tolist()))
        if ended := max((step.pop(end) for end in ends if end in step), default=None):
            step[END] = ended
        steps.append(step)
        tokens.append(END if token in ends else token)
        if tokens[-1] == END:
            break
        ids = order[:1].unsqueeze(0)
    return Reference(tuple(tokens), tuple(steps))
