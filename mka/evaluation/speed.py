"""Throughput of models, measured in turns, so that a machine whose speed drifts treats all of them alike."""

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# Of two models that are equally fast, the ranges of five rounds each lie apart by chance once in 126 times.
REPEATS = 5
PREFILL_TOKENS = 256
# Among a report's conditions, and beside the roles in what is stored of a timing.
TIMING = "timing"
# Behind the name of a speed: the slowest and the fastest round.
LEAST, MOST = "_least", "_most"


class Timing(NamedTuple):
    """Speeds, and what they were measured beside.

    Attributes:
        rates: role -> name of a speed -> tokens per second.
        conditions: ``rounds``, ``cores`` of the machine, and ``others_busy_cores``: how many of them other programs
            kept busy meanwhile, on average.
    """

    rates: dict[str, dict[str, float]]
    conditions: dict[str, float]


def compare_speed(models: Mapping[str, Any], *, new_tokens: int, seed: int, repeats: int = REPEATS) -> Timing:
    """Time one sequence of random tokens on each model: median of ``repeats`` rounds after a warm-up round.

    Every round times all models one after another.

    Args:
        models: role -> model; of one vocabulary.
        new_tokens: tokens decoded.
        seed: of the random tokens.
        repeats: timed rounds.

    Returns:
        Of every role "prefill_tokens_per_second", one forward pass over 256 tokens (or all the model's positions, if
        fewer), and "decode_tokens_per_second", cached greedy decoding of ``new_tokens`` after one token of prompt; both
        with `LEAST` and `MOST` behind their names too.
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

    with torch.inference_mode(), watch_others() as machine:
        rounds = {
            "prefill_tokens_per_second": _time_rounds(models, prefill, length, repeats),
            "decode_tokens_per_second": _time_rounds(models, decode, steps, repeats),
        }
    rates: dict[str, dict[str, float]] = {role: {} for role in models}
    for name, by_role in rounds.items():
        for role, found in by_role.items():
            rates[role] |= {name: statistics.median(found), name + LEAST: min(found), name + MOST: max(found)}
    return Timing(rates, {"rounds": repeats, **machine})


@contextmanager
def watch_others() -> Iterator[dict[str, float]]:
    """Yield what is filled at the end: ``cores``, and ``others_busy_cores``, those other programs kept busy.

    This process's own time is taken off the machine's, so that its threads do not count as a load.
    """
    if importlib.util.find_spec("psutil") is None:  # the programs for a GPU run where next to nothing is installed
        yield {}
        return
    import psutil

    def read() -> tuple[float, float]:
        # Idle and waiting for a disk is not busy; a guest's time is part of its host's.
        apart = ("idle", "iowait", "guest", "guest_nice")
        machine = psutil.cpu_times()._asdict()
        own = psutil.Process().cpu_times()
        return time.perf_counter(), sum(v for k, v in machine.items() if k not in apart) - own.user - own.system

    found: dict[str, float] = {}
    (start, before) = read()
    yield found
    (end, after) = read()
    others = max(0.0, (after - before) / max(end - start, 1e-9))
    found |= {"cores": psutil.cpu_count() or 1, "others_busy_cores": round(others, 2)}


def compare_checkpoint_speed(
    folders: Mapping[str, str | Path], *, dtype: str, new_tokens: int, seed: int, trust_remote_code: bool = False
) -> Timing:
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


def _time_rounds(
    models: Mapping[str, Any], call: Callable[[Any], None], tokens: int, repeats: int
) -> dict[str, list[float]]:
    """Tokens per second of every timed round, in the order timed."""
    seconds: dict[str, list[float]] = {role: [] for role in models}
    for turn in range(repeats + 1):
        for role, model in models.items():
            _synchronize(model)
            start = time.perf_counter()
            call(model)
            _synchronize(model)
            if turn:
                seconds[role].append(time.perf_counter() - start)
    return {role: [tokens / one for one in taken] for role, taken in seconds.items()}


def _synchronize(model: Any) -> None:
    import torch

    if model.device.type != "cpu":
        getattr(torch, model.device.type).synchronize()
