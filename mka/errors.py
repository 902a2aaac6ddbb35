"""Refusals: what failed, what was given, what is allowed, what to do. One line each; exit code 2 if none is said."""

import difflib
from collections.abc import Iterable

from mka.outside.printable import LONGEST, one_line


class MkaError(Exception):
    """Base of every refusal this project raises on purpose; its message is one line a person can act on."""

    exit_code = 2
    # Characters of the line; what is longer lacks its middle.
    longest = LONGEST

    def __init__(self, message: object = "") -> None:
        """Keep one line that is safe to show, whatever names and addresses from outside stand in it."""
        super().__init__(one_line(message, self.longest))


class RecipeError(MkaError):
    """A recipe, option or target that cannot be accepted."""


class CheckpointError(MkaError):
    """A model folder that is missing, damaged, inconsistent or of an unsupported architecture."""


class UnreachableError(CheckpointError):
    """A model hub that did not answer; trying again may help."""


class PackageError(MkaError):
    """A package that is not pinned, cannot be downloaded, is damaged, or holds something else than it should."""


class CalibrationError(MkaError):
    """A calibration set that is empty, unreadable, too small or overlaps the evaluation sets."""


class ReportError(MkaError):
    """A file that is no report of an evaluation."""


class NumericsError(MkaError):
    """A quantity that came out NaN, infinite or outside its range."""


class PlanError(MkaError):
    """A merge plan that is not well formed or does not fit its checkpoint."""


class OutputError(MkaError):
    """A place that cannot be written: it exists, is not writable, or the disk is full."""


class StoreError(MkaError):
    """A stored result, the base or a table changed while a run was using it."""


class DurationError(MkaError):
    """A length of time that is not written as one."""


class GuardError(MkaError):
    """A table at the door of a stage that fails its expectations; all of them are told."""

    longest = 8 * LONGEST


class RegistryError(MkaError):
    """A model registry that cannot be reached or does not hold what it should."""


class PublishError(MkaError):
    """A model that a hub does not take, or holds otherwise than it was sent."""


class SignatureError(MkaError):
    """A folder that cannot be signed, or is not what its signature says."""


class GateRefused(MkaError):
    """The candidate was measured and the gate did not let it pass."""

    exit_code = 1


class GateUndecided(MkaError):
    """The candidate was measured, and the gate can neither let it pass nor refuse it by what was measured."""

    exit_code = 3


class EngineError(MkaError):
    """An engine that is not installed, died, hung or ran out of memory: of the model nothing is known."""


class EngineFault(GateRefused):
    """An engine does not load the model, or makes something else of it than transformers does."""


class WatchError(MkaError):
    """Base models that could not be looked at, or whose recompression could not be started."""


class ServerError(MkaError):
    """Servers that do not start, do not answer, or are not there."""


class PromotionError(GateRefused):
    """A version that may not become champion: stale, not approved, or worse than the champion."""


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the allowed name closest to ``given``, or an empty string."""
    if len(given) > 100:  # no misspelling, and the comparison would take long
        return ""
    matches = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
