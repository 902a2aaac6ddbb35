"""What a model can do with what it has read: copy it, find a fact in it, and go on without saying the same again.

Items are made from built-in words and a seed, so that they are the same for every model of a vocabulary and need no
table.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np

from mka.errors import NumericsError, RecipeError
from mka.evaluation.heldout import MOST_WINDOWS, refuse_long_context
from mka.evaluation.metrics import Subject, find_metric
from mka.evaluation.scores import Score
from mka.evaluation.speed import greedy_options
from mka.recipe import Measurement
from mka.terminal import show_progress
from mka.texts.windows import SEPARATOR, find_bos

# Tokens that are said twice, and tokens of a free continuation; fewer where the context holds no more.
COPIED, CONTINUED = 64, 64
NGRAM = 4
# Lengths of passages, of the context.
LENGTHS = (0.25, 0.5, 1.0)
# Facts in a passage, of which one is asked for: a number that is somewhere does not do.
FACTS = 3
_NAMES = ("Anna", "Peter", "Maria", "John", "Laura", "David", "Emma", "Robert", "Julia", "Thomas", "Alice", "Henry")
_FACT = "The phone number of {} is {}."
_PLACES = ("market", "river", "library", "harbour", "school", "garden", "station", "museum", "bakery", "theatre")
_SENTENCES = (
    "The {} was quiet that morning, and nobody minded the rain.",
    "People walked past the {} on their way to work.",
    "A dog slept in front of the {} until the sun came out.",
    "There was a long queue at the {}, as on every other day.",
    "Somebody had painted the door of the {} a bright green.",
    "From the {} one could hear music in the evening.",
)
_SUBJECTS = (
    *("glass", "bread", "the sea", "winter", "the railway", "music", "gold", "sleep", "the moon", "paper"),
    *("language", "the horse", "trade", "mountains", "medicine", "the garden", "clocks", "salt", "friendship", "birds"),
)
_OPENINGS = (
    "The history of {}",
    "What people often forget about {}",
    "The first book about {}",
    "My grandmother used to talk about {}",
    "The most important thing about {}",
    "Last year a museum of {}",
)


def measure_copying(subject: Subject) -> tuple[Score, ...]:
    """Share of tokens that are the model's first choice where a sequence of random tokens is said again.

    Each token of the second half but its first, which nothing foretells, is asked for after the right ones before it.
    Free greedy decoding would be another measure: after the first slip it copies something else, so that small models
    are at 0 whatever they have kept. Within a sequence tokens differ; special and added ones are left out.

    Raises:
        RecipeError: if the context is longer than the model reads, or too short.
        NumericsError: if a logit is NaN or infinite.
    """
    import torch

    model, context, rng = _open(subject, "copying")
    bos = find_bos(subject.tokenizer, "a")
    vocabulary = _list_ordinary(model, subject.tokenizer)
    length = min(COPIED, (context - len(bos)) // 2, len(vocabulary))
    prompts = []
    for _ in range(subject.settings.generation):
        said = rng.choice(vocabulary, length, replace=False).tolist()
        prompts.append(bos + said + said)
    items: list[float] = []
    size = min(subject.settings.batch_size, MOST_WINDOWS)
    with _refusing_nan(model, "copying"), _bar(subject, "copying") as advance, torch.inference_mode():
        for first in range(0, len(prompts), size):
            batch = torch.tensor(prompts[first : first + size], device=model.device)
            chosen = model(input_ids=batch, use_cache=False).logits[:, -length:-1].argmax(dim=-1)
            hits = (chosen == batch[:, -length + 1 :]).double().mean(dim=1)
            items += hits.tolist()
            advance(len(hits))
    return (_score("sequences", "copying", items, prompts, {"tokens": length}),)


def measure_retrieval(subject: Subject) -> tuple[Score, ...]:
    """Share of passages from which greedy decoding gives back the number that was asked for, digit by digit.

    A passage holds three people's four-digit numbers at random places among sentences that tell nothing; it fills a
    quarter, a half or all of the context, in turns. It ends with the beginning of one of these facts said again.

    Raises:
        RecipeError: if the context is longer than the model reads, or too short for three facts.
        NumericsError: if a logit is NaN or infinite.
    """
    _, context, rng = _open(subject, "retrieval")
    tokenize = subject.tokenizer
    answers, prompts, room = _lay_passages(tokenize, context, subject.settings.generation, rng)
    given = continue_greedily(subject, prompts, room, "retrieval")
    said = [tokenize.decode(ids, skip_special_tokens=True).strip() for ids in given]
    items = [int(text.startswith(answer) and not text[4:5].isdigit()) for text, answer in zip(said, answers)]
    return (_score("passages", "retrieval", items, prompts, {"tokens": max(map(len, prompts))}),)


def _lay_passages(
    tokenize: Any, context: int, count: int, rng: np.random.Generator
) -> tuple[list[str], list[list[int]], int]:
    """Return answers, passages as tokens, and the tokens that an answer may take."""
    answers, prompts = [], []
    # What a number may take in tokens, and one more that shows where it ends.
    room = max(len(tokenize(f" {n}", add_special_tokens=False)["input_ids"]) for n in (1234, 5678, 9090)) + 1
    for index in range(count):
        budget = int(LENGTHS[index % len(LENGTHS)] * context) - room
        names = rng.choice(_NAMES, FACTS, replace=False).tolist()
        numbers = [str(number) for number in rng.choice(np.arange(1000, 10000), FACTS, replace=False)]
        facts = [_FACT.format(name, number) for name, number in zip(names, numbers)]
        asked = _FACT.partition(" {}.")[0].format(names[0])
        passage = _fill(tokenize, facts, asked, budget, rng)
        if len(passage) > context - room:
            raise RecipeError(
                f"retrieval: {FACTS} facts and a question are {len(passage) + room} tokens and evaluation.context is "
                f"{context}; give a longer context, or generation: 0"
            )
        answers.append(numbers[0])
        prompts.append(passage)
    return answers, prompts, room


def measure_repetition(subject: Subject) -> tuple[Score, ...]:
    """How often each 4-gram of a greedy continuation is said: all over distinct ones, geometric mean over prompts.

    1 is a model that never repeats itself. ``extra["repeated"]`` is the mean share of 4-grams that were there before
    ("rep-4"). An end of the text is not accepted: stopping at once is no way of not repeating oneself. There are 120
    prompts, and no more items.

    Raises:
        RecipeError: if the context is longer than the model reads, or too short.
        NumericsError: if a logit is NaN or infinite.
    """
    _, context, rng = _open(subject, "repetition")
    prompts, steps = _choose_openings(subject.tokenizer, context, subject.settings.generation, rng)
    given = continue_greedily(subject, prompts, steps, "repetition", whole=True)
    distinct = [len(set(zip(*(ids[i:] for i in range(NGRAM))))) / (steps - NGRAM + 1) for ids in given]
    extra = {"tokens": steps, "repeated": 1 - float(np.mean(distinct))}
    items = [-math.log(share) for share in distinct]
    return (_score("continuations", "repetition", items, prompts, extra),)


def _choose_openings(tokenizer: Any, context: int, count: int, rng: np.random.Generator) -> tuple[list[list[int]], int]:
    """Return prompts as tokens, and how many follow each."""
    openings = [opening.format(about) for opening in _OPENINGS for about in _SUBJECTS]
    prompts = [tokenizer(openings[i], verbose=False)["input_ids"] for i in rng.permutation(len(openings))[:count]]
    steps = min(CONTINUED, context - max(map(len, prompts)))
    if steps < NGRAM:
        raise RecipeError(f"repetition: evaluation.context is {context}, too short for a prompt and {NGRAM} tokens")
    return prompts, steps


def check_generation(tokenizer: Any, settings: Measurement, seed: int) -> None:
    """Refuse, before a model is loaded, a context that the items do not fit into.

    Raises:
        RecipeError: saying how many tokens they take.
    """
    for what, make in (("retrieval", _lay_passages), ("repetition", _choose_openings)):
        make(tokenizer, settings.context, settings.generation, _draw(seed, what))


def continue_greedily(
    subject: Subject, prompts: Sequence[Sequence[int]], new_tokens: int, what: str, *, whole: bool = False
) -> list[list[int]]:
    """Continue prompts greedily, shorter ones padded on the left; in a model's own order of preference, unpenalized.

    Args:
        subject: model, batch size.
        prompts: tokens of each.
        new_tokens: most tokens of a continuation.
        what: is measured; for the bar and refusals.
        whole: go on to ``new_tokens`` even where the model would stop.

    Returns:
        Continuations in the order of the prompts; one that ended is padded.

    Raises:
        NumericsError: if a logit is NaN or infinite.
    """
    import torch

    model = subject.model
    options = greedy_options(model, new_tokens) | {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    options |= {"min_new_tokens": new_tokens} if whole else {}
    pad = options["pad_token_id"] or 0
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found: dict[int, list[int]] = {}
    with _refusing_nan(model, what), _bar(subject, what) as advance, torch.inference_mode():
        for first in range(0, len(order), subject.settings.batch_size):
            picked = order[first : first + subject.settings.batch_size]
            width = max(len(prompts[i]) for i in picked)
            ids = [[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in picked]
            mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in picked]
            inputs = {"input_ids": ids, "attention_mask": mask}
            output = model.generate(**{k: torch.tensor(v, device=model.device) for k, v in inputs.items()}, **options)
            found |= zip(picked, output[:, width:].tolist())
            advance(len(picked))
    return [found[index] for index in range(len(prompts))]


def _open(subject: Subject, what: str) -> tuple[Any, int, np.random.Generator]:
    """Return model, context and the source of items, each measurement its own."""
    refuse_long_context(subject.model, subject.settings.context)
    return subject.model, subject.settings.context, _draw(subject.seed, what)


def _draw(seed: int, what: str) -> np.random.Generator:
    return np.random.default_rng([seed, *what.encode()])


def _list_ordinary(model: Any, tokenizer: Any) -> list[int]:
    count = min(len(tokenizer), model.config.get_text_config().vocab_size)
    apart = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return [token for token in range(count) if token not in apart]


def _fill(tokenizer: Any, facts: Sequence[str], asked: str, budget: int, rng: np.random.Generator) -> list[int]:
    """Put facts at random places among as many sentences as a number of tokens holds, and the question behind."""

    def count(text: str) -> int:
        return len(tokenizer(f" {text}", add_special_tokens=False)["input_ids"])

    left = budget - sum(map(count, (*facts, asked))) - 2  # BOS and the blank line
    told: list[str] = []
    while True:
        sentence = str(rng.choice(_SENTENCES)).format(rng.choice(_PLACES))
        left -= count(sentence)
        if left < 0:
            break
        told.append(sentence)
    for fact in facts:
        told.insert(int(rng.integers(len(told) + 1)), fact)
    return list(tokenizer(" ".join(told) + SEPARATOR + asked, verbose=False)["input_ids"])


def _score(name: str, metric: str, items: Sequence[float], prompts: Sequence[Any], extra: dict[str, Any]) -> Score:
    row, n = find_metric(metric), len(items)
    value, stderr = float(row.value(np.mean(items))), float(np.std(items, ddof=1)) / math.sqrt(n)
    # By the delta method, where the value is exp of the mean.
    stderr *= value if row.scale == "log" else 1
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    return Score(name, metric, value, stderr, n, row.higher_is_better, tuple(items), extra | {"items_digest": digest})


@contextmanager
def _refusing_nan(model: Any, what: str) -> Iterator[None]:
    def check(_: Any, __: Any, output: Any) -> None:
        if not bool(output.logits.isfinite().all()):
            raise NumericsError(f"{what}: the model's logits are NaN or infinite")

    hook = model.register_forward_hook(check)
    try:
        yield
    finally:
        hook.remove()


def _bar(subject: Subject, what: str) -> AbstractContextManager[Callable[[int], Any]]:
    total = subject.settings.generation
    return show_progress(what, total, "item") if subject.progress else nullcontext(lambda _: None)
