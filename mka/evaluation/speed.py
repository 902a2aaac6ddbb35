"""Throughput of models, measured in turns, so that a machine whose speed drifts treats all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

REPEATS = 3
PREFILL_TOKENS = 256


def compare_speed(
    models: Mapping[str, Any], *, new_tokens: int, seed: int, repeats: int = REPEATS
) -> dict[str, dict[str, float]]:
    """Time one sequence of random tokens on each model: median of ``repeats`` rounds after a warm-up round.

    Every round times all models one after another.

    Args:
        models: role -> model; of one vocabulary.
        new_tokens: tokens decoded.
        seed: of the random tokens.
        repeats: timed rounds.

    Returns:
        role -> "prefill_tokens_per_second", one forward pass over 256 tokens (or all the model's positions, if
        fewer), and "decode_tokens_per_second", cached greedy decoding of ``new_tokens`` after one token of prompt.
    """
    import torch

    first = next(iter(models.values()))
    positions = getattr(first.config, "max_position_embeddings", None) or PREFILL_TOKENS
    length = min(PREFILL_TOKENS, positions)
    steps = max(1, min(new_tokens, positions - 1))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(first.config.get_text_config().vocab_size, (1, length), generator=generator).to(first.device)
    start = ids[:, :1]

    def prefill(model: Any) -> None:
        model(input_ids=ids, use_cache=False)

    def decode(model: Any) -> None:
        options = {**greedy_options(model, steps), "min_new_tokens": steps}
        model.generate(start, attention_mask=torch.ones_like(start), **options)

    with torch.inference_mode():
        rates = {
            "prefill_tokens_per_second": _time_rounds(models, prefill, length, repeats),
            "decode_tokens_per_second": _time_rounds(models, decode, steps, repeats),
        }
    return {role: {name: by_role[role] for name, by_role in rates.items()} for role in models}


def compare_checkpoint_speed(
    folders: Mapping[str, str | Path], *, dtype: str, new_tokens: int, seed: int, trust_remote_code: bool = False
) -> dict[str, dict[str, float]]:
    """Load several folders side by side and compare their speed; see `compare_speed`.

    Raises:
        CheckpointError: if one does not load whole.
    """
    from mka.model.loading import load_model

    models = {role: load_model(folder, dtype, trust_remote_code)[0] for role, folder in folders.items()}
    return compare_speed(models, new_tokens=new_tokens, seed=seed)


def greedy_options(model: Any, new_tokens: int) -> dict[str, Any]:
    """Options of ``generate`` for greedy decoding, without the warnings a model's own sampling settings cause."""
    config = model.generation_config
    end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    pad = config.pad_token_id if config.pad_token_id is not None else end
    sampling = {"temperature": None, "top_p": None, "top_k": None}
    return {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": pad, **sampling}


def _time_rounds(models: Mapping[str, Any], call: Callable[[Any], None], tokens: int, repeats: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {role: [] for role in models}
    for turn in range(repeats + 1):
        for role, model in models.items():
            _synchronize(model)
            start = time.perf_counter()
            call(model)
            _synchronize(model)
            if turn:
                seconds[role].append(time.perf_counter() - start)
    return {role: tokens / statistics.median(taken) for role, taken in seconds.items()}


def _synchronize(model: Any) -> None:
    import torch

    if model.device.type != "cpu":
        getattr(torch, model.device.type).synchronize()
