"""What an engine loads of a model folder: the folder itself, or a file made of it; and how exact that is."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mka.engines import Engine, get_engine
from mka.errors import CheckpointError, RecipeError, require_extra
from mka.model.checkpoint import Checkpoint
from mka.transforms import SCHEMES, list_options

if TYPE_CHECKING:
    from mka.recipe import Recipe

# Nats by which rounding alone moves log-probabilities, between an engine and transformers in the same dtype; what was
# seen and why it is this much stands in docs/engines.md.
TOLERANCES = {"float32": 0.02, "float16": 0.1, "bfloat16": 0.5}
# Engines that multiply by integers round what goes in, too, even where the integers are the folder's own.
TOLERANCE_ROUNDED = 1.0
# Type of a file of rounded weights, which are kept; see `mka.export.ggml`.
KEPT = "rounded"
_FILE_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def check_engines(recipe: "Recipe") -> None:
    """Refuse engines that could not be asked at the end of a run, before it begins.

    Raises:
        RecipeError: if an engine loads a file that would say something else of what the recipe makes.
        EngineError: if one is not installed.
        ExtraError: if the extra `gguf` is not, and an engine loads such a file.
    """
    for asked in recipe.engines:
        engine = get_engine(asked.engine)
        if engine.converts and _rounds_inputs(recipe):
            raise RecipeError(
                f"engines: {engine.name} loads a file of rounded weights, and quantize.scheme "
                f"{recipe.quantize.scheme!r} rounds what goes into them once per token, too; take int8 or fewer bits, "
                f"or leave {engine.name} out"
            )
        _refuse_kept(engine, asked.file_type)
        if engine.converts:
            require_extra("gguf", f"the file that {engine.name} loads")
        engine.find_python()


def check_loadable(engine: Engine, models: Mapping[str, Checkpoint], file_type: str | None) -> None:
    """Refuse models that an engine's file would say something else of, and a type that is for none of them.

    Args:
        engine: the engine.
        models: role -> model.
        file_type: that was asked for.

    Raises:
        RecipeError: if a type is asked for that is not one for models that are not rounded, or there are none.
        CheckpointError: if a model rounds more than its weights.
    """
    if not engine.converts:
        return
    from mka.transforms.unpacking import rounds_inputs

    _refuse_kept(engine, file_type)
    for checkpoint in models.values():
        if rounds_inputs(checkpoint):
            raise CheckpointError(
                f"{checkpoint.path}: what goes into its products is rounded once per token, and {engine.name} rounds "
                "it in its own way; round weights alone (int8 or fewer bits), or ask another engine"
            )
    if file_type is not None and all(checkpoint.is_quantized for checkpoint in models.values()):
        raise RecipeError(
            f"file_type {file_type!r} is of models that are not rounded, and a rounded one keeps its numbers; leave it "
            "out, or name a base that is not rounded"
        )


def make_loadable(engine: Engine, model: Path, file_type: str, folder: Path) -> Path:
    """Return what an engine loads of a model folder; a file that has to be made is written to an existing folder.

    Raises:
        MkaError: if the file cannot be made of the model.
    """
    if not engine.converts:
        return model
    from mka.export.gguf import write_gguf

    return write_gguf(model, folder, file_type)


def name_file_type(engine: Engine, model: Checkpoint, dtype: str, asked: str | None) -> str | None:
    """Return the type of the file that an engine loads of a model; None if it loads the folder.

    Args:
        engine: the engine.
        model: one whose weights are rounded keeps them.
        dtype: of the arithmetic.
        asked: for models that are not rounded; None: that of the arithmetic.
    """
    if not engine.converts:
        return None
    return KEPT if model.is_quantized else asked or _FILE_TYPES[dtype]


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


def _rounds_inputs(recipe: "Recipe") -> bool:
    rounded = [SCHEMES[name] for name in list_options(recipe.quantize) if name in SCHEMES]
    return any(scheme.activations is not None for scheme in rounded)


def _refuse_kept(engine: Engine, file_type: str | None) -> None:
    if file_type == KEPT:
        raise RecipeError(
            f"file_type {KEPT!r}: a rounded model gets it by itself, and others have nothing to keep; name the type of "
            f"{engine.name}'s files of models that are not rounded, or none"
        )
