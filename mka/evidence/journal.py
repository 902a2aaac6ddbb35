"""What a search has measured, written down as it is measured, so that a killed search need not measure it again."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mka.errors import OutputError
from mka.evidence.needs import Repairs
from mka.evidence.states import HiddenStates
from mka.outside.reading import parse_json
from mka.plan.plan import MergedLayer

JOURNAL_FILE = "journal.jsonl"


class Journal:
    """Numbers by what they are of: JSON lines, of which each is written whole before the next is measured.

    Whoever opens it is alone with it, and names its file by everything that decides the numbers.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there; a line that was cut off is dropped.

        Raises:
            OutputError: if the file cannot be read or written, or holds something else.
        """
        self.path = path
        self._known: dict[str, float] = {}
        whole = 0
        try:
            for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
                if not line.endswith(b"\n"):
                    break
                entry = parse_json(line)
                if not isinstance(entry["of"], str) or not isinstance(entry["value"], int | float):
                    raise TypeError
                self._known[entry["of"]] = entry["value"]
                whole += len(line)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.truncate(whole)
        except (ValueError, KeyError, TypeError):
            raise OutputError(f"journal {path} is damaged in line {len(self._known) + 1}; remove it") from None
        except OSError as error:
            raise OutputError(f"journal {path} cannot be written: {error.strerror or error}") from None

    def recall(self, of: str, measure: Callable[[], float]) -> float:
        """Return the number of something: the one written down, or one that is measured and written down now.

        Raises:
            OutputError: if it cannot be written.
        """
        if of not in self._known:
            self._known[of] = measure()
            try:
                with self.path.open("ab") as file:
                    file.write(json.dumps({"of": of, "value": self._known[of]}).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise OutputError(f"journal {self.path} cannot be written: {error.strerror or error}") from None
        return self._known[of]


class RecalledRepairs:
    """Measures what a journal does not hold; satisfies `mka.evidence.needs.Repairs`."""

    def __init__(self, repairs: Repairs, journal: Journal) -> None:
        self._repairs, self._journal = repairs, journal

    def observe(self) -> HiddenStates:
        """Return hidden states of the base, which are not written down."""
        return self._repairs.observe()

    def divergence(self, layers: Sequence[MergedLayer], tokens: int) -> float:
        """Return the divergence without repair."""
        return self._journal.recall(
            _name(f"divergence:{tokens}", layers), lambda: self._repairs.divergence(layers, tokens)
        )

    def aligned(self, layers: Sequence[MergedLayer]) -> float:
        """Return the divergence after an alignment."""
        return self._journal.recall(_name("aligned", layers), lambda: self._repairs.aligned(layers))

    def healed(self, layers: Sequence[MergedLayer]) -> float:
        """Return the divergence after a short healing."""
        return self._journal.recall(_name("healed", layers), lambda: self._repairs.healed(layers))


def _name(level: str, layers: Sequence[MergedLayer]) -> str:
    body: dict[str, Any] = {"level": level, "layers": [layer.to_dict() for layer in layers]}
    return json.dumps(body, sort_keys=True)
