"""Every name that lm-eval knows, tasks, groups and tags: looked up once for its version, kept in the user's cache."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from mka.errors import OutputError
from mka.evaluation.packaged import NotRunError, define_packaged, find_packaged, read_packaged
from mka.outside.reading import UnreadableError, read_json
from mka.store.publishing import replace_file

# Modules whose rules decide what stands in the index.
_RULES = ("packaged.py", "task_data.py", "task_index.py", "task_keys.py")


@dataclass(frozen=True)
class Entry:
    """What a name stands for.

    Attributes:
        kind: a task, a group with a definition of its own, or a tag that tasks bear.
        file: its YAML in lm-eval's folder of tasks; of a tag none.
        output_type: of a task.
        path, name: of a task's data set, and of its configuration.
        why: of a task, why it is not run here; empty if it is.
        members: of a group its tasks and groups, of a tag its tasks.
    """

    kind: Literal["task", "group", "tag"]
    file: str = ""
    output_type: str = ""
    path: str = ""
    name: str | None = None
    why: str = ""
    members: tuple[str, ...] = ()

    @property
    def data(self) -> str:
        """The data set, with its configuration."""
        return f"{self.path}:{self.name}" if self.name else self.path


def find_index() -> Path:
    """Return where the index is kept: in the user's cache, by lm-eval's version and the rules it was made by."""
    place = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    rules = b"".join((Path(__file__).parent / name).read_bytes() for name in _RULES)
    digest = hashlib.sha256(rules).hexdigest()[:12]
    return Path(place).expanduser() / "mka" / f"tasks-lm-eval-{importlib.metadata.version('lm-eval')}-{digest}.json"


@cache
def read_index() -> Mapping[str, Entry]:
    """Return every name of lm-eval's; what was looked up before is read, which takes a tenth of a second.

    Raises:
        RecipeError: if lm-eval is not installed.
    """
    file = find_index()
    with contextlib.suppress(OSError, UnreadableError, LookupError, TypeError, AttributeError):
        return {
            name: Entry(**{**body, "members": tuple(body.get("members", ()))})
            for name, body in read_json(file)["names"].items()
        }
    found = build_index(find_packaged())
    empty = asdict(Entry("task"))
    names = {
        name: {key: value for key, value in asdict(entry).items() if key == "kind" or value != empty[key]}
        for name, entry in found.items()
    }
    # A cache that cannot be written costs some seconds the next time.
    with contextlib.suppress(OSError, OutputError):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, lambda path: path.write_text(json.dumps({"names": names}), encoding="utf-8"))
    return found


def build_index(folder: Path) -> dict[str, Entry]:
    """Look through all definitions of a folder; of a name that is said twice the first in the order of files counts."""
    found: dict[str, Entry] = {}
    tags: dict[str, set[str]] = {}
    for file in sorted(folder.rglob("*.yaml"), key=lambda path: path.as_posix()):
        with contextlib.suppress(ValueError, OSError):
            body = read_packaged(file)
            name = body.get("group", body.get("task"))
            if not isinstance(name, str) or name in found:
                continue
            place = file.relative_to(folder).as_posix()
            if "group" in body and "class" not in body:
                members = body.get("task") or []
                named = [m if isinstance(m, str) else m.get("group", m.get("task")) for m in _as_list(members)]
                found[name] = Entry("group", place, members=tuple(map(str, named)))
            else:
                found[name] = _describe(name, file, place, body)
                for tag in _as_list(body.get("tag") or []):
                    tags.setdefault(str(tag), set()).add(name)
    return found | {tag: Entry("tag", members=tuple(sorted(names))) for tag, names in tags.items() if tag not in found}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _describe(name: str, file: Path, place: str, body: Mapping[str, Any]) -> Entry:
    path, config = body.get("dataset_path"), body.get("dataset_name")
    config = config if isinstance(config, str) else None
    kind = str(body.get("output_type") or "generate_until")
    why = ""
    try:
        define_packaged(name, file, body)
    except NotRunError as error:
        why = str(error)
    return Entry("task", place, kind, str(path or ""), config, why)
