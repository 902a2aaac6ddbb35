"""The eight prompts that every engine continues, and random ones for the timing."""

import random
from collections.abc import Sequence
from typing import Any

from mka.errors import EngineError

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Question: What is 17 plus 25?\nAnswer:",
    "Water boils at a lower temperature on a mountain because",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 2, 4, 8, 16,",
    "Der Unterschied zwischen Wetter und Klima ist, dass",
)
# Tokens that each is continued by.
NEW_TOKENS = 32


def tokenize_prompts(tokenizer: Any, where: str) -> list[list[int]]:
    """Return the token ids of each prompt, with what the tokenizer puts around a text.

    Raises:
        EngineError: if it makes no token of one.
    """
    found = [list(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    if not all(found):
        raise EngineError(f"{where}: its tokenizer makes no token of {PROMPTS[found.index([])]!r}; nothing to compare")
    return found


def draw_prompts(count: int, tokens: int, vocabulary: int, seed: int) -> Sequence[Sequence[int]]:
    """Draw prompts of random tokens, (count, tokens)."""
    generator = random.Random(seed)
    return [[generator.randrange(vocabulary) for _ in range(tokens)] for _ in range(count)]
