"""Measuring one checkpoint of a comparison from disk: perplexities and tasks, one stored part each."""

import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from mka.bench.parts import Bench, Get, Measured
from mka.bench.recipe import Cell
from mka.evaluation.scores import Score
from mka.store.products import Product
from mka.terminal import is_shown

LIBRARIES = ("torch", "transformers", "lm-eval", "numpy")


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

    def measure_text(self, name: str, folder: Path) -> Mapping[str, Any]:
        """Measure perplexity of one text; stores facts only."""
        from mka.evaluation.perplexity import measure_perplexity

        settings = self.bench.recipe.evaluation
        score = measure_perplexity(
            *self.loaded,
            self.bench.texts[name],
            name=name,
            context=settings.context,
            max_tokens=settings.text_tokens,
            batch_size=settings.batch_size,
            progress=is_shown(),
        )
        return {"score": asdict(score), "conditions": self.describe_conditions()}

    def measure_task(self, name: str, folder: Path) -> Mapping[str, Any]:
        """Measure one task; stores facts only."""
        from mka.evaluation.evaluate import LONGEST_PROMPT
        from mka.evaluation.tasks import run_tasks

        settings, (model, tokenizer) = self.bench.recipe.evaluation, self.loaded
        positions = getattr(model.config, "max_position_embeddings", None)
        with self.bench.building:  # lm-eval seeds and silences the whole process
            (score,) = run_tasks(
                model,
                tokenizer,
                {name: settings.tasks[name]},
                tasks_folder=settings.tasks_folder,
                shots=settings.shots,
                batch_size=settings.batch_size,
                max_length=min(LONGEST_PROMPT, positions or LONGEST_PROMPT),
                seed=self.bench.recipe.seed,
                progress=is_shown(),
            )
        return {"score": asdict(score), "conditions": self.describe_conditions()}

    def describe_conditions(self) -> dict[str, Any]:
        """Say what a measurement was made on and with."""
        import torch

        device = self.loaded[0].device
        return {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
            "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        }


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
    """Measure one checkpoint on every text, and on the tasks if its target is one of theirs; the base on all.

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
    tasks = settings.tasks if cell is None or cell.layers in settings.task_targets else {}
    dtype: dict[str, Any] = {"dtype": recipe.model.dtype}
    checkpoint = {"checkpoint": facts["digest"]}
    texts: dict[str, Product] = {}
    for name in bench.texts:
        keyed = dtype | {"context": settings.context, "tokens": settings.text_tokens}
        part = bench.part("text", keyed, checkpoint | {"text": bench.digests[f"text {name}"]})
        texts[name] = get(part, partial(model.measure_text, name))
    scored: list[Product] = []
    for name, limit in tasks.items():
        keyed = dtype | {"task": name, "limit": limit, "shots": settings.shots, "seed": recipe.seed}
        part = bench.part("task", keyed, checkpoint | {"tables": bench.digests[f"task {name}"]})
        scored.append(get(part, partial(model.measure_task, name)))
    products = [*texts.values(), *scored]
    return Measured(
        cell,
        # Stored by content: the same text may have had another name.
        {name: replace(read_score(product), name=name) for name, product in texts.items()},
        tuple(map(read_score, scored)),
        {**seconds, "measure": round(sum(product.seconds for product in products), 3)},
        facts,
        tuple(product.facts["conditions"] for product in products),
        reused and all(product.reused for product in products),
    )


def read_score(product: Product) -> Score:
    """Read a stored measurement back."""
    body = dict(product.facts["score"])
    items = tuple(tuple(item) if isinstance(item, list) else item for item in body.pop("items"))
    return Score(**body, items=items)
