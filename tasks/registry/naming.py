"""What MLflow will refuse to write down, asked before anything is computed: names and lengths, by its own rules."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from mka.errors import RecipeError, RegistryError
from mka.evaluation.metrics import METRICS
from mka.outside.printable import escape_controls
from mka.pipeline.job import Job
from mka.pipeline.stage import Found
from mka.recipe import Recipe

ALLOWED = "letters, digits, spaces and . _ - / :, of which / stands between names"
# Around a source's name in the longest names it becomes part of.
METRIC_NAMES = ("candidate/{source}/{metric}_stderr", "gate/{metric} {source} against control/recovery")


def flatten_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return dotted key -> value of a recipe, as its run records it."""
    import pandas as pd

    return dict(pd.json_normalize(recipe.model_dump(mode="json")).iloc[0].to_dict())


def refuse_recipe_names(recipe: Recipe) -> None:
    """Refuse a recipe whose registered name or keys MLflow does not take.

    Raises:
        RegistryError: naming the key, what was given and what is allowed.
    """
    from mlflow.utils import validation

    name = recipe.registered_name
    reason = _ask(validation._validate_model_name, name)
    # Quotes end the search for a name, @ starts an alias in an address.
    odd = any(letter in name for letter in "'\"`@\\#?%") or escape_controls(name) != name
    if reason or odd or len(name) > 250:
        raise RegistryError(
            f"registry.name {name!r} cannot be registered: "
            f"{reason or 'no quotes, backslash, @, #, ?, % or control characters, and 250 characters at most'}; "
            "allowed, for example: letters, digits, spaces and . _ -"
        )
    for key in flatten_recipe(recipe):
        if reason := _ask(validation._validate_param_name, key) or _too_long(key):
            raise RegistryError(f"recipe key {key!r} cannot be recorded in MLflow: {reason}; allowed: {ALLOWED}")


def refuse_source_names(sources: Iterable[str], table: str) -> None:
    """Refuse sources of a held-out table that cannot be part of a metric's name.

    Raises:
        RecipeError: naming the first of them.
    """
    from mlflow.utils import validation

    longest = max(METRICS, key=len)
    for source in sources:
        for form in METRIC_NAMES:
            name = form.format(source=source, metric=longest)
            if reason := _ask(validation._validate_metric_name, name) or _too_long(name):
                raise RecipeError(
                    f"evaluation.text {table}: source {source!r} cannot be part of a metric's name in MLflow: "
                    f"{reason}; rename it, allowed: {ALLOWED}"
                )


def name_candidate(job: Job, found: Found) -> str:
    """Return what MLflow's lists call the logged model, e.g. ``smollm2-135m-mka-23-of-30-layers-int8``."""
    recipe, plan = job.recipe, found["plan"].facts
    scheme = "" if recipe.quantize.scheme == "off" else f"-{recipe.quantize.scheme}"
    name = f"{recipe.registered_name[:150]}-{plan['layers_out']}-of-{plan['layers_in']}-layers{scheme}"
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name)


def _ask(validate: Callable[[str], object], name: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        validate(name)
    except MlflowException as error:
        return " ".join(str(error).removeprefix("INVALID_PARAMETER_VALUE: ").split())[:200]
    return ""


def _too_long(name: str) -> str:
    from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH

    return f"longer than {MAX_ENTITY_KEY_LENGTH} characters" if len(name) > MAX_ENTITY_KEY_LENGTH else ""
