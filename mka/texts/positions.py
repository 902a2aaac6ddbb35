"""How long a model can read."""

from typing import Any

from mka.errors import RecipeError


def check_context(context: int, positions: Any, key: str = "evaluation.context") -> None:
    """Refuse windows longer than a model's positions.

    Args:
        context: tokens per window.
        positions: of the model; anything but an integer sets no limit.
        key: of the recipe, that says how long windows are.

    Raises:
        RecipeError: if they are longer.
    """
    if isinstance(positions, int) and context > positions:
        raise RecipeError(f"{key} is {context}; the model has {positions} positions, lower the context")
