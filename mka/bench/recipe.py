"""The recipe of a comparison: methods × targets × alignment × healing × rounding, and what they are measured on."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from mka.errors import RecipeError
from mka.pipeline.quantize import describe_rounding
from mka.recipe import (
    LEAST_HEALING,
    AlignmentFit,
    AlignmentSettings,
    CalibrationSettings,
    CalibrationTexts,
    EvaluationSettings,
    HealFit,
    HealSettings,
    Measurement,
    MethodChoice,
    ModelSource,
    QuantizeSettings,
    Recipe,
    Target,
)
from mka.sections import Section, explain_validation, read_yaml

UNROUNDED = QuantizeSettings()


class MethodEntry(Section):
    """One method of the comparison with its settings."""

    name: str
    settings: dict[str, Any] = Field(default_factory=dict)
    label: str | None = Field(None, min_length=1, description="Its row in the tables; default: name and settings")
    alignment: tuple[bool, ...] = Field((False,), min_length=1, description="Measured without, with, or both")
    heal: tuple[int, ...] = Field((0,), min_length=1, description="Tokens healed on, each a row; 0: not healed")
    quantize: tuple[QuantizeSettings, ...] = Field(
        (UNROUNDED,), min_length=1, description="How the result is rounded, each a row; default: not"
    )
    targets: tuple[int, ...] | None = Field(None, description="Layers that remain; default: those of all methods")
    ours: bool = Field(False, description="Compared with the best of those that are not")

    @field_validator("alignment")
    @classmethod
    def _distinct(cls, value: tuple[bool, ...]) -> tuple[bool, ...]:
        if len(set(value)) < len(value):
            raise ValueError("names the same twice; allowed: [false], [true], [false, true]")
        return value

    @field_validator("heal")
    @classmethod
    def _distinct_amounts(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value) or any(tokens and tokens < LEAST_HEALING for tokens in value):
            raise ValueError(f"must be different numbers of tokens from {LEAST_HEALING} on, 0 for a row not healed")
        return value

    @field_validator("quantize")
    @classmethod
    def _distinct_roundings(cls, value: tuple[QuantizeSettings, ...]) -> tuple[QuantizeSettings, ...]:
        if len(set(value)) < len(value):
            raise ValueError("names the same twice")
        return value

    @property
    def row(self) -> str:
        """What this entry is called."""
        if self.label is not None or not self.settings:
            return self.label or self.name
        return f"{self.name} ({', '.join(f'{key}={value}' for key, value in self.settings.items())})"


class TextSource(Section):
    """A text that perplexity is measured on."""

    name: str = Field(min_length=1)
    path: Path = Field(
        description="A .txt file is one text as it is; any other a table, JSON lines with a `text` field"
    )
    source: str | None = Field(None, description="Only the rows of a table with this `source`")
    seen: bool = Field(description="Whether it is of a kind that calibration saw; its texts never are")
    origin: str | None = Field(None, description="Where the file can be had, said when it is not there")

    @model_validator(mode="after")
    def _filter_of_a_table(self) -> Self:
        if self.source is not None and self.path.suffix == ".txt":
            raise ValueError("source filters the rows of a table; a .txt file has none")
        return self


class Conditions(Measurement):
    """How base and candidates are measured, alike."""

    text_tokens: int = Field(8192, ge=64, description="Most tokens predicted per text")
    task_targets: tuple[int, ...] = Field((), description="Targets at which tasks and generation are measured")


class FanOut(Section):
    """Where the sweep flow runs cells. `mka bench` runs them one after the other and makes nothing of this section."""

    engine: Literal["threads", "dask"] = Field(
        "threads", description="'threads' of the flow's process, or worker processes of 'dask', an optional extra"
    )
    workers: int | None = Field(
        None, ge=1, description="Cells at a time: threads, or worker processes on this machine; null: one"
    )
    address: str | None = Field(
        None, description="Dask scheduler whose workers run the cells, e.g. tcp://10.0.0.5:8786; null: processes here"
    )

    @field_validator("address")
    @classmethod
    def _scheduler(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"(tcp|tls)://[^\s/@]+:\d+", value):
            raise ValueError("must be tcp://HOST:PORT or tls://HOST:PORT")
        return value

    @model_validator(mode="after")
    def _of_one_engine(self) -> Self:
        if self.address is not None and self.engine != "dask":
            raise ValueError(f"address names a Dask scheduler and engine is {self.engine!r}; give engine: dask with it")
        if self.address is not None and self.workers is not None:
            raise ValueError("workers and address exclude each other: the scheduler at address has its own workers")
        return self


class BenchRecipe(Section):
    """Everything one comparison needs to know."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    model: ModelSource
    calibration: CalibrationTexts = CalibrationTexts()
    alignment: AlignmentFit = AlignmentFit()
    heal: HealFit = HealFit()
    protect_first: int = Field(2, ge=0, description="Layers at the start that no method touches")
    protect_last: int = Field(1, ge=0, description="Layers at the end that no method touches")
    targets: tuple[int, ...] = Field(min_length=1, description="Layers that remain")
    methods: tuple[MethodEntry, ...] = Field(min_length=1)
    texts: tuple[TextSource, ...] = Field(min_length=1)
    evaluation: Conditions = Conditions()
    resamples: int = Field(10_000, ge=100, description="Bootstrap resamples")
    output: Path | None = Field(None, description="Page written with the results, e.g. docs/benchmarks.md")
    picture: Path | None = Field(None, description="Picture of them, e.g. docs/benchmarks.png")
    seed: int = Field(
        0, ge=0, le=2**32 - 1, description="Draws the items of tasks, the resamples, and what the base writes itself"
    )
    fan_out: FanOut = FanOut()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for what, names in (("texts", [t.name for t in self.texts]), ("methods", [cell.key for cell in self.cells])):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{what}: {twice[0]!r} is there twice; give one of them another name or label")
        tasks, targets = self.evaluation.tasks or self.evaluation.generation, self.evaluation.task_targets
        if bool(tasks) != bool(targets):
            raise ValueError("evaluation: tasks and task_targets go together, and so do generation and task_targets")
        if strange := sorted(set(targets) - {cell.layers for cell in self.cells}):
            raise ValueError(f"evaluation.task_targets: {strange[0]} is the target of no method")
        return self

    @property
    def cells(self) -> tuple["Cell", ...]:
        """Methods in the order given; of each the targets from most layers to fewest, the less repaired first."""
        return tuple(
            Cell(entry, layers, aligned, healed, rounded)
            for entry in self.methods
            for layers in sorted(set(entry.targets or self.targets), reverse=True)
            for aligned in sorted(entry.alignment)
            for healed in sorted(entry.heal)
            for rounded in entry.quantize
        )

    @property
    def rounds(self) -> bool:
        """Whether any cell is rounded."""
        return any(cell.is_rounded for cell in self.cells)

    def recipe_for(self, cell: "Cell") -> Recipe:
        """Return the plain recipe of one cell."""
        return Recipe(
            name=f"{self.name}-{re.sub(r'[^a-z0-9._-]+', '-', cell.key.lower()).strip('-')}",
            model=self.model,
            calibration=CalibrationSettings(**self.calibration.model_dump(), rev=None),
            method=MethodChoice(name=cell.entry.name, settings=cell.entry.settings),
            target=Target(layers=cell.layers, protect_first=self.protect_first, protect_last=self.protect_last),
            alignment=AlignmentSettings(**self.alignment.model_dump(), rev=None, enabled=cell.aligned),
            heal=HealSettings(
                **self.heal.model_dump() | ({"tokens": cell.healed} if cell.healed else {}),
                rev=None,
                mode="distil" if cell.healed else "off",
            ),
            quantize=cell.rounded,
            evaluation=EvaluationSettings(
                **self.evaluation.model_dump(exclude={"task_targets"}), text=None, prompts=()
            ),
            seed=self.seed,
        )


