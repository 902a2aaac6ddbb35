"""Benchmarks through lm-eval's own task definitions, on the hub's data or on local tables."""

import hashlib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from mka.errors import NumericsError, RecipeError, nearest, require_extra
from mka.evaluation.definitions import read_definitions
from mka.evaluation.metrics import Subject
from mka.evaluation.scores import Score
from mka.evaluation.task_keys import SCORED
from mka.evaluation.task_tables import (
    MMLU,
    MMLU_FOLDER,
    TASKS,
    are_options,
    define_task,
    find_definitions,
    is_built_in,
    override_tables,
)
from mka.outside.printable import describe_error
from mka.outside.reading import quote
from mka.terminal import quiet_lm_eval

LONGEST_PROMPT = 2048


def _definitions() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "tasks"


def list_mmlu() -> list[str]:
    """Return the task names of MMLU's 57 subjects, e.g. "mmlu_anatomy"."""
    return sorted(path.stem for path in (_definitions() / MMLU_FOLDER).glob("mmlu_*.yaml"))


def check_tasks(tasks: Mapping[str, int | None], folder: Path | None = None) -> None:
    """Check names and numbers of items before anything is loaded.

    Args:
        tasks: task -> number of items.
        folder: of the tables, where tasks of one's own are defined.

    Raises:
        RecipeError: on an unknown or doubled task, a definition that is not run here, or fewer than two items (one item
            has no error bar).
        ExtraError: if the extra `eval` is not installed.
    """
    if tasks:
        require_extra("eval", f"task {next(iter(tasks))!r}")
    defined = {} if all(map(is_built_in, tasks)) else read_definitions(folder)
    if shadowing := next(filter(is_built_in, defined), None):
        raise RecipeError(f"task {shadowing!r} is one of lm-eval's own; give the definition in {folder} another name")
    allowed = [*TASKS, MMLU, *defined]
    if MMLU in tasks and (doubled := sorted(set(tasks) & set(list_mmlu()))):
        raise RecipeError(f"task {doubled[0]!r} is part of 'mmlu'; name one of the two")
    for name, limit in tasks.items():
        if name not in allowed and name not in (subjects := list_mmlu()):
            raise RecipeError(
                f"unknown task {name!r}{nearest(name, [*allowed, *subjects])}; allowed: {', '.join(allowed)}, "
                "or one subject of MMLU such as mmlu_anatomy"
            )
        if limit is not None and limit < 2:
            raise RecipeError(f"task {name!r}: {limit} items asked for, at least 2 are needed; null takes all")


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, int | None],
    *,
    tasks_folder: Path | None,
    shots: int = 0,
    batch_size: int = 8,
    max_length: int = 2048,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Score, ...]:
    """Score a model on tasks, all requests in one pass.

    A limited task takes a seeded random subset, the same for every model. MMLU's limit is a total, spread over its
    subjects in proportion to their sizes with at least one item each, and its score is the mean over all items.
    The metric is ``acc_norm`` for HellaSwag, PIQA and ARC, else ``acc``; its standard error is
    ``sqrt(p (1 - p) / (n - 1))``. LAMBADA's ``acc`` is the share of passages whose last word greedy decoding gives, and
    ``extra["perplexity"]`` is exp of the mean negative log-likelihood of these words. lm-eval cuts the beginning of
    prompts longer than ``max_length`` tokens; ``extra["truncated"]`` counts such requests.

    Args:
        model: transformers causal language model in eval mode.
        tokenizer: its tokenizer.
        tasks: task -> number of items, None for all.
        tasks_folder: holds ``TASK.jsonl``, ``TASK.train.jsonl`` (few-shot examples) and ``mmlu/SUBJECT.test.jsonl``
            with ``.dev.jsonl``, in the columns of the hub's data sets, and definitions of one's own with their tables
            (`mka.evaluation.definitions`). None downloads the data sets by name.
        shots: few-shot examples per item.
        batch_size: requests per forward pass.
        max_length: longest prompt in tokens.
        seed: of the subsets and of few-shot sampling.
        progress: show a bar with requests per second.

    Raises:
        RecipeError: on an unknown task, or data that is missing or lacks columns.
        NumericsError: if a log-likelihood is NaN or infinite.
    """
    check_tasks(tasks, tasks_folder)
    if not tasks:
        return ()
    from lm_eval import simple_evaluate

    members = {name: _list_members(name, tasks_folder) for name in tasks}
    with quiet_lm_eval(progress):
        manager, built = _build_tasks([m for names in members.values() for m in names], tasks_folder, shots, seed)
        samples: dict[str, list[int]] = {}
        for name, limit in tasks.items():
            samples |= choose_items({m: len(built[m].eval_docs) for m in members[name]}, limit, seed)
        lm = _wrap_model(model, tokenizer, batch_size, max_length)
        results = simple_evaluate(
            model=lm,
            tasks=list(built.values()),
            task_manager=manager,
            num_fewshot=shots,
            samples=samples,
            bootstrap_iters=0,
            **dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed),
        )
    facts = {"shots": shots, "source": "tables" if tasks_folder else "hub"}
    return tuple(_score(n, members[n], results, lm.truncated, {**facts, "limit": tasks[n]}) for n in tasks)


