"""A stock folder, as transformers and the engines read it: every file of the model, with sums over all of them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mka.model.weights import list_files
from mka.store.sums import SUMS_NAME, write_sums


def export_folder(source: Path, target: Path, copy: Callable[[Path, Path], Any] = shutil.copyfile) -> None:
    """Copy a model folder, without its card, into an empty one.

    Sums are kept where there are some: a copy that went wrong must not be given new ones.

    Args:
        source: the folder.
        target: the empty one.
        copy: brings one file over.
    """
    for file in list_files(source):
        if file.name != "README.md":
            place = target / file.relative_to(source)
            place.parent.mkdir(exist_ok=True)
            copy(file, place)
    if not (target / SUMS_NAME).exists():
        write_sums(target)


EXPORT = export_folder