@dataclass(frozen=True)
class Cell:
    """One candidate of the comparison: a method, the layers that remain, with or without repair and rounding."""

    entry: MethodEntry
    layers: int
    aligned: bool
    healed: int = 0
    rounded: QuantizeSettings = UNROUNDED

    @property
    def is_rounded(self) -> bool:
        """Whether its weights are rounded."""
        return self.rounded.scheme != "off"

    @property
    def row(self) -> str:
        """Its row in the tables."""
        healed = f", healed on {self.healed:,} tokens" if self.healed else ""
        rounded = f", {describe_rounding(self.rounded)}" if self.is_rounded else ""
        return self.entry.row + (", aligned" if self.aligned else "") + healed + rounded

    @property
    def key(self) -> str:
        """What no other cell of the recipe is called."""
        return f"{self.row} at {self.layers}"


def load_bench(path: str | Path) -> BenchRecipe:
    """Read the YAML recipe of a comparison.

    Raises:
        RecipeError: if the file cannot be read, or on an unknown key, method or setting, or an impossible value.
    """
    return validate_bench(read_yaml(path, "recipes/bench_smollm2.yaml is one"), str(path))


def validate_bench(raw: Any, where: str = "recipe") -> BenchRecipe:
    """Validate a mapping as the recipe of a comparison; refusals are those of `load_bench`."""
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of keys to values, got {type(raw).__name__}")
    try:
        recipe = BenchRecipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(explain_validation(error, BenchRecipe, where)) from None
    from mka.methods import method_settings

    for entry in recipe.methods:
        method_settings(entry.name, entry.settings, where)
    return recipe