def measure_tasks(subject: Subject) -> tuple[Score, ...]:
    """Score a model on the tasks it is asked about; refusals are those of `run_tasks`."""
    settings = subject.settings
    return run_tasks(
        subject.model,
        subject.tokenizer,
        subject.tasks,
        tasks_folder=settings.tasks_folder,
        shots=settings.shots,
        batch_size=settings.batch_size,
        max_length=find_longest_prompt(subject.model),
        seed=subject.seed,
        progress=subject.progress,
    )


def find_longest_prompt(model: Any) -> int:
    """Return the most tokens a prompt may have: the model's positions, or 2048 if it has more."""
    return min(LONGEST_PROMPT, getattr(model.config, "max_position_embeddings", None) or LONGEST_PROMPT)


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


def _list_members(name: str, folder: Path | None) -> list[str]:
    """List what a name stands for: the subjects of MMLU, the tasks of a group, or itself."""
    defined = find_definitions(name, folder) if folder is not None else None
    return [task.name for task in defined] if defined else list_mmlu() if name == MMLU else [name]


def _build_tasks(wanted: Sequence[str], folder: Path | None, shots: int, seed: int) -> tuple[Any, dict[str, Any]]:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    own = {name: find_definitions(name, folder) for name in wanted} if folder is not None else {}
    names = [name for name in wanted if not own.get(name)]
    overrides = {name: {} if folder is None else override_tables(name, Path(folder), shots) for name in names}
    needed = sorted({TASKS[name][0] if name in TASKS else MMLU_FOLDER for name in names})
    manager = TaskManager(include_path=[str(_definitions() / path) for path in needed], include_defaults=False)
    # A group, because only members of a group are merged with the definition of the same name.
    group = {"group": "mka", "task": [{"task": name, **overrides[name]} for name in names]}
    try:
        built = manager.load([group])["tasks"] if names else {}
        fields = {name: define_task(found[0]) for name, found in own.items() if found}
        defined = {name: ConfigurableTask(config=config) for name, config in fields.items()}
        for task in defined.values():
            _rehearse(task, shots, seed)
        return manager, built | defined
    except RecipeError:
        raise
    # The hub's client raises from many libraries; a person needs the data set and the reason, in one line.
    except Exception as error:
        if folder is not None:
            raise RecipeError(f"tasks in {folder}: not usable by lm-eval: {describe_error(error)}") from None
        raise RecipeError(
            f"tasks {', '.join(names[:3])}: the hub's data sets cannot be fetched ({describe_error(error)}); go "
            "online, or set evaluation.tasks_folder to local tables (dvc repro builds them)"
        ) from None


