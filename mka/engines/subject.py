"""One model as an engine is asked about it: what it loads, what transformers says, what is to be done."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka.engines.exchange import Request
from mka.engines.prompts import NEW_TOKENS, PROMPTS, draw_prompts, tokenize_prompts
from mka.engines.reference import Reference, continue_greedily
from mka.errors import RecipeError
from mka.model.checkpoint import Checkpoint
from mka.model.config import build_config
from mka.model.loading import load_tokenizer

if TYPE_CHECKING:
    from mka.recipe import EngineCheck

# Timed repeats each time a model is loaded.
REPEATS = 2
# Bytes of a number of the cache, by dtype.
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
# Tokens by which engines round the room of a sequence up.
_BLOCK = 128


@dataclass(frozen=True)
class Conditions:
    """How models are loaded.

    Attributes:
        dtype: of the arithmetic, in the engine and in transformers.
        trust_remote_code: run code that comes with the tokenizer, in transformers only.
        seed: of the timed prompts.
        command: as it was typed, for the record.
    """

    dtype: str = "float32"
    trust_remote_code: bool = False
    seed: int = 0
    command: str = ""


@dataclass(frozen=True)
class Subject:
    """One model that an engine is asked about.

    Attributes:
        role: "candidate" or "base".
        checkpoint: the model.
        texts: token ids of each prompt, by transformers' tokenizer.
        references: what transformers continues them by.
        request: what the engine is asked.
    """

    role: str
    checkpoint: Checkpoint
    texts: Sequence[Sequence[int]]
    references: tuple[Reference, ...]
    request: Request


def check_room(settings: "EngineCheck", models: Mapping[str, Checkpoint]) -> None:
    """Refuse timed prompts that a model has no positions for.

    Raises:
        RecipeError: naming the model and its positions.
    """
    for role, checkpoint in models.items():
        _refuse_long(settings.prompt_tokens + settings.new_tokens, checkpoint, role)


def prepare_subject(
    role: str,
    models: Mapping[str, Checkpoint],
    loads: Path,
    settings: "EngineCheck",
    conditions: Conditions,
    folder: Path,
) -> Subject:
    """Ask transformers about a model, and write down what the engine shall be asked.

    Args:
        role: whose turn it is.
        models: role -> model; timed prompts are drawn from the tokens that all of them have.
        loads: what the engine loads of it.
        settings: the timing.
        conditions: how it is loaded.
        folder: for the engine's log.

    Raises:
        MkaError: if transformers does not load it, or its tokenizer makes nothing of a prompt.
    """
    checkpoint, dtype = models[role], conditions.dtype
    tokenizer = load_tokenizer(checkpoint.path, conditions.trust_remote_code)
    prompts = tokenize_prompts(tokenizer, str(checkpoint.path))
    options: dict[str, Any] = {"new_tokens": NEW_TOKENS, "dtype": dtype}
    options |= {"trust_remote_code": conditions.trust_remote_code}
    references, ends = continue_greedily(checkpoint.path, prompts, **options)
    sequences = max(settings.concurrency, default=1)
    context = max(settings.prompt_tokens + settings.new_tokens, max(map(len, prompts)) + NEW_TOKENS)
    _refuse_long(context, checkpoint, role)
    vocabulary = min(_read_config(model).vocab_size for model in models.values())
    request = Request(
        model=str(loads.absolute()),
        dtype=dtype,
        threads=count_threads(),
        context=context,
        sequences=sequences,
        # Twice what is needed, so that no engine has to put a sequence off.
        kv_bytes=2 * sequences * (context + 2 * _BLOCK) * count_token_bytes(checkpoint, dtype),
        log=str(folder / "log"),
        texts=PROMPTS,
        prompts=prompts,
        new_tokens=NEW_TOKENS,
        ends=ends,
        timed_prompts=draw_prompts(sequences, settings.prompt_tokens, vocabulary, conditions.seed),
        timed_tokens=settings.new_tokens,
        concurrency=settings.concurrency,
        repeats=REPEATS,
    )
    return Subject(role, checkpoint, prompts, references, request)


def count_threads() -> int:
    """Return the threads that an engine is given: what this process was told, or the processors it may use."""
    if given := os.environ.get("OMP_NUM_THREADS", ""):
        return int(given) if given.isdecimal() else 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _refuse_long(tokens: int, checkpoint: Checkpoint, role: str) -> None:
    if tokens > (positions := _read_config(checkpoint).max_position_embeddings):
        raise RecipeError(
            f"{checkpoint.path}: prompts and new tokens need {tokens} positions, and the {role} has {positions}; ask "
            "for fewer by --prompt-tokens and --new-tokens"
        )


def _read_config(checkpoint: Checkpoint) -> Any:
    return build_config(checkpoint.config, checkpoint.path).get_text_config()


def count_token_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """Count the bytes of one token's keys and values over all layers; one whose window has passed takes none there."""
    config = _read_config(checkpoint)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * checkpoint.layers * heads * width * WIDTHS[dtype])
