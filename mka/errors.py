"""Refusals: what failed, what was given, what is allowed, what to do. One line each; exit code 2 if none is said."""

import difflib
import importlib.util
from collections.abc import Iterable

from mka.outside.printable import LONGEST, one_line


class MkaError(Exception):
    """Base of every refusal this project raises on purpose; its message is one line a person can act on."""

    exit_code = 2
    # Characters of the line; what is longer lacks its middle.
    longest = LONGEST
    # Whether a log has its line already.
    is_told = False

    def __init__(self, message: object = "") -> None:
        """Keep one line that is safe to show, whatever names and addresses from outside stand in it."""
        super().__init__(one_line(message, self.longest))


class ExtraError(MkaError):
    """A library that is not installed; it comes with an extra of this project."""


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
    """The candidate was measured and the gate did not let it pass; the line has the figures."""

    exit_code = 1
    longest = 2 * LONGEST


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


# Extra of pyproject.toml -> what is imported of it.
EXTRAS = {
    "eval": ("lm_eval", "datasets"),
    "gguf": ("gguf",),
    "flow": ("prefect", "mlflow", "dvc", "dvc_data", "great_expectations", "sqlalchemy", "fastapi", "pandas"),
    "dask": ("prefect_dask", "distributed"),
    "sign": ("model_signing", "OpenSSL"),
}


def require_extra(extra: str, what: str, names: Iterable[str] = ()) -> None:
    """Refuse what needs an extra, where that is not installed, before anything is computed for it.

    Args:
        extra: one of `EXTRAS`.
        what: needs it, as the beginning of the line.
        names: what of the extra is needed; nothing named: all of it.

    Raises:
        ExtraError: naming the extra and how it is installed.
    """
    # A folder of a library's name in the current one, as a checkout's mlflow/, is found as well, but has no file.
    found = ((name, importlib.util.find_spec(name)) for name in names or EXTRAS[extra])
    missing = next((name for name, spec in found if spec is None or spec.origin is None), None)
    if missing is not None:
        raise _name_extra(extra, what, missing)


def explain_missing(error: BaseException) -> ExtraError | None:
    """Return the refusal that an import which failed stands for; None if no extra would bring what is missing."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    missing = error.name.partition(".")[0]
    extra = next((extra for extra, names in EXTRAS.items() if missing in names), None)
    return None if extra is None else _name_extra(extra, "this", missing)


def _name_extra(extra: str, what: str, missing: str) -> ExtraError:
    return ExtraError(f"{what} needs {missing}, which is not installed; pip install 'mka-compress[{extra}]' brings it")


def nearest(given: str, allowed: Iterable[str], most: int = 1, cutoff: float = 0.5) -> str:
    """Return ``" (did you mean 'x'?)"`` for the allowed names closest to ``given``, or an empty string."""
    if len(given) > 100:  # no misspelling, and the comparison would take long
        return ""
    matches = difflib.get_close_matches(given, list(allowed), n=most, cutoff=cutoff)
    return f" (did you mean {' or '.join(map(repr, matches))}?)" if matches else ""
