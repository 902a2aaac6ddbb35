"""Tasks of lm-eval's, made from definitions and from where their data are, and asked once before a model is."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from mka.errors import MkaError, RecipeError
from mka.evaluation.catalog import Catalog
from mka.evaluation.definitions import Definition
from mka.evaluation.packaged import import_functions
from mka.evaluation.task_data import load_hub
from mka.evaluation.task_groups import Named
from mka.evaluation.task_tables import are_options, hold_tables, override_tables
from mka.outside.printable import describe_error
from mka.outside.reading import quote
from mka.outside.rendering import TooLongError


def build_tasks(catalog: Catalog, named: Mapping[str, Named], shots: int | None, seed: int) -> dict[str, Any]:
    """Make lm-eval's tasks, with their data; those of one's own are asked and scored once, all items.

    Args:
        catalog: where they are from.
        named: name -> what it stands for.
        shots: few-shot examples per item; None: as each definition says.
        seed: of few-shot sampling.

    Returns:
        Task -> lm-eval's.

    Raises:
        RecipeError: if data are missing, or a definition is not usable on them.
    """
    built = {}
    with naming_the_task(named):
        for task in {task.name: task for found in named.values() for task in found.tasks}.values():
            with blaming(task):
                built[task.name] = _build(catalog, task, shots)
                if task.own:
                    rehearse(built[task.name], shots, seed)
    return built


def _build(catalog: Catalog, task: Definition, shots: int | None) -> Any:
    from lm_eval.api.task import ConfigurableTask

    data = task.data
    if catalog.reads_tables(task):
        assert catalog.folder is not None
        held = override_tables(task.name, catalog.folder, shots)
    elif data is not None:
        held = {"custom_dataset": lambda **_: load_hub(data, task.name)}
    else:
        held = hold_tables(task)
    return ConfigurableTask(config={**import_functions(task.body), "task": task.name, **held})


@contextmanager
def blaming(task: Definition) -> Iterator[None]:
    """Turn what lm-eval raises about a task into a refusal that names it; where it takes too long is told elsewhere.

    Raises:
        RecipeError: in its place.
    """
    try:
        yield
    except (MkaError, TooLongError):
        raise
    # lm-eval raises whatever a template, a function or a library of its data does.
    except Exception as error:
        where = f"tasks in {task.file.parent}" if task.own else f"task {task.name!r}"
        raise RecipeError(f"{where}: not usable by lm-eval: {describe_error(error)}") from None


@contextmanager
def naming_the_task(named: Mapping[str, Named]) -> Iterator[None]:
    """Turn a template or pattern that takes too long into a refusal that names the task and the key it stands at.

    Raises:
        RecipeError: in the place of `TooLongError`.
    """
    try:
        yield
    except TooLongError as error:
        tasks = [task for found in named.values() for task in found.tasks]
        places = ((task, find_text(task.body, error.text)) for task in tasks)
        place = next((f"task {task.name!r}: {key}" for task, key in places if key), f"the template {quote(error.text)}")
        raise RecipeError(f"{place} {error} and is given up; write it without such a loop or pattern") from None


def find_text(value: Any, text: str, key: str = "") -> str | None:
    """Return the dotted key at which a text stands; None if it does not."""
    if isinstance(value, str):
        return key if value == text else None
    if not isinstance(value, dict | list):
        return None
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = (find_text(one, text, f"{key}.{name}" if key else str(name)) for name, one in inner)
    return next((place for place in found if place), None)


def rehearse(task: Any, shots: int | None, seed: int, samples: list[int] | None = None) -> None:
    """Have items asked and scored once, by answers that are made up: a template may fail on the last of them.

    Args:
        task: lm-eval's.
        shots: few-shot examples per item; None: as its definition says.
        seed: of few-shot sampling.
        samples: numbers of the items; None: all.

    Raises:
        RecipeError: if there are no two texts to choose from.
    """
    own = task.get_config("num_fewshot")
    if own != 0:  # lm-eval lets a definition keep its 0
        task.set_config("num_fewshot", (own or 0) if shots is None else shots)
    task.set_fewshot_seed(seed)
    task.build_all_requests(samples=samples)
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
        if callable(task.get_config("process_results")):  # lm-eval's function; of an answer made up it says nothing
            continue
        for name in answers[0].filtered_resps:
            task.process_results(answers[0].doc, [request.filtered_resps[name] for request in answers])
