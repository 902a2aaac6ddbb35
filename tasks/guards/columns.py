"""What all doors share: columns that must be complete, and what counts as finite.

Null values pass every expectation of Great Expectations but the one that forbids them, and so does an empty table but
for its row count. Hence each suite says both, and every column that decides anything is also "not null".
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tasks.guards.guard import import_great_expectations

if TYPE_CHECKING:
    import pandas as pd


LARGEST = sys.float_info.max  # an interval with these ends holds every finite number


def expect_complete(column: str) -> Any:
    """Expectation that no value of a column is null."""
    return import_great_expectations().expectations.ExpectColumnValuesToNotBeNull(column=column)


def make_nullable(values: Sequence[Any]) -> "pd.Series":
    """Make a column whose nulls stay None."""
    # A column of None alone would otherwise become float, whose null is NaN.
    import pandas as pd

    return pd.Series(list(values), dtype=object)
