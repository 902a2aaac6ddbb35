"""What an engine loads of a model folder: the folder itself, or a file made of it; and how exact that is."""

from pathlib import Path
from typing import TYPE_CHECKING

from mka.engines import Engine, get_engine
from mka.errors import RecipeError

if TYPE_CHECKING:
    from mka.recipe import Recipe

# Nats by which rounding alone moves log-probabilities, between an engine and transformers in the same dtype; what was
# seen and why it is this much stands in docs/engines.md.
TOLERANCES = {"float32": 0.02, "float16": 0.1, "bfloat16": 0.5}
# Engines that multiply by integers round what goes in, too.
TOLERANCE_ROUNDED = 1.0
_FILE_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def check_engines(recipe: "Recipe") -> None:
    """Refuse engines that could not be asked at the end of a run, before it begins.

    Raises:
        RecipeError: if an engine loads a file that cannot be made of what the recipe makes.
        EngineError: if one is not installed.
    """
    for asked in recipe.engines:
        engine = get_engine(asked.engine)
        if engine.converts and recipe.quantize.scheme != "off":
            raise RecipeError(
                f"engines: {engine.name} loads a file made of whole weights, and quantize.scheme is "
                f"{recipe.quantize.scheme!r}; set it to off, and round by the engine's own file_type"
            )
        engine.find_python()


def make_loadable(engine: Engine, model: Path, file_type: str, folder: Path) -> Path:
    """Return what an engine loads of a model folder; a file that has to be made is written to an existing folder.

    Raises:
        MkaError: if the file cannot be made of the model.
    """
    if not engine.converts:
        return model
    from mka.export.gguf import write_gguf

    return write_gguf(model, folder, file_type)


def name_file_type(engine: Engine, dtype: str, asked: str | None) -> str | None:
    """Return the type of the weights in the file that an engine loads; None if it loads the folder."""
    return (asked or _FILE_TYPES[dtype]) if engine.converts else None


def choose_tolerance(dtype: str, file_type: str | None) -> float:
    """Return the nats by which an engine's log-probabilities may differ from transformers'.

    Args:
        dtype: of the arithmetic.
        file_type: of the weights in a file that was made of the folder; None: the folder itself is loaded.
    """
    if file_type is not None and file_type not in _FILE_TYPES.values():
        return TOLERANCE_ROUNDED
    stored = next((name for name, kind in _FILE_TYPES.items() if kind == file_type), dtype)
    return max(TOLERANCES[dtype], TOLERANCES[stored])
