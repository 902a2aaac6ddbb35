"""The metrics, one row each: how it is measured, which way is good, what is resampled, how it is written.

Gate, guard, report, card, registry, index and comparison ask these rows and know no metric by name. Importing this
table imports no model library: what measures a metric is named by a string.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from mka.errors import RecipeError, nearest

if TYPE_CHECKING:
    from mka.evaluation.scores import EvalReport, Score
    from mka.recipe import Measurement

# Fewer than these leave wide error bars; the report says so.
FEW = {"windows": 30, "items": 200}


@dataclass(frozen=True)
class Subject:
    """A loaded model and what it is asked about.

    Attributes:
        model: transformers causal language model in eval mode.
        tokenizer: its tokenizer.
        settings: windows, shots, batches.
        texts: source -> held-out texts.
        tasks: lm-eval task -> number of items, None for all.
        seed: of task subsets and few-shot sampling.
        progress: show bars with rates.
        base: the base's model, for metrics that hold one against the other; else None.
        answers: of lm-eval's, answers tasks in the model's place; None: the model does.
    """

    model: Any
    tokenizer: Any
    settings: "Measurement"
    texts: Mapping[str, Sequence[str]]
    tasks: Mapping[str, int | None]
    seed: int = 0
    progress: bool = True
    base: Any = None
    answers: Any = None


@dataclass(frozen=True)
class Extra:
    """A further figure of the same measurement: its key in ``Score.extra``, its label with ``{name}``, its format."""

    key: str
    label: str
    form: str


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: as scores, recipes and the registry spell it.
        unit: of its value.
        measure: "module:function"; the function takes a `Subject` and returns its scores. Rows that share it are
            measured together.
        asked: key of the recipe's section ``evaluation`` that asks for it; None: measured wherever there is what it is
            measured on.
        on: what it is measured on; "own items": on what the measurement makes itself, so that it needs no table.
        higher_is_better: direction.
        scale: "log": items are logarithms, the value is exp of their mean, and two models compare by
            the difference of means; "linear": the value is the mean, and two models compare by the quotient.
        resampled: what bootstrap resamples draw, and what n counts. "windows": an item is a pair (sum, weight), and a
            mean is the sum of sums over the sum of weights; "items": an item is a number.
        least, most: plausible range of the value; None: open.
        plausible: the range in words.
        pooled: name of the one check over all scores of the rows that share it, each name weighing the same; None: a
            check per name. Rows of one pool are alike in direction, scale and what is resampled.
        of_base: measured of the base beside the candidate; False: of the candidate against the base, so that the
            value is itself a distance and there is no recovery.
        required: key of the recipe's section ``gate`` with the least recovery where it gives no rules; None: such a
            gate does not ask for it.
        label: its row in a table.
        extras: further rows.
    """

    name: str
    unit: str
    measure: str
    on: Literal["texts", "tasks", "own items"]
    higher_is_better: bool
    scale: Literal["linear", "log"]
    resampled: Literal["windows", "items"]
    plausible: str
    least: float | None = None
    most: float | None = None
    asked: str | None = None
    pooled: str | None = None
    of_base: bool = True
    required: str | None = None
    label: str = "{metric}, {name}"
    extras: tuple[Extra, ...] = ()

    @property
    def subject(self) -> str:
        """What gate rules call it: its pool, or its name."""
        return self.pooled or self.name

    @property
    def is_coarse(self) -> bool:
        """Whether single items decide too coarsely to prove that one model is as good as another that is close."""
        return self.resampled == "items"

    def run(self, subject: Subject) -> "tuple[Score, ...]":
        """Measure a model."""
        module, _, function = self.measure.partition(":")
        return tuple(getattr(import_module(module), function)(subject))

    def value(self, mean: Any) -> Any:
        """Turn means of items into values."""
        import numpy as np

        with np.errstate(over="ignore"):
            return np.exp(mean) if self.scale == "log" else mean

    def ratio(self, top: Any, bottom: Any) -> Any:
        """Value of one model over that of another, given the means of their items; NaN where both are 0."""
        import numpy as np

        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            return np.exp(top - bottom) if self.scale == "log" else np.divide(top, bottom)

    def recover(self, base: Any, candidate: Any) -> Any:
        """How much of the base is left, given the means of their items: 1 is as good as the base."""
        return self.ratio(candidate, base) if self.higher_is_better else self.ratio(base, candidate)


