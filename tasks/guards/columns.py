"""What all doors share: columns that must be complete, and columns that must be finite.

Null values pass every expectation of Great Expectations but the one that forbids them, and so does an empty table but
for its row count. Hence each suite says both, and every column that decides anything is also "not null".
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tasks.guards.guard import LARGEST, import_great_expectations

if TYPE_CHECKING:
    import pandas as pd


def expect_complete(column: str) -> Any:
    """Expectation that no value of a column is null."""
    return import_great_expectations().expectations.ExpectColumnValuesToNotBeNull(column=column)


def expect_finite(column: str, above: float | None = None, *, or_equal: bool = True, description: str = "") -> Any:
    """Expectation that every number of a column that is there is finite.

    Args:
        column: its name.
        above: what it has to be above; None: nothing.
        or_equal: whether it may be equal to that.
        description: in words; default: what is asked. Without one, pages would print the largest number there is.
    """
    gxe = import_great_expectations().expectations
    least = "" if above is None else f"at least {above:g} and " if or_equal else f"above {above:g} and "
    return gxe.ExpectColumnValuesToBeBetween(
        column=column,
        min_value=-LARGEST if above is None else above,
        max_value=LARGEST,
        strict_min=above is not None and not or_equal,
        description=description or f"The number is {least}finite.",
    )


def make_nullable(values: Sequence[Any]) -> "pd.Series":
    """Make a column whose nulls stay None."""
    # A column of None alone would otherwise become float, whose null is NaN.
    import pandas as pd

    return pd.Series(list(values), dtype=object)
