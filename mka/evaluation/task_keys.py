"""What a task of one's own may say: lm-eval's keys that are texts, numbers and names, each of the kind it is read as.

Everything else that lm-eval would take leads to code: a function, a class, a metric or a way of generating that is
fetched from a hub and run. The section is closed, so that what a later lm-eval adds is refused, too.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# Work and memory grow with each of them; a person asks for fewer.
MOST_SHOTS, MOST_REPEATS, MOST_NEW_TOKENS = 100, 64, 32_768
# What a task's kind is scored by; the first that a definition asks for is its score.
SCORED_BY: dict[str, tuple[str, ...]] = {
    "multiple_choice": ("acc_norm", "acc", "exact_match"),
    "loglikelihood": ("acc",),
    "generate_until": ("exact_match",),
}
# Of all of them, in the order of preference.
SCORED = SCORED_BY["multiple_choice"]

Count = Annotated[int, Field(ge=0, le=1_000_000)]
Scalar = str | int | float | bool | None


class _Keys(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _Step(_Keys):
    """One step of a filter: what becomes of an answer before it is scored."""

    function: Literal[
        "lowercase",
        "majority_vote",
        "map",
        "multi_choice_regex",
        "regex",
        "remove_whitespace",
        "take_first",
        "take_first_k",
        "uppercase",
    ]
    regex_pattern: str = ""
    group_select: Annotated[int, Field(ge=-1000, le=1000)] = 0
    fallback: str = ""
    ignore_case: bool = False
    ignore_punctuation: bool = False
    regexes_to_ignore: list[str] = []
    mapping_dict: dict[str, str] = {}
    default_value: str | None = None
    k: Annotated[int, Field(ge=1, le=MOST_REPEATS)] = 1


class _Filter(_Keys):
    name: str
    filter: Annotated[list[_Step], Field(min_length=1)]


class _Fewshot(_Keys):
    """How examples differ from the item that is asked."""

    sampler: Literal["default", "first_n"] = "default"
    split: str | None = None
    samples: list[dict[str, Scalar | list[Scalar]]] | None = None
    fewshot_indices: list[Count] | None = None
    doc_to_text: str | None = None
    doc_to_choice: str | list[str] | dict[str, str] | None = None
    doc_to_target: str | Count | list[str] | None = None
    gen_prefix: str | None = None
    fewshot_delimiter: str | None = None
    target_delimiter: str | None = None


class _Generation(_Keys):
    """How an answer is generated; a closed list, because the rest goes to transformers' `generate`, which runs code."""

    until: str | list[str] = []
    max_gen_toks: Annotated[int, Field(ge=1, le=MOST_NEW_TOKENS)] = 256
    do_sample: bool = False
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Count = 0
    num_beams: Annotated[int, Field(ge=1, le=16)] = 1


class _Metric(_Keys):
    """A metric, and how exact_match compares; what else is said is of the mean over items, which is formed here."""

    model_config = ConfigDict(extra="ignore")

    metric: str
    # It fetches code of the metric's name from a hub, or from a folder of that name, and runs it.
    hf_evaluate: Literal[False] = False
    ignore_case: bool = False
    ignore_punctuation: bool = False
    ignore_numbers: bool = False
    regexes_to_ignore: list[str] = []


class _Metadata(_Keys):
    model_config = ConfigDict(extra="ignore")

    version: Annotated[str, Field(max_length=100)] | Count | float | None = None


class TaskKeys(_Keys):
    """A definition's keys; where its data are is looked at by who reads them."""

    task: str
    task_alias: str | None = None
    tag: str | list[str] | None = None
    dataset_path: Any = None
    dataset_name: Any = None
    dataset_kwargs: Any = None
    training_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    fewshot_split: str | None = None
    fewshot_config: _Fewshot = _Fewshot()
    num_fewshot: Annotated[int, Field(ge=0, le=MOST_SHOTS)] | None = None
    output_type: Literal["multiple_choice", "loglikelihood", "generate_until"] = "generate_until"
    description: str = ""
    doc_to_text: str
    doc_to_choice: str | list[str] | dict[str, str] | None = None
    doc_to_target: str | Count | list[str]
    target_delimiter: str = " "
    fewshot_delimiter: str = "\n\n"
    gen_prefix: str | None = None
    generation_kwargs: _Generation = _Generation()
    # One: lm-eval scores every item once by each.
    filter_list: Annotated[list[_Filter], Field(min_length=1, max_length=1)] = []
    metric_list: list[_Metric]
    repeats: Annotated[int, Field(ge=1, le=MOST_REPEATS)] = 1
    should_decontaminate: bool = False
    doc_to_decontamination_query: str | None = None
    metadata: _Metadata = _Metadata()

    @property
    def scored(self) -> list[dict[str, Any]]:
        """Metrics that a score is made of, of those that are asked for; lm-eval would fetch others by their names."""
        asked = {
            entry.metric: entry.model_dump(exclude={"hf_evaluate"}, exclude_unset=True) for entry in self.metric_list
        }
        mean = {"aggregation": "mean", "higher_is_better": True}
        return [asked[name] | mean for name in SCORED_BY[self.output_type] if name in asked]

    @property
    def splits(self) -> set[str]:
        """Splits that are read."""
        named = (self.test_split, self.validation_split, self.training_split, self.fewshot_split)
        return {split for split in (*named, self.fewshot_config.split) if split}
