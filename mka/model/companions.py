"""What belongs to a model beside its weights and config: tokenizer, templates, generation, processors, licence."""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

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
    """Copy what belongs to a model beside its weights and config, byte for byte.

    A tokenizer's settings that only transformers 5 can read are spelled so that older readers can, too.
    """
    wanted = _name_code(source)
    for file in list_files(source):
        if file.parent != source:
            (target / TEMPLATES).mkdir(exist_ok=True)
            shutil.copyfile(file, target / TEMPLATES / file.name)
        elif is_companion(file.name) or file.name in wanted:
            shutil.copyfile(file, target / file.name)
    settings = target / "tokenizer_config.json"
    if settings.is_file() and (spelled := spell_tokenizer(body := read_json(settings))) != body:
        settings.write_text(json.dumps(spelled, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def spell_tokenizer(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tokenizer's settings in the words that transformers 4 and 5 have in common.

    Version 5 calls the class by a name that 4 does not know, and keeps further special tokens in a list under a key
    that is a mapping in 4; it reads the older words as well.
    """
    spelled = dict(body)
    if spelled.get("tokenizer_class") == "TokenizersBackend":
        spelled["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(spelled.get("extra_special_tokens"), list) and "additional_special_tokens" not in spelled:
        spelled["additional_special_tokens"] = spelled.pop("extra_special_tokens")
    return spelled


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
