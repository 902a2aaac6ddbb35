"""Measuring one checkpoint of a comparison from disk: every metric on every text and task, one stored part each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from mka.bench.parts import Bench, Get, Measured
from mka.bench.recipe import Cell
from mka.evaluation.evaluate import describe_machine
from mka.evaluation.metrics import Metric, Subject, list_asked
from mka.evaluation.scores import read_score
from mka.store.products import Product
from mka.terminal import is_shown


@dataclass
class MeasuredModel:
    """A checkpoint that is loaded from disk when something of it is not stored yet, once for all measurements.

    Attributes:
        bench: the comparison.
        open_folder: called once, before loading; returns the folder.
    """

    bench: Bench
    open_folder: Callable[[], Path]

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """Model and tokenizer, as transformers loads them from the folder."""
        from mka.model.loading import load_model

        source = self.bench.recipe.model
        with self.bench.building:
            return load_model(self.open_folder(), source.dtype, source.trust_remote_code)

    def measure_text(self, metric: Metric, name: str, folder: Path) -> Mapping[str, Any]:
        """Measure one text by one metric; stores facts only."""
        return self._run(metric, {name: self.bench.texts[name]}, {})

    def measure_task(self, metric: Metric, name: str, folder: Path) -> Mapping[str, Any]:
        """Measure one task; stores facts only."""
        model = self.loaded
        with self.bench.building:  # lm-eval seeds and silences the whole process
            return self._run(metric, {}, {name: self.bench.recipe.evaluation.tasks[name]}, model)

    def measure_itself(self, metric: Metric, folder: Path) -> Mapping[str, Any]:
        """Measure what needs no table by one metric; stores facts only."""
        return self._run(metric, {}, {})

    def _run(
        self,
        metric: Metric,
        texts: Mapping[str, Sequence[str]],
        tasks: Mapping[str, int | None],
        loaded: tuple[Any, Any] | None = None,
    ) -> Mapping[str, Any]:
        model, tokenizer = loaded or self.loaded
        recipe = self.bench.recipe
        (score,) = metric.run(Subject(model, tokenizer, recipe.evaluation, texts, tasks, recipe.seed, is_shown()))
        return {"score": asdict(score), "conditions": describe_machine(model)}


def measure(
    bench: Bench,
    cell: Cell | None,
    model: MeasuredModel,
    facts: Mapping[str, Any],
    seconds: Mapping[str, float],
    get: Get,
    *,
    reused: bool,
) -> Measured:
    """Measure one checkpoint on every text; on tasks and generation if its target is one of theirs, the base on all.

    Args:
        bench: the comparison.
        cell: whose checkpoint; None for the base.
        model: the checkpoint.
        facts: of the checkpoint; measurements are stored by its ``digest``.
        seconds: what its earlier stages took.
        get: `Part.produce` or `Part.find`.
        reused: whether all earlier stages were stored.
    """
    recipe, settings = bench.recipe, bench.recipe.evaluation
    whole = cell is None or cell.layers in settings.task_targets
    on = {"texts": bench.texts, "tasks": settings.tasks if whole else (), "own items": ("",) if whole else ()}
    dtype: dict[str, Any] = {"dtype": recipe.model.dtype}
    checkpoint = {"checkpoint": facts["digest"]}
    products: list[tuple[str, Product]] = []
    for metric in list_asked(settings):
        # What is measured wherever there is something to measure has no setting of its own.
        asked = {metric.asked: getattr(settings, metric.asked)} if metric.asked else {}
        for name in on[metric.on]:
            if metric.on == "texts":
                keyed = dtype | {"context": settings.context, "tokens": settings.text_tokens} | asked
                part = bench.part("text", keyed, checkpoint | {"text": bench.digests[f"text {name}"]})
                make: Any = partial(model.measure_text, metric, name)
            elif metric.on == "own items":
                keyed = dtype | {"metric": metric.name, "context": settings.context, "seed": recipe.seed}
                part = bench.part("generation", keyed | asked, checkpoint)
                make = partial(model.measure_itself, metric)
            else:
                limit = settings.tasks[name]
                keyed = dtype | {"task": name, "limit": limit, "shots": settings.shots, "seed": recipe.seed}
                keyed |= settings.model_dump(include={"chat_template", "system_instruction"}, exclude_defaults=True)
                part = bench.part("task", keyed | asked, checkpoint | {"tables": bench.digests[f"task {name}"]})
                make = partial(model.measure_task, metric, name)
            products.append((name, get(part, make)))
    scores = []
    for name, product in products:
        score = read_score(product.facts["score"])
        # Stored by content: the same text may have had another name.
        scores.append(replace(score, name=name) if name else score)
    return Measured(
        cell,
        {(score.name, score.metric): score for score in scores},
        {**seconds, "measure": round(sum(product.seconds for _, product in products), 3)},
        facts,
        tuple(product.facts["conditions"] for _, product in products),
        reused and all(product.reused for _, product in products),
    )
