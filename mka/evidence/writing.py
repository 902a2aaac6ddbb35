"""Text a model writes itself: sampled, cleaned, and laid out as a table with one source per kind of beginning.

What data-free calibration reads (LLM-QAT, arXiv 2305.17888; self-calibration, arXiv 2410.17170). Every text is drawn at
temperature 1 from the whole distribution, no top-k and no top-p: text of exactly the kind the model puts probability
on, tail included. A cut tail makes text that is easier than what people write, and shows less of the model.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from mka.errors import CalibrationError, NumericsError
from mka.terminal import show_progress
from mka.texts.rows import text_digest
from mka.texts.windows import find_bos
from mka.texts.writing import BATCH, OPENINGS, Wanted, judge_text

# Raised by hand when the same request would be answered by another table.
VERSION = 1
# A model of which less than one text in so many is usable does not write.
LEAST_USABLE = 8


@dataclass(frozen=True)
class Written:
    """What a model wrote.

    Attributes:
        rows: ``text`` and ``source`` each; the kinds of beginnings take turns, so that every part of the table has all.
        tokens: in all texts.
        dropped: why -> texts that were left out.
    """

    rows: Sequence[dict[str, str]]
    tokens: int
    dropped: Mapping[str, int] = field(default_factory=dict)


def write_texts(model: Any, tokenizer: Any, wanted: Wanted, batch: int = BATCH) -> Written:
    """Sample texts until there are enough.

    A special token ends a text and is no part of it, so that none holds a mark of a chat. Left out are texts that are
    short, unreadable (bytes that are no character), repetitive, that spell a special token, or were there before; see
    `mka.texts.writing.judge_text`. The same model, request, batch and machine give the same texts.

    Args:
        model: causal language model that generates.
        tokenizer: its tokenizer.
        wanted: how much.
        batch: texts at a time; a GPU that has memory for thousands is idle with few.

    Raises:
        CalibrationError: if nearly nothing the model writes is usable.
        NumericsError: if its logits are not finite.
    """
    config = model.config.get_text_config()
    special = find_special(tokenizer, config.vocab_size)
    length = min(wanted.length, getattr(config, "max_position_embeddings", None) or wanted.length)
    starts = draw_starts(tokenizer, special, wanted.seed)
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    dropped: Counter[str] = Counter()
    tokens = 0
    with show_progress("write texts", wanted.tokens, "tok") as advance, torch.random.fork_rng():
        torch.manual_seed(wanted.seed)
        while tokens < wanted.tokens or len(rows) < wanted.texts:
            begun, before = list(islice(starts, batch)), tokens
            sampled = _sample(model, [ids for _, ids in begun], length, sorted(special))
            texts = [
                tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
                for ids in sampled
            ]
            texts = [text.rstrip("\ufffd").rstrip() for text in texts]  # the last character may lack its last bytes
            # All at once: a fast tokenizer takes all cores for a list.
            every = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            for (source, _), text, read in zip(begun, texts, every):
                if reason := judge_text(text, read, special, seen):
                    dropped[reason] += 1
                    continue
                seen.add(text_digest(text))
                rows.append({"source": source, "text": text})
                tokens += len(read)
            advance(tokens - before)
            _refuse_useless(len(rows), dropped)
    return Written(tuple(rows), tokens, dict(dropped))


def imitate_texts(tokenizer: Any, wanted: Wanted) -> Written:
    """Return texts as many and as long as `write_texts` would, of words drawn at random: to reckon with beforehand."""
    special = find_special(tokenizer, len(tokenizer))
    starts = draw_starts(tokenizer, special, wanted.seed)
    words = _draw_words(tokenizer, special, torch.Generator().manual_seed(wanted.seed))
    rows: list[dict[str, str]] = []
    tokens = 0
    while tokens < wanted.tokens or len(rows) < wanted.texts:
        text = tokenizer.decode(list(islice(words, wanted.length))).strip()
        rows.append({"source": next(starts)[0], "text": text})
        tokens += len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return Written(tuple(rows), tokens)


def find_special(tokenizer: Any, vocabulary: int) -> frozenset[int]:
    """Return the tokens that are no text: marks of documents and chats, and ids beyond the tokenizer's."""
    marks = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset({*tokenizer.all_special_ids, *marks, *range(len(tokenizer), vocabulary)})


def draw_starts(tokenizer: Any, special: frozenset[int], seed: int) -> Iterator[tuple[str, list[int]]]:
    """Yield beginnings without end: the source they make, and their tokens.

    The kinds take turns: BOS alone, where the tokenizer starts its sequences with it; one token of the vocabulary that
    is a word or a part of one; and the `OPENINGS`, which a model that follows instructions goes on from with text. BOS
    stands in front of all of them where the tokenizer puts it there.
    """
    generator = torch.Generator().manual_seed(seed)
    bos = find_bos(tokenizer, "a")
    turns = {f"base-{kind}": _shuffle_forever(texts, generator) for kind, texts in OPENINGS.items()}
    words = _draw_words(tokenizer, special, generator)
    while True:
        if bos:
            yield "base-bos", list(bos)
        yield "base-token", [*bos, next(words)]
        for source, texts in turns.items():
            yield source, [*bos, *tokenizer(next(texts), add_special_tokens=False, verbose=False)["input_ids"]]


def _shuffle_forever(items: Sequence[str], generator: torch.Generator) -> Iterator[str]:
    while True:
        yield from (items[i] for i in torch.randperm(len(items), generator=generator).tolist())


def _draw_words(tokenizer: Any, special: frozenset[int], generator: torch.Generator) -> Iterator[int]:
    while True:
        drawn = int(torch.randint(len(tokenizer), (1,), generator=generator))
        if drawn not in special and any(character.isalnum() for character in tokenizer.decode([drawn])):
            yield drawn


def _sample(model: Any, starts: Sequence[Sequence[int]], length: int, ends: list[int]) -> list[list[int]]:
    """Go on from some beginnings up to ``length`` tokens; returns each with what follows, without its end."""
    from transformers import GenerationConfig

    width = max(map(len, starts))
    pad = ends[0] if ends else 0
    # Padded on the left: what follows a beginning has to stand beside it.
    ids = torch.tensor([[pad] * (width - len(start)) + list(start) for start in starts])
    mask = torch.tensor([[0] * (width - len(start)) + [1] * len(start) for start in starts])
    # Everything that bends the distribution is said: what is not is taken from the model's own generation_config.
    options = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        num_beams=1,
        max_length=max(length, width + 1),
        eos_token_id=ends or None,
        pad_token_id=pad,
    )
    ids, mask = ids.to(model.device), mask.to(model.device)
    try:
        with torch.inference_mode():
            made = model.generate(ids, attention_mask=mask, generation_config=options).tolist()
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise NumericsError("the model's logits are NaN or infinite; it cannot write (try dtype: float32)") from None
    stop = frozenset(ends)
    follows = [next((i for i, token in enumerate(row[width:]) if token in stop), len(row) - width) for row in made]
    return [[*start, *row[width : width + count]] for start, row, count in zip(starts, made, follows)]


def _refuse_useless(kept: int, dropped: Mapping[str, int]) -> None:
    sampled = kept + sum(dropped.values())
    if sampled >= 2 * BATCH and kept * LEAST_USABLE < sampled:
        why = ", ".join(f"{reason}: {count}" for reason, count in sorted(dropped.items()))
        raise CalibrationError(
            f"the base writes nothing usable: of {sampled} texts {sampled - kept} were left out ({why}); give a table"
        )
