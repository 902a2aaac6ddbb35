"""What a model that writes its own calibration text is asked for, begins with, and may not leave in the table."""

from collections.abc import Sequence
from dataclasses import dataclass

from mka.errors import RecipeError
from mka.texts.rows import text_digest

# A few common words each, of no document: enough to choose a register, too few to be anybody's text. None ends in a
# space, which most tokenizers put in front of the next word.
OPENINGS = {
    "prose": (
        *("It was", "When she", "The old man", "In the spring of", "I had never", "They walked", "At first"),
        *("Nobody in the village", "My father", "One morning", "The door", "After the war", "He looked at"),
    ),
    "reference": (
        *("The history of", "In mathematics, a", "The city of", "A species of", "The term", "According to"),
        *("During the nineteenth century,", "One of the most important", "Research has shown", "The company"),
        *("In recent years,", "The human body", "Climate", "The first"),
    ),
    "dialogue": (
        *("Question:", "How do I", "Why does", '"Are you', "What is the difference between", "Dear", "Hello,"),
        *("Thank you for", "Can you", "I think that", '"No,"', "Yes, but", "What would happen if"),
    ),
    "steps": (
        *("To make", "Step 1:", "First,", "1.", "Here are", "Ingredients:", "Before you begin,", "The following"),
        *("Make sure that", "There are three ways to", "In this chapter,", "Summary:", "Exercise 1."),
    ),
    "code": (
        *("import", "def", "#include <", "function", "SELECT", "{", "class", "<html>", "| Name |", "#!/bin/sh"),
        *("public static", "for i in range(", "const", "# This script"),
    ),
}
# Kinds of beginnings, so sources of a table, at most: those, a token of the vocabulary, and BOS.
KINDS = len(OPENINGS) + 2
# Tokens per text: from the most that one calibration text usually needs to a window of training.
SHORTEST, LONGEST = 64, 256
# Two texts of every kind: one kind is left out where a penalty is chosen or healing is watched.
FEWEST_TOKENS = 2 * KINDS * SHORTEST
# Texts written at a time.
BATCH = 32
# Below it a text says nothing of the register it was begun in.
LEAST_TOKENS = 16
# Share of runs of four tokens that occurred before in the same text (seq-rep-4, arXiv 1908.04319): some 0.01 in what
# people write, above 0.4 in text that has fallen into a loop.
RUN, MOST_REPEATED = 4, 0.3


@dataclass(frozen=True)
class Wanted:
    """How much text is asked for.

    Attributes:
        tokens: at least, as the model's tokenizer counts the finished texts.
        texts: at least.
        seed: of beginnings and of all sampling.
    """

    tokens: int
    texts: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what would be no table.

        Raises:
            RecipeError: if there were not two texts of every kind.
        """
        if self.tokens < FEWEST_TOKENS:
            raise RecipeError(
                f"{self.tokens} tokens are too few to write: at least {FEWEST_TOKENS}, two texts of every kind"
            )

    @property
    def length(self) -> int:
        """Tokens at most per text: no more than are needed where many texts are asked for."""
        share = -(-self.tokens // self.texts) if self.texts else LONGEST
        return min(LONGEST, max(SHORTEST, share))


def judge_text(text: str, ids: Sequence[int], special: frozenset[int], seen: set[str]) -> str | None:
    """Say why a text is left out; None if it is good.

    Args:
        text: as it would be in the table.
        ids: its tokens.
        special: tokens that no text may hold.
        seen: digests of the texts before it.
    """
    if len(ids) < LEAST_TOKENS:
        return "short"
    if "\ufffd" in text or "\0" in text:
        return "unreadable"
    if not special.isdisjoint(ids):
        return "special"
    if measure_repetition(ids) > MOST_REPEATED:
        return "repetitive"
    return "duplicate" if text_digest(text) in seen else None


def measure_repetition(ids: Sequence[int]) -> float:
    """Return the share of runs of `RUN` tokens that occurred before in the same text, 0 to 1."""
    runs = list(zip(*(ids[first:] for first in range(RUN))))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
