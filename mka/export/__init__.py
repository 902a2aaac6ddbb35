"""Where a candidate goes, in which form: one file each, behind one seam."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka.errors import RecipeError, nearest

if TYPE_CHECKING:
    from mka.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class Form:
    """What can be asked of one form.

    Attributes:
        module: holds its EXPORT, called with the model folder and an empty folder to fill, then with the type where
            there are types, which may return facts; and, if it writes more or fewer bytes than the model has,
            ``foresee_bytes``, called with the checkpoint and alike.
        types: of the weights it writes, the default first; none: it has them as they are.
        rounded: the default among them for a folder of rounded weights, if that is another.
    """

    module: str
    types: tuple[str, ...] = ()
    rounded: str | None = None

    def choose_type(self, checkpoint: "Checkpoint", asked: str | None) -> str | None:
        """Return the type that a folder's weights get; None where there are none."""
        default = self.rounded if checkpoint.is_quantized else None
        return asked or default or next(iter(self.types), None)


# A row per form: its name in `mka export --format`.
_EXPORTS = {
    "folder": Form("mka.export.folder"),
    "gguf": Form(
        "mka.export.gguf", ("q8_0", "f32", "f16", "bf16", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "rounded"), "rounded"
    ),
}


@dataclass(frozen=True)
class Export:
    """A form with its type chosen, as far as no folder has to be seen for it.

    Attributes:
        write: called with a checkpoint and an empty folder to fill; returns facts.
        foresee: returns the bytes that will be written of a checkpoint, and refuses what cannot be.
        choose_type: returns the type that a checkpoint's weights get; None: they stay as they are.
    """

    write: "Callable[[Checkpoint, Path], dict[str, Any]]"
    foresee: "Callable[[Checkpoint], int]"
    choose_type: "Callable[[Checkpoint], str | None]"


def export_names() -> list[str]:
    """Names of all forms."""
    return list(_EXPORTS)


def type_names(form: str | None) -> list[str]:
    """Types of the weights that a form writes; of all forms where it has none, or there is none of that name."""
    own = _EXPORTS[form].types if form in _EXPORTS else ()
    return list(own or dict.fromkeys(kind for row in _EXPORTS.values() for kind in row.types))


def get_export(name: str, file_type: str | None = None) -> Export:
    """Return what writes a model folder in a form.

    Args:
        name: of the form.
        file_type: of the weights; None: the form's default for what it is given.

    Raises:
        RecipeError: if there is no such form or type; the nearest name is suggested.
    """
    if name not in _EXPORTS:
        raise RecipeError(f"unknown format {name!r}{nearest(name, _EXPORTS)}; formats: {', '.join(_EXPORTS)}")
    form = _EXPORTS[name]
    if file_type is not None and not form.types:
        typed = "; ".join(f"{other}: {', '.join(row.types)}" for other, row in _EXPORTS.items() if row.types)
        raise RecipeError(f"format {name!r} has no types, it writes weights as they are; types of {typed}")
    if file_type is not None and file_type not in form.types:
        close = nearest(file_type, form.types)
        raise RecipeError(f"unknown type {file_type!r}{close}; types of {name!r}: {', '.join(form.types)}")
    module = importlib.import_module(form.module)
    foresee = getattr(module, "foresee_bytes", lambda checkpoint: checkpoint.nbytes)

    def list_asked(checkpoint: "Checkpoint") -> list[Any]:
        chosen = form.choose_type(checkpoint, file_type)
        return [] if chosen is None else [chosen]

    return Export(
        lambda checkpoint, target: module.EXPORT(checkpoint.path, target, *list_asked(checkpoint)) or {},
        lambda checkpoint: foresee(checkpoint, *list_asked(checkpoint)),
        lambda checkpoint: form.choose_type(checkpoint, file_type),
    )
