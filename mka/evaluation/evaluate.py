"""One checkpoint, measured from disk: every metric asked for, speed, text, and the conditions it was all done under."""

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka.errors import GuardError
from mka.evaluation.metrics import METRICS, Subject, find_metric, list_asked
from mka.evaluation.scores import EvalReport, Score
from mka.evaluation.speed import TIMING, compare_speed, greedy_options

if TYPE_CHECKING:
    from mka.recipe import EvaluationSettings


# Conditions that make two scores of one task something else, and what they were before they were written down.
_ASKED: Mapping[str, Any] = {"chat_template": None, "system_instruction": None, "answered_by": {"model": "hf"}}
_LIBRARIES = ("torch", "transformers", "lm-eval", "compressed-tensors", "datasets", "numpy")


def evaluate_checkpoint(
    folder: str | Path,
    settings: "EvaluationSettings",
    *,
    dtype: str,
    seed: int,
    trust_remote_code: bool = False,
    heldout: Mapping[str, Sequence[str]],
    checkpoint_facts: Mapping[str, Any],
    command: str = "",
    progress: bool = True,
    speed: bool = True,
    base: str | Path | None = None,
) -> EvalReport:
    """Measure a model folder as it would be used: loaded from disk, nothing carried over in memory.

    Args:
        folder: stock model folder, quantized or not.
        settings: tasks, windows, prompts.
        dtype: precision of forward passes.
        seed: of task subsets, few-shot sampling and the tokens that time prefill.
        trust_remote_code: run Python code that comes with the tokenizer.
        heldout: source -> texts.
        checkpoint_facts: path, digest, layers, parameters, bytes; copied into the report.
        command: the command that asked for this, for the record.
        progress: show bars with rates.
        speed: time prefill and decoding too. Two models are compared by `mka.evaluation.speed.compare_speed`, which
            takes turns.
        base: the base's folder, if this is a candidate; loaded only if a metric holds one against the other.

    Raises:
        RecipeError: on unknown tasks, missing tables or too little text.
        CheckpointError: if the folder does not load completely.
        NumericsError: if the model's outputs are not finite.
    """
    from mka.evaluation.catalog import open_catalog
    from mka.model.loading import load_model, load_tokenizer

    catalog = open_catalog(settings)
    catalog.check(catalog.expand(settings.tasks))
    apart: list[Score] = []
    if settings.loads_apart and settings.tasks:
        apart = _answer_apart(Path(folder), settings, dtype, seed, progress)
        if not (heldout or settings.generation or settings.prompts):  # it may not fit where one model of ours does
            tokenizer = load_tokenizer(folder, trust_remote_code)
            conditions = _conditions(None, tokenizer, settings, dtype=dtype, seed=seed, command=command)
            return EvalReport(dict(checkpoint_facts), tuple(apart), {}, {}, conditions)
    asked = list_asked(settings)
    model, tokenizer = load_model(folder, dtype, trust_remote_code)
    beside = None
    if base is not None and not all(metric.of_base for metric in asked):
        beside = load_model(base, dtype, trust_remote_code)[0]
    tasks = {} if settings.loads_apart else settings.tasks
    subject = Subject(model, tokenizer, settings, heldout, tasks, seed, progress, beside)
    scores = [score for metric in asked if metric.of_base or beside is not None for score in metric.run(subject)]
    order = list(METRICS)
    timing = compare_speed({"": model}, new_tokens=settings.new_tokens, seed=seed) if speed else None
    conditions = _conditions(model, tokenizer, settings, dtype=dtype, seed=seed, command=command)
    return EvalReport(
        checkpoint=dict(checkpoint_facts),
        scores=tuple(sorted([*scores, *apart], key=lambda score: order.index(score.metric)) if apart else scores),
        speed=timing.rates[""] if timing else {},
        generations=generate_text(model, tokenizer, settings.prompts, settings.new_tokens),
        conditions=conditions | ({TIMING: timing.conditions} if timing else {}),
    )


