"""One checkpoint, measured from disk: perplexity, tasks, speed, text, and the conditions it was all done under."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mka.errors import GuardError
from mka.evaluation.scores import EvalReport, Score
from mka.evaluation.speed import compare_speed, greedy_options

if TYPE_CHECKING:
    from pathlib import Path

    from mka.recipe import EvaluationSettings


LONGEST_PROMPT = 2048
_LIBRARIES = ("torch", "transformers", "lm-eval", "compressed-tensors", "datasets")


def evaluate_checkpoint(
    folder: "str | Path",
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
) -> EvalReport:
    """Measure a model folder as it would be used: loaded from disk, nothing carried over in memory.

    Args:
        folder: stock model folder, quantized or not.
        settings: tasks, windows, prompts.
        dtype: precision of forward passes.
        seed: of task subsets, few-shot sampling and the tokens that time prefill.
        trust_remote_code: run Python code that comes with the model.
        heldout: source -> texts for perplexity.
        checkpoint_facts: path, digest, layers, parameters, bytes; copied into the report.
        command: the command that asked for this, for the record.
        progress: show bars with rates.
        speed: time prefill and decoding too. Two models are compared by `mka.evaluation.speed.compare_speed`, which
            takes turns.

    Raises:
        RecipeError: on unknown tasks, missing tables or too little text.
        CheckpointError: if the folder does not load completely.
        NumericsError: if the model's outputs are not finite.
    """
    from mka.evaluation.perplexity import measure_perplexity
    from mka.evaluation.tasks import check_tasks, run_tasks
    from mka.model.loading import load_model

    check_tasks(settings.tasks)
    model, tokenizer = load_model(folder, dtype, trust_remote_code)
    max_length = min(LONGEST_PROMPT, getattr(model.config, "max_position_embeddings", None) or LONGEST_PROMPT)
    text = tuple(
        measure_perplexity(
            model,
            tokenizer,
            texts,
            name=source,
            context=settings.context,
            max_tokens=settings.text_tokens,
            batch_size=min(settings.batch_size, 4),
            progress=progress,
        )
        for source, texts in heldout.items()
    )
    tasks = run_tasks(
        model,
        tokenizer,
        settings.tasks,
        tasks_folder=settings.tasks_folder,
        shots=settings.shots,
        batch_size=settings.batch_size,
        max_length=max_length,
        seed=seed,
        progress=progress,
    )
    return EvalReport(
        checkpoint=dict(checkpoint_facts),
        text=text,
        tasks=tasks,
        speed=compare_speed({"": model}, new_tokens=settings.new_tokens, seed=seed)[""] if speed else {},
        generations=generate_text(model, tokenizer, settings.prompts, settings.new_tokens),
        conditions=_conditions(model, settings, dtype=dtype, seed=seed, max_length=max_length, command=command),
    )


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


def _conditions(
    model: Any, settings: "EvaluationSettings", *, dtype: str, seed: int, max_length: int, command: str
) -> dict[str, Any]:
    import torch

    on_gpu = model.device.type == "cuda"
    return {
        "dtype": dtype,
        "device": torch.cuda.get_device_name(model.device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "context": settings.context,
        "text_tokens": settings.text_tokens,
        "batch_size": settings.batch_size,
        "max_length": max_length,
        "shots": settings.shots,
        "limits": dict(settings.tasks),
        "new_tokens": settings.new_tokens,
        "seed": seed,
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "command": command,
    }


def report_to_rows(base: EvalReport, candidate: EvalReport) -> list[dict[str, Any]]:
    """Lay base and candidate side by side, perplexities first.

    Returns:
        One row per score: name, metric, base, base_stderr, candidate, candidate_stderr, recovery, n. Recovery is
        candidate / base, or base / candidate where lower is better; None where the divisor is 0.

    Raises:
        GuardError: if the two reports do not hold the same measurements.
    """
    rows = []
    for before, after in pair_scores(base, candidate):
        top, bottom = (after, before) if before.higher_is_better else (before, after)
        rows.append(
            {
                "name": before.name,
                "metric": before.metric,
                "base": before.value,
                "base_stderr": before.stderr,
                "candidate": after.value,
                "candidate_stderr": after.stderr,
                "recovery": top.value / bottom.value if bottom.value else None,
                "n": after.n,
            }
        )
    return rows


def pair_scores(base: EvalReport, candidate: EvalReport) -> list[tuple[Score, Score]]:
    """Match the scores of two reports by name and metric, in the base's order.

    Raises:
        GuardError: if one holds a measurement the other lacks.
    """
    ours, theirs = ({(s.name, s.metric): s for s in (*r.text, *r.tasks)} for r in (base, candidate))
    if alone := sorted(ours.keys() ^ theirs.keys()):
        name, metric = alone[0]
        which = "base" if alone[0] in ours else "candidate"
        raise GuardError(f"{metric} on {name!r} was measured of the {which} only; evaluate both on the same settings")
    return [(score, theirs[key]) for key, score in ours.items()]
