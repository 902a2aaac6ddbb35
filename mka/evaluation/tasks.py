"""Benchmarks through lm-eval's own task definitions, on the hub's data or on local tables."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mka.errors import RecipeError
from mka.evaluation.catalog import Catalog
from mka.evaluation.metrics import Subject
from mka.evaluation.scores import Score
from mka.evaluation.task_building import blaming, build_tasks, naming_the_task, rehearse
from mka.evaluation.task_groups import Named
from mka.evaluation.task_models import Asked, ask_model, wrap_model
from mka.evaluation.task_tables import MMLU, is_built_in
from mka.terminal import quiet_lm_eval

LONGEST_PROMPT = 2048


def check_tasks(tasks: Mapping[str, int | None], folder: Path | None = None, include: Path | None = None) -> None:
    """Check names and numbers of items before anything is loaded; see `mka.evaluation.catalog.Catalog`.

    Args:
        tasks: task -> number of items.
        folder: of the tables, where tasks of one's own are defined.
        include: further definitions of one's own.

    Raises:
        RecipeError: on an unknown or doubled task, a definition that is not run here, or fewer than two items (one item
            has no error bar).
        ExtraError: if the extra `eval` is not installed.
    """
    Catalog(folder, include).check(tasks)


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, int | None],
    *,
    tasks_folder: Path | None,
    include_path: Path | None = None,
    shots: int | None = 0,
    batch_size: int = 8,
    max_length: int = 2048,
    seed: int = 0,
    progress: bool = True,
    asked: Asked | None = None,
) -> tuple[Score, ...]:
    """Score a model on tasks, all requests in one pass.

    A limited task takes a seeded random subset, the same for every model. The limit of a group, MMLU say, is a total,
    spread over its tasks in proportion to their sizes with at least one item each; its score is lm-eval's mean: over
    all items, or over its tasks where the group says that they weigh the same.
    The metric is ``acc_norm`` for HellaSwag, PIQA and ARC, else ``acc``; its standard error is
    ``sqrt(p (1 - p) / (n - 1))``. LAMBADA's ``acc`` is the share of passages whose last word greedy decoding gives, and
    ``extra["perplexity"]`` is exp of the mean negative log-likelihood of these words. lm-eval cuts the beginning of
    prompts longer than ``max_length`` tokens; ``extra["truncated"]`` counts such requests.

    Args:
        model: transformers causal language model in eval mode, or what `mka.evaluation.task_models.open_model` made.
        tokenizer: its tokenizer.
        tasks: task -> number of items, None for all.
        tasks_folder: holds ``TASK.jsonl``, ``TASK.train.jsonl`` (few-shot examples) and ``mmlu/SUBJECT.test.jsonl``
            with ``.dev.jsonl``, in the columns of the hub's data sets, and definitions of one's own with their tables
            (`mka.evaluation.definitions`). None downloads the data sets by name, as those of other tasks.
        include_path: holds further definitions of one's own.
        shots: few-shot examples per item; None: as many as each definition says.
        batch_size: requests per forward pass.
        max_length: longest prompt in tokens.
        seed: of the subsets and of few-shot sampling.
        progress: show a bar with requests per second.
        asked: how it is asked; None: in plain text.

    Raises:
        RecipeError: on an unknown task, data that is missing or lacks columns, or a template that takes too long.
        NumericsError: if a log-likelihood is NaN or infinite.
    """
    catalog = Catalog(tasks_folder, include_path)
    tasks = catalog.expand(tasks)
    catalog.check(tasks)
    if not tasks:
        return ()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    asked = asked or Asked()
    named = {name: catalog.find(name) for name in tasks}
    with quiet_lm_eval(progress) as renderer:
        built = build_tasks(catalog, named, shots, seed)
        samples: dict[str, list[int]] = {}
        for name, limit in tasks.items():
            samples |= choose_items({t.name: len(built[t.name].eval_docs) for t in named[name].tasks}, limit, seed)
        with naming_the_task(named):
            for task in (task for found in named.values() for task in found.tasks):
                if not task.own and not is_built_in(task.name):  # the others were, or are checked column by column
                    with blaming(task):
                        rehearse(built[task.name], shots, seed, samples[task.name])
            lm = wrap_model(model, tokenizer, batch_size, max_length)
            results = simple_evaluate(
                model=lm,
                tasks=list(built.values()),
                task_manager=TaskManager(include_defaults=False),
                num_fewshot=shots,
                samples=samples,
                bootstrap_iters=0,
                **ask_model(lm, asked, renderer),
                **dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed),
            )
    return tuple(
        _score(name, found, results, lm.truncated, {**catalog.describe(name, built), "limit": tasks[name]})
        for name, found in named.items()
    )


def measure_tasks(subject: Subject) -> tuple[Score, ...]:
    """Score a model on the tasks it is asked about; refusals are those of `run_tasks`."""
    settings = subject.settings
    return run_tasks(
        subject.model if subject.answers is None else subject.answers,
        subject.tokenizer,
        subject.tasks,
        tasks_folder=settings.tasks_folder,
        include_path=settings.include_path,
        shots=settings.shots,
        batch_size=settings.batch_size,
        max_length=find_longest_prompt(subject.model),
        seed=subject.seed,
        progress=subject.progress,
        asked=Asked(settings.chat_template, settings.system_instruction),
    )


def choose_items(sizes: Mapping[str, int], limit: int | None, seed: int) -> dict[str, list[int]]:
    """Draw a seeded subset of item numbers from one or several tables.

    Shares are proportional to the tables' sizes (largest remainders), with at least one item from each table.

    Args:
        sizes: table -> number of items.
        limit: items in total; None takes all.
        seed: of the draw; each table's draw depends on the seed, its name and its size only.

    Returns:
        table -> increasing item numbers.
    """
    total = sum(sizes.values())
    if limit is None or limit >= total:
        return {name: list(range(size)) for name, size in sizes.items()}
    exact = {name: limit * size / total for name, size in sizes.items()}
    shares = {name: max(1, math.floor(part)) for name, part in exact.items()}
    for name in sorted(sizes, key=lambda n: (shares[n] - exact[n], n))[: max(0, limit - sum(shares.values()))]:
        shares[name] += 1
    drawn = {}
    for name, size in sizes.items():
        entropy = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8])
        drawn[name] = sorted(np.random.default_rng(entropy).choice(size, shares[name], replace=False).tolist())
    return drawn


def _score(
    name: str, found: Named, results: Mapping[str, Any], truncated: Mapping[str, int], facts: dict[str, Any]
) -> Score:
    members, metric = [task.name for task in found.tasks], found.metric
    rows = [sorted(results["samples"][member], key=lambda row: row["doc_id"]) for member in members]
    every = [row for part in rows for row in part]
    if strange := [row.get(metric) for row in every if row.get(metric) not in (0, 1)]:
        given = "missing" if strange[0] is None else f"neither 0 nor 1 ({strange[0]})"
        raise RecipeError(f"task {name!r}: an item's {metric} is {given}; a score is a share of items")
    n = len(every)
    if n < 2:
        raise RecipeError(f"task {name!r}: its data holds {n} item, at least 2 are needed")
    items: tuple[float, ...] = tuple(int(row[metric]) for row in every)
    value = sum(items) / n
    stderr = math.sqrt(value * (1 - value) / (n - 1))
    if not found.by_size:
        items, value, stderr = _weigh_tasks([[int(row[metric]) for row in part] for part in rows])
    extra: dict[str, Any] = {
        **facts,
        "task_version": results["versions"].get(members[0]),
        "truncated": sum(truncated.get(member, 0) for member in members),
        "items_digest": hashlib.sha256("".join(row["doc_hash"] for row in every).encode()).hexdigest(),
    }
    if metric == "acc_norm" and "acc" in every[0]:
        extra["acc"] = sum(row["acc"] for row in every) / n
    if len(members) == 1 and "perplexity" in every[0]:
        # An item's value is its log-likelihood; lm-eval's aggregation makes the perplexity of it.
        extra["perplexity"] = results["results"][name]["perplexity,none"]
    if len(members) > 1:
        extra["per_subject" if name == MMLU else "per_task"] = {
            member.removeprefix(f"{name}_"): len(part) for member, part in zip(members, rows)
        }
        extra["limit_rule"] = "total, spread over subjects by size, at least one item each"
    return Score(name, metric, value, stderr, n, True, items, extra)


def _weigh_tasks(rows: list[list[int]]) -> tuple[tuple[float, ...], float, float]:
    """Have every task weigh the same, as lm-eval does with `weight_by_size: false`.

    Args:
        rows: task -> 0 or 1 per item.

    Returns:
        Items scaled so that their mean is the mean over tasks, that mean, and its standard error.
    """
    n, means = sum(map(len, rows)), [sum(row) / len(row) for row in rows]
    items = tuple(item * n / (len(rows) * len(row)) for row in rows for item in row)
    spread = sum(mean * (1 - mean) / max(1, len(row) - 1) for mean, row in zip(means, rows))
    return items, sum(means) / len(rows), math.sqrt(spread) / len(rows)


def find_longest_prompt(model: Any) -> int:
    """Return the most tokens a prompt may have: the model's positions, or 2048 if it has more."""
    config = getattr(model, "config", None)
    return min(LONGEST_PROMPT, getattr(config, "max_position_embeddings", None) or LONGEST_PROMPT)