def _answer_apart(folder: Path, settings: "EvaluationSettings", dtype: str, seed: int, progress: bool) -> list[Score]:
    """Have tasks answered by one of lm-eval's own model classes, which is gone again afterwards."""
    import gc

    import torch

    from mka.evaluation.task_models import open_model
    from mka.evaluation.tasks import measure_tasks

    answers = open_model(
        settings.model, folder, settings.model_args, dtype=dtype, batch_size=settings.batch_size, seed=seed
    )
    scores = measure_tasks(Subject(None, None, settings, {}, settings.tasks, seed, progress, answers=answers))
    del answers
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return list(scores)


def generate_text(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int) -> dict[str, str]:
    """Continue each prompt greedily, one at a time, by at most ``new_tokens`` tokens; special tokens are left out."""
    import torch

    generations = {}
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            output = model.generate(**inputs, **greedy_options(model, new_tokens))
        generations[prompt] = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return generations


def describe_machine(model: Any) -> dict[str, Any]:
    """Say what a loaded model is measured on and with; of one that is not loaded here, what there is."""
    import torch

    on_gpu = torch.cuda.is_available() if model is None else model.device.type == "cuda"
    elsewhere = "cpu" if model is None else model.device.type
    return {
        "device": torch.cuda.get_device_name(None if model is None else model.device) if on_gpu else elsewhere,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }


def _conditions(
    model: Any, tokenizer: Any, settings: "EvaluationSettings", *, dtype: str, seed: int, command: str
) -> dict[str, Any]:
    from mka.evaluation.task_models import Asked, describe_asked
    from mka.evaluation.tasks import find_longest_prompt

    machine = describe_machine(model)
    versions = machine.pop("versions")
    return {
        "dtype": dtype,
        **machine,
        "context": settings.context,
        "text_tokens": settings.text_tokens,
        "batch_size": settings.batch_size,
        "max_length": find_longest_prompt(model),
        "shots": settings.shots,
        **describe_asked(tokenizer, Asked(settings.chat_template, settings.system_instruction)),
        "answered_by": describe_answers(settings),
        "limits": dict(settings.tasks),
        "new_tokens": settings.new_tokens,
        "seed": seed,
        "versions": versions,
        "command": command,
    }


def describe_answers(settings: "EvaluationSettings") -> dict[str, Any]:
    """Say what answers the items of tasks, with its version where it is another package's."""
    said: dict[str, Any] = {"model": settings.model, **settings.model_args.model_dump(exclude_defaults=True)}
    if settings.model == "vllm":
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            said["version"] = importlib.metadata.version("vllm")
    return said


def pair_scores(base: EvalReport, candidate: EvalReport, role: str = "base") -> list[tuple[Score | None, Score]]:
    """Match the scores of two reports by name and metric, in the base's order.

    Args:
        base: the base's, or of what stands in its place.
        candidate: the candidate's.
        role: what stands there, for the refusal.

    Returns:
        Base and candidate; no base for what is measured of the candidate alone, which comes last.

    Raises:
        GuardError: if one holds a measurement the other lacks.
    """
    for key, former in _ASKED.items():
        if base.conditions.get(key, former) != candidate.conditions.get(key, former):
            raise GuardError(f"{key} differs between {role} and candidate; measure both with the same recipe")
    ours, theirs = ({(s.name, s.metric): s for s in r.scores} for r in (base, candidate))
    alone = {key for key in theirs if key not in ours and not find_metric(key[1]).of_base}
    if differing := sorted((ours.keys() ^ theirs.keys()) - alone):
        name, metric = differing[0]
        which = role if differing[0] in ours else "candidate"
        raise GuardError(f"{metric} on {name!r} was measured of the {which} only; evaluate both on the same settings")
    return [(score, theirs[key]) for key, score in ours.items()] + [(None, s) for k, s in theirs.items() if k in alone]
