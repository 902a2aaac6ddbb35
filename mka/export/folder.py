"""A stock folder, as transformers and the engines read it: every file of the model, with sums over all of them."""

import shutil
from pathlib import Path

from mka.model.weights import list_files
from mka.store.sums import SUMS_NAME, write_sums


def export_folder(source: Path, target: Path) -> None:
    """Copy a model folder, without its card, into an empty one.

    Sums are kept where there are some: a copy that went wrong must not be given new ones.
    """
    for file in list_files(source):
        if file.name != "README.md":
            copy = target / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
    if not (target / SUMS_NAME).exists():
        write_sums(target)


EXPORT = export_folder
