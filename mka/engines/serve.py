"""A model folder loaded by an engine: its tokens held against transformers', its speed and memory beside the base's."""

import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka.engines import Engine
from mka.engines.agreement import Agreement, compare
from mka.engines.exchange import Answer
from mka.engines.expected import expect_ratios
from mka.engines.loadable import check_loadable, choose_tolerance, make_loadable, name_file_type
from mka.engines.process import Bounds, run_program
from mka.engines.prompts import NEW_TOKENS, PROMPTS
from mka.engines.subject import REPEATS, Conditions, Subject, check_room, count_threads, prepare_subject
from mka.engines.timing import collect_figures
from mka.errors import EngineError, EngineFault, MkaError, RecipeError
from mka.model.checkpoint import Checkpoint, describe_checkpoint
from mka.terminal import say

if TYPE_CHECKING:
    from mka.recipe import EngineCheck

FORMAT = "mka-serve/1"
PASS, FAULT, COULD_NOT = "pass", "fault", "could not"
_REFUSALS = {FAULT: EngineFault, COULD_NOT: EngineError}


@dataclass(frozen=True)
class Served:
    """What an engine made of one model.

    Attributes:
        checkpoint: facts of the folder.
        agreement: with transformers.
        load_seconds: from the files to being able to serve; the least of all rounds.
        kv_bytes: bytes set aside for keys and values.
        kv_bytes_per_token: bytes that one token's take.
        peak_bytes: most bytes resident in the engine's processes.
        speed: concurrency -> figure -> median, least, most, n; see `mka.engines.timing`.
    """

    checkpoint: Mapping[str, Any]
    agreement: Agreement
    load_seconds: float | None
    kv_bytes: int | None
    kv_bytes_per_token: float | None
    peak_bytes: int | None
    speed: Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class ServeReport:
    """Whether an engine serves a model.

    Attributes:
        engine: name; version and device, if it answered.
        verdict: "pass", "fault" or "could not".
        reason: why it is no pass, in one line.
        candidate: what was found of it; None if the engine gave no whole answer.
        base: the same of the base, if there is one.
        conditions: dtype, file types, threads, tokens, rounds, versions, command.
        expected: figure of speed -> candidate / base as what is left of the candidate allows it, see
            `mka.engines.expected`; empty without a base.
    """

    engine: Mapping[str, str]
    verdict: str
    reason: str | None
    candidate: Served | None
    base: Served | None
    conditions: Mapping[str, Any]
    expected: Mapping[str, float] = field(default_factory=dict)

    def refusal(self) -> MkaError | None:
        """Return what decides the exit code: none for a pass, 1 for a fault, 2 for what could not be told."""
        kind = _REFUSALS.get(self.verdict)
        return kind(self.reason) if kind else None

    def to_dict(self) -> dict[str, Any]:
        """Return it in the documented format (docs/engines.md)."""
        return {"format": FORMAT, **asdict(self)}

    def to_json(self) -> str:
        """Serialise it."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


@dataclass
class _Found:
    answers: list[Answer] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)


def check_serving(
    candidate: Checkpoint,
    base: Checkpoint | None,
    engine: Engine,
    settings: "EngineCheck",
    *,
    python: Path,
    work: Path,
    conditions: Conditions,
    file: Path | None = None,
) -> ServeReport:
    """Load a model into an engine, compare its greedy tokens with transformers', and time it beside its base.

    Args:
        candidate: the model.
        base: what it is timed beside, in turns; None: it is timed alone.
        engine: the engine.
        settings: the timing, and what the engine may use.
        python: of the environment that has the engine.
        work: existing folder for what is made on the way; nothing of it stays.
        conditions: how models are loaded.
        file: a file that was made of the candidate already, for an engine that loads one.

    Returns:
        The report. What the engine refuses or does wrong is a "fault"; a death, a hang or a lack of memory is a
        "could not", whose reason is the engine's own.

    Raises:
        RecipeError: if settings do not fit the engine or the model.
        CheckpointError: if the engine's file would say something else of a model.
        MkaError: of loading the model into transformers, and of making the engine's file.
    """
    models = {"candidate": candidate} | ({"base": base} if base is not None else {})
    _check_file(engine, file)
    check_loadable(engine, models, settings.file_type)
    check_room(settings, models)
    types = {r: name_file_type(engine, model, conditions.dtype, settings.file_type) for r, model in models.items()}
    told = _describe(settings, conditions, {role: kind for role, kind in types.items() if kind is not None})
    # Engines run elsewhere, so that what they are told of has to be absolute.
    with tempfile.TemporaryDirectory(dir=work.absolute(), prefix="serve-") as place:
        subjects = []
        for role, checkpoint in models.items():
            folder = Path(place) / role
            folder.mkdir()
            made = file if role == "candidate" else None
            loads = made or make_loadable(engine, checkpoint.path, str(types[role]), folder)
            say(f"transformers: {role}, {NEW_TOKENS} tokens of each of {len(PROMPTS)} prompts")
            subjects.append(prepare_subject(role, models, loads, settings, conditions, folder))
        found = {role: _Found() for role in models}
        for turn in range(settings.rounds):
            # Forth and back, so that a machine whose speed drifts treats both alike.
            for subject in subjects if turn % 2 == 0 else subjects[::-1]:
                say(f"{engine.name}: {subject.role}, round {turn + 1} of {settings.rounds}")
                try:
                    _ask(engine, python, subject, found[subject.role], settings)
                except (EngineFault, EngineError) as error:
                    return _fail(engine, subject.role, error, told)
        expected = _expect(subjects, engine, conditions.dtype, settings.prompt_tokens)
    tolerances = {role: choose_tolerance(conditions.dtype, kind) for role, kind in types.items()}
    served = {s.role: _sum_up(s, found[s.role], tolerances[s.role], settings.prompt_tokens) for s in subjects}
    answer, faults = found["candidate"].answers[0], served["candidate"].agreement.faults
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return ServeReport(
        {"name": engine.name, "version": answer.version, "device": answer.device},
        FAULT if faults else PASS,
        f"{engine.name}: {faults[0]}{more}" if faults else None,
        served["candidate"],
        served.get("base"),
        told,
        expected,
    )


def _expect(subjects: Sequence[Subject], engine: Engine, dtype: str, prompt_tokens: int) -> dict[str, float]:
    models = {subject.role: subject.checkpoint for subject in subjects}
    if "base" not in models:
        return {}
    files = {subject.role: Path(subject.request.model) for subject in subjects} if engine.converts else None
    return expect_ratios(models["base"], models["candidate"], dtype, prompt_tokens, files)


def _check_file(engine: Engine, file: Path | None) -> None:
    if file is not None and not engine.converts:
        raise RecipeError(f"{engine.name} loads the folder and no file that was made of it; leave {file} out")
    if file is not None and not file.is_file():
        raise RecipeError(f"{file}: no such file; give the one that was made of the model, or none")


def _ask(engine: Engine, python: Path, subject: Subject, found: _Found, settings: "EngineCheck") -> None:
    """Run the engine once more; it continues the prompts the first time only."""
    import psutil

    free = psutil.virtual_memory().available
    bounds = Bounds(settings.limit, int(settings.memory * 1e9 if settings.memory else free * 0.9))
    request = replace(subject.request, texts=(), prompts=()) if found.answers else subject.request
    answer, peak = run_program(engine, python, request, Path(request.log).parent, bounds)
    found.answers.append(answer)
    found.peaks += [peak] if peak is not None else []


def _fail(engine: Engine, role: str, error: MkaError, told: Mapping[str, Any]) -> ServeReport:
    """Report an engine that gave no whole answer; what it says of the base tells nothing of the candidate."""
    whose = " (so it was with the base)" if role == "base" else ""
    verdict = FAULT if isinstance(error, EngineFault) and role == "candidate" else COULD_NOT
    return ServeReport({"name": engine.name}, verdict, f"{error}{whose}", None, None, told)


def _sum_up(subject: Subject, found: _Found, tolerance: float, prompt_tokens: int) -> Served:
    first = found.answers[0]
    agreement = compare(subject.references, first.continuations, tolerance, NEW_TOKENS)
    if wrong := _find_misread(subject.texts, first.read):
        agreement = replace(agreement, faults=(wrong, *agreement.faults))
    loads = [answer.load_seconds for answer in found.answers if answer.load_seconds is not None]
    return Served(
        checkpoint=describe_checkpoint(subject.checkpoint),
        agreement=agreement,
        load_seconds=min(loads, default=None),
        kv_bytes=first.kv_bytes,
        kv_bytes_per_token=first.kv_bytes / first.kv_tokens if first.kv_bytes and first.kv_tokens else None,
        peak_bytes=max(found.peaks, default=None),
        speed=collect_figures((run for answer in found.answers for run in answer.runs), prompt_tokens),
    )


def _find_misread(ours: Sequence[Sequence[int]], read: Sequence[Sequence[int]] | None) -> str | None:
    """Say which prompt an engine makes other tokens of, if it tokenizes and one differs."""
    for number, (mine, theirs) in enumerate(zip(ours, read or ()), 1):
        if list(mine) != list(theirs):
            return (
                f"prompt {number} is read as other tokens: {len(theirs)} that begin with {list(theirs)[:4]}, where "
                f"transformers' tokenizer makes {len(mine)} that begin with {list(mine)[:4]}"
            )
    return None


def _describe(settings: "EngineCheck", conditions: Conditions, types: Mapping[str, str]) -> dict[str, Any]:
    asked = settings.model_dump(mode="json", exclude={"engine", "limit", "memory", "file_type"})
    return {
        "dtype": conditions.dtype,
        "file_types": dict(types),
        "threads": count_threads(),
        "cpus": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        **asked,
        "repeats": REPEATS,
        "prompts": len(PROMPTS),
        "compared_tokens": NEW_TOKENS,
        "seed": conditions.seed,
        "versions": {"transformers": importlib.metadata.version("transformers")},
        "command": conditions.command,
    }
