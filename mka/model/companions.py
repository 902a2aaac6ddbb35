"""What belongs to a model beside its weights and config: tokenizer, templates, generation, processors, licence."""

import re
import shutil
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from mka.errors import CheckpointError
from mka.model.weights import TEMPLATES, list_files, read_json

# A list of what is wanted, as patterns of lower-case names: weights of other readers, states of a training and whatever
# else lies there stay behind.
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tekken.json", "*.tiktoken", "*.model", "*.model.v[0-9]*"),
)
GENERATION = ("generation_config.json", "*.jinja", "chat_template.json", "system_prompt.txt")
PROCESSOR = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
LEGAL = (
    *("*license*", "*licence*", "*notice*", "*copying*", "*copyright*", "*use[-_]policy*", "*terms[-_]of[-_]use*"),
    *("terms", "terms.*", "attribution*", "patents*"),
)
COMPANIONS = (*TOKENIZER, *GENERATION, *PROCESSOR, *LEGAL)
_CODE = re.compile(r"(\w+)\.\w+", re.ASCII)


def is_companion(name: str) -> bool:
    """Whether a file belongs to a model beside weights and config, by its name."""
    return _is_one_of(name, COMPANIONS)


def _is_one_of(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what belongs to a model beside its weights and config, byte for byte."""
    wanted = _name_code(source)
    for file in list_files(source):
        if file.parent != source:
            (target / TEMPLATES).mkdir(exist_ok=True)
            shutil.copyfile(file, target / TEMPLATES / file.name)
        elif is_companion(file.name) or file.name in wanted:
            shutil.copyfile(file, target / file.name)


def copy_licences(source: Path, target: Path) -> None:
    """Copy licence and notice files, which go with a model in any form."""
    for file in list_files(source):
        if file.parent == source and _is_one_of(file.name, LEGAL):
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
