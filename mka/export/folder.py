"""A stock folder, as transformers and the engines read it: every file of the model, with sums over all of them."""

import shutil
from pathlib import Path

from mka.store.sums import SUMS_NAME, write_sums


def export_folder(source: Path, target: Path) -> None:
    """Copy a model folder, without its card, into an empty one.

    Sums are kept where there are some: a copy that went wrong must not be given new ones.
    """
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name != "README.md":
            shutil.copyfile(file, target / file.name)
    if not (target / SUMS_NAME).exists():
        write_sums(target)


EXPORT = export_folder
