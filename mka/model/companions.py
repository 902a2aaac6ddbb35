"""What belongs to a model beside its weights and config: tokenizer, chat templates, generation config, licence."""

import re
import shutil
from pathlib import Path

from mka.errors import CheckpointError
from mka.model.weights import TEMPLATES, list_files, read_json

# A list of what is wanted: weights of other readers, states of a training and whatever else lies there stay behind.
_WANTED = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|tekken\.json|.*\.(tiktoken|model|model\.v\d+)|chat_template\.(jinja|json)|.*\.jinja|generation_config\.json"
    r"|(LICEN[SC]E|NOTICE|COPYING|COPYRIGHT|USE_POLICY)\b.*",
    re.IGNORECASE,
)
_CODE = re.compile(r"(\w+)\.\w+", re.ASCII)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what belongs to a model beside its weights and config."""
    wanted = _name_code(source)
    for file in list_files(source):
        if file.parent != source:
            (target / TEMPLATES).mkdir(exist_ok=True)
            shutil.copyfile(file, target / TEMPLATES / file.name)
        elif _WANTED.fullmatch(file.name) or file.name in wanted:
            shutil.copyfile(file, target / file.name)


def _name_code(folder: Path) -> set[str]:
    """Name the files whose code makes the tokenizer; a model's own code is not used, since stock knows every family."""
    found: set[str] = set()
    for name in ("tokenizer_config.json", "config.json"):
        try:
            classes = read_json(folder / name)["auto_map"]["AutoTokenizer"]
        except (CheckpointError, KeyError, TypeError):
            continue
        for entry in classes if isinstance(classes, list) else [classes]:
            if isinstance(entry, str) and (match := _CODE.fullmatch(entry)):
                found.add(f"{match[1]}.py")
    return found