_TASK = {
    "unit": "share of items",
    "measure": "mka.evaluation.tasks:measure_tasks",
    "on": "tasks",
    "higher_is_better": True,
    "scale": "linear",
    "resampled": "items",
    "least": 0,
    "most": 1,
    "plausible": "An accuracy is a share.",
    "pooled": "tasks",
    "required": "task_recovery",
    "label": "{name}, {metric}",
}
_GENERATION = {"on": "own items", "resampled": "items", "asked": "generation"}
_ROWS = (
    Metric(
        name="perplexity",
        unit="choices per token",
        measure="mka.evaluation.perplexity:measure_texts",
        on="texts",
        higher_is_better=False,
        scale="log",
        resampled="windows",
        least=1,
        plausible="A perplexity is at least 1.",
        required="perplexity_recovery",
        extras=(Extra("bits_per_byte", "bits per byte, {name}", "{:.3f}"),),
    ),
    *(Metric(name=name, **_TASK) for name in ("acc", "acc_norm", "exact_match")),  # type: ignore[arg-type]
    Metric(
        name="copying",
        unit="share of tokens",
        measure="mka.evaluation.generation:measure_copying",
        higher_is_better=True,
        scale="linear",
        least=0,
        most=1,
        plausible="A share of tokens is a share.",
        **_GENERATION,  # type: ignore[arg-type]
    ),
    Metric(
        name="retrieval",
        unit="share of items",
        measure="mka.evaluation.generation:measure_retrieval",
        higher_is_better=True,
        scale="linear",
        least=0,
        most=1,
        plausible="A share of answers is a share.",
        **_GENERATION,  # type: ignore[arg-type]
    ),
    # Of a share of repeats the base may have none, and no quotient; of how often each is said the least is 1.
    Metric(
        name="repetition",
        unit="times each 4-gram is said",
        measure="mka.evaluation.generation:measure_repetition",
        higher_is_better=False,
        scale="log",
        least=1,
        plausible="What is said is said at least once.",
        extras=(Extra("repeated", "repeated 4-grams, {name}", "{:.3f}"),),
        **_GENERATION,  # type: ignore[arg-type]
    ),
)
METRICS: Mapping[str, Metric] = {row.name: row for row in _ROWS}
# What is seen first where there is room for one: tiles, the index page's plot, the rows in the README.
HEADLINE = _ROWS[0]


@dataclass(frozen=True)
class Fact:
    """A number that is no sample and has no interval: of the checkpoint's files, or a speed.

    Attributes:
        part: of the report, where it stands.
        form: how it is written.
        higher_is_better: direction.
        scale: what it is divided by first.
    """

    part: Literal["checkpoint", "speed"]
    form: str
    higher_is_better: bool
    scale: float = 1.0

    def show(self, value: float) -> str:
        """Write a value with its unit."""
        return self.form.format(value / self.scale)


FACTS: Mapping[str, Fact] = {
    "layers": Fact("checkpoint", "{:,.0f}", False),
    "parameters": Fact("checkpoint", "{:,.1f} M", False, 1e6),
    "bytes": Fact("checkpoint", "{:,.1f} MB", False, 1e6),
    "prefill_tokens_per_second": Fact("speed", "{:,.1f} tokens/s", True),
    "decode_tokens_per_second": Fact("speed", "{:,.1f} tokens/s", True),
}


def read_fact(report: "EvalReport", name: str) -> float | None:
    """Read a fact of a report; None if it is not there."""
    value = getattr(report, FACTS[name].part).get(name)
    return None if value is None else float(value)


def find_metric(name: str) -> Metric:
    """Return a metric's row.

    Raises:
        RecipeError: if there is none.
    """
    if name not in METRICS:
        raise RecipeError(f"unknown metric {name!r}{nearest(name, METRICS)}; metrics: {', '.join(METRICS)}")
    return METRICS[name]


def list_asked(settings: "Measurement") -> list[Metric]:
    """Return what the settings ask for, one row for all that are measured together."""
    found: dict[str, Metric] = {}
    for row in METRICS.values():
        if row.asked is None or getattr(settings, row.asked):
            found.setdefault(row.measure, row)
    return list(found.values())


@dataclass(frozen=True)
class Group:
    """Scores that make one figure against the base: of a metric on one text, or of all tasks.

    Attributes:
        metric: their row; of a pool any.
        on: name of the text, or of the pool.
        keys: name and metric of each score.
    """

    metric: Metric
    on: str
    keys: tuple[tuple[str, str], ...]

    @property
    def check(self) -> str:
        """What the gate's check of it is called."""
        return self.metric.pooled or f"{self.metric.name} {self.on}"

    @property
    def label(self) -> str:
        """What it is called beside others of the same table, where the headline goes without saying."""
        return shorten_check(self.check)


def group_scores(scores: Iterable["Score"]) -> list[Group]:
    """Sort scores into groups: metrics in the table's order, texts as they come.

    Raises:
        RecipeError: if a score's metric has no row.
    """
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for score in scores:
        row = find_metric(score.metric)
        place = (row.pooled, row.pooled) if row.pooled else (row.name, score.name)
        found.setdefault(place, []).append((score.name, score.metric))
    order = list(dict.fromkeys(row.subject for row in METRICS.values()))
    ranked = sorted(found.items(), key=lambda item: order.index(item[0][0]))
    return [Group(find_metric(keys[0][1]), on, tuple(keys)) for (_, on), keys in ranked]


def find_subject(subject: str) -> Metric | None:
    """Return the row of what a gate rule names, of a pool the first; None if there is none."""
    return next((row for row in METRICS.values() if row.subject == subject), None)


def read_check(name: str) -> Metric | None:
    """Return the metric a check's name is of; None for a fact, or a metric that is no longer there."""
    return next((row for row in METRICS.values() if name == row.pooled or name.startswith(f"{row.name} ")), None)


def shorten_check(name: str) -> str:
    """Leave the headline's name out of a check's."""
    return name.removeprefix(f"{HEADLINE.name} ")