def _rehearse(task: Any, shots: int, seed: int) -> None:
    """Have every item asked and scored once, by answers that are made up: a template may fail on the last of them."""
    if task.get_config("num_fewshot") != 0:  # lm-eval lets a definition keep its 0
        task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(seed)
    task.build_all_requests()
    for request in task.instances:
        request.resps = ["" if task.OUTPUT_TYPE == "generate_until" else (-1.0, False)] * request.repeats
    task.apply_filters()
    asked = groupby(sorted(task.instances, key=lambda r: (r.doc_id, r.idx)), key=lambda r: r.doc_id)
    for _, requests in asked:
        answers = list(requests)
        if task.OUTPUT_TYPE == "multiple_choice" and not are_options(made := task.doc_to_choice(answers[0].doc)):
            raise RecipeError(
                f"task {task.task_name!r}: doc_to_choice makes {quote(made)} of item {answers[0].doc_id + 1}; "
                "needed: a list of two or more texts"
            )
        for name in answers[0].filtered_resps:
            task.process_results(answers[0].doc, [request.filtered_resps[name] for request in answers])


def _wrap_model(model: Any, tokenizer: Any, batch_size: int, max_length: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    class Wrapped(HFLM):  # type: ignore[misc, valid-type]
        """lm-eval's wrapper that also counts cut prompts and refuses what is not a number."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.truncated: dict[str, int] = {}

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            for request in requests:
                context, options = request.args
                room = self.max_length - options.get("max_gen_toks", self.max_gen_toks)
                if room <= 0:
                    raise RecipeError(
                        f"task {request.task_name!r}: generation_kwargs.max_gen_toks leaves no room for a question in "
                        f"the {self.max_length} tokens of a prompt and its answer; ask for fewer"
                    )
                if len(self.tok_encode(context)) > room:
                    self.truncated[request.task_name] = self.truncated.get(request.task_name, 0) + 1
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            self.owners = [request.task_name for request in requests]
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
            for owner, (_, context, continuation) in zip(self.owners, requests, strict=True):
                if len(context) + len(continuation) > self.max_length + 1:
                    self.truncated[owner] = self.truncated.get(owner, 0) + 1
            scores = super()._loglikelihood_tokens(requests, **options)
            for owner, (value, _) in zip(self.owners, scores, strict=True):
                if not math.isfinite(value):
                    raise NumericsError(f"task {owner!r}: a log-likelihood is {value}; the model's logits overflow")
            return scores

    return Wrapped(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)


def _score(
    name: str, members: Sequence[str], results: Mapping[str, Any], truncated: Mapping[str, int], facts: dict[str, Any]
) -> Score:
    rows = [row for member in members for row in sorted(results["samples"][member], key=lambda r: r["doc_id"])]
    metric = "acc" if name == MMLU or name.startswith(f"{MMLU}_") else next(m for m in SCORED if m in rows[0])
    if any(row[metric] not in (0, 1) for row in rows):
        raise RecipeError(f"task {name!r}: an item's {metric} is neither 0 nor 1; a score is a share of items")
    items = tuple(int(row[metric]) for row in rows)
    n = len(items)
    if n < 2:
        raise RecipeError(f"task {name!r}: its data holds {n} item, at least 2 are needed")
    value = sum(items) / n
    extra: dict[str, Any] = {
        **facts,
        "task_version": results["versions"].get(members[0]),
        "truncated": sum(truncated.get(member, 0) for member in members),
        "items_digest": hashlib.sha256("".join(row["doc_hash"] for row in rows).encode()).hexdigest(),
    }
    if metric == "acc_norm" and "acc" in rows[0]:
        extra["acc"] = sum(row["acc"] for row in rows) / n
    if name in TASKS and "perplexity" in rows[0]:
        # An item's value is its log-likelihood; lm-eval's aggregation makes the perplexity of it.
        extra["perplexity"] = results["results"][name]["perplexity,none"]
    if name == MMLU:
        extra["per_subject"] = {m.removeprefix(f"{MMLU}_"): len(results["samples"][m]) for m in members}
        extra["limit_rule"] = "total, spread over subjects by size, at least one item each"
    return Score(name, metric, value, math.sqrt(value * (1 - value) / (n - 1)), n, True, items, extra)
