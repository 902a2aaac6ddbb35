"""Options that commands share, and how their values are read."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mka.errors import RecipeError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from mka.model.checkpoint import Checkpoint
    from mka.recipe import ModelSource


Command = TypeVar("Command", bound=Callable[..., Any])
Section = TypeVar("Section", bound="BaseModel")

FILE = click.Path(path_type=Path)
CALIBRATION = Path("data/prepared/calibration.jsonl")
HELDOUT = Path("data/prepared/heldout.jsonl")
TASKS_FOLDER = Path("data/prepared/evaluation")

model_argument = click.argument("model")
output_folder = click.option(
    "--output", type=FILE, required=True, metavar="DIR", help="Folder to write; must not exist."
)


def read_settings(context: click.Context, option: click.Parameter, values: Sequence[str]) -> dict[str, Any]:
    """Read ``key=value`` pairs; values are YAML, so numbers, lists and null are what they look like."""
    import yaml

    settings = {}
    for item in values:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise click.BadParameter(f"{item!r} is not KEY=VALUE, e.g. coordinates=3")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise click.BadParameter(f"{item!r}: the value cannot be read") from None
    return settings


def read_tasks(context: click.Context, option: click.Parameter, values: Sequence[str]) -> dict[str, int | None]:
    """Read ``task``, ``task=items`` or ``task=all``, separated by commas or given several times."""
    tasks: dict[str, int | None] = {}
    for item in (part.strip() for value in values for part in value.split(",")):
        name, separator, limit = item.partition("=")
        if not name or (separator and limit != "all" and not limit.isdecimal()):
            raise click.BadParameter(f"{item!r} is not TASK, TASK=ITEMS or TASK=all, e.g. hellaswag=40")
        tasks[name] = int(limit) if limit.isdecimal() else None
    return tasks


def combine(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Make one decorator of several, shown in the order given."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_DTYPES = click.Choice(["float32", "bfloat16", "float16"])
loading_options = combine(
    click.option("--dtype", type=_DTYPES, help="Precision of forward passes.  [default: float32]"),
    click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Run Python code that comes with the model. Only for models you trust.",
    ),
)
observation_options = combine(
    click.option("--samples", type=int, help="Calibration texts taken, in the file's order.  [default: 256]"),
    click.option("--max-tokens", type=int, help="Tokens kept of each calibration text.  [default: 64]"),
    click.option(
        "--pooling",
        type=click.Choice(["last", "mean"]),
        help="Which hidden state stands for a text: of its last token, or the mean of all.  [default: last]",
    ),
)
target_options = combine(
    click.option("--layers", type=int, metavar="N", help="Target: layers that remain."),
    click.option("--layer-ratio", type=float, metavar="R", help="Target: share of the layers to remove, 0 to 1."),
    click.option(
        "--size-ratio",
        type=float,
        metavar="R",
        help="Target: share of the bytes to remove before quantization, 0 to 1.",
    ),
    click.option("--protect-first", type=int, metavar="N", help="First layers never touched.  [default: 2]"),
    click.option("--protect-last", type=int, metavar="N", help="Last layers never touched.  [default: 1]"),
)
recipe_option = click.option(
    "--recipe", "recipe_file", type=FILE, metavar="FILE", help="A recipe, YAML; recipes/ has one."
)
set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    callback=read_settings,
    help="A setting of the method, may be repeated; `mka methods --json` lists them.",
)
quantize_options = combine(
    click.option(
        "--quantize",
        type=click.Choice(["off", "int8", "int4"]),
        help="Round the linear layers' weights to 8 or 4 bits.  [default: off]",
    ),
    click.option(
        "--group-size",
        type=int,
        metavar="N",
        help="Weights that share one scale; must divide every layer width.  [default: 64]",
    ),
)
alignment_options = combine(
    click.option(
        "--align/--no-align",
        default=None,
        help="Refit merged and later layers to the base's hidden states while merging.  [default: no]",
    ),
    click.option("--align-tokens", type=int, metavar="N", help="Tokens the refit reads.  [default: 32768]"),
    click.option(
        "--alignment-table",
        type=FILE,
        metavar="FILE",
        help="Texts of the refit, JSON lines with `text` and `source`.  [default: data/prepared/alignment.jsonl]",
    ),
)
evaluation_options = combine(
    click.option(
        "--text", type=FILE, help="Held-out texts for perplexity: JSON lines with a `text` field, or a .txt file."
    ),
    click.option(
        "--tasks",
        multiple=True,
        metavar="TASK[=ITEMS]",
        callback=read_tasks,
        help="A benchmark and how many of its items (all, if not said), e.g. hellaswag=40; may be repeated.",
    ),
    click.option(
        "--tasks-folder",
        metavar="DIR|hub",
        help=f"Tables of the benchmarks, or `hub` to download them by name.  [default: {TASKS_FOLDER}]",
    ),
    click.option("--context", type=int, metavar="N", help="Tokens per perplexity window.  [default: 512]"),
    click.option("--tokens", type=int, metavar="N", help="Most held-out tokens predicted per source.  [default: 4096]"),
)


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what was given on the command line; the rest is left to the defaults of the recipe."""
    return {key: value for key, value in values.items() if value is not None and value != {} and value is not False}


def alignment_values(align: bool | None, align_tokens: int | None, alignment_table: Path | None) -> dict[str, Any]:
    """Name the alignment options as the recipe does."""
    values = {"enabled": align, "tokens": align_tokens, "path": alignment_table}
    return {key: value for key, value in values.items() if value is not None}


def evaluation_values(
    text: Path | None,
    tasks: Mapping[str, int | None],
    tasks_folder: str | None,
    context: int | None,
    tokens: int | None,
) -> dict[str, Any]:
    """Name the evaluation options as the recipe does."""
    values = given({"text": text, "tasks": tasks, "context": context, "text_tokens": tokens})
    if tasks_folder is not None:
        values["tasks_folder"] = None if tasks_folder == "hub" else tasks_folder
    return values


def build_section(section: type[Section], values: Mapping[str, Any]) -> Section:
    """Validate options as a section of the recipe.

    Raises:
        RecipeError: naming the option and what is allowed.
    """
    from pydantic import ValidationError

    from mka.sections import explain_validation

    try:
        return section.model_validate(dict(values))
    except ValidationError as error:
        raise RecipeError(explain_validation(error, section, "options")) from None


def find_work() -> Path:
    """Return the work folder: ``MKA_WORK``, or ``data/work`` here."""
    return Path(os.environ.get("MKA_WORK", "data/work"))


def name_source(model: str, dtype: str | None = None, trust_remote_code: bool = False) -> "ModelSource":
    """Read MODEL and how to load it.

    Raises:
        CheckpointError: if it names no model.
    """
    from mka.sources.fetch import parse_model

    return parse_model(model).model_copy(update=given({"dtype": dtype, "trust_remote_code": trust_remote_code}))


def open_model(
    model: str, dtype: str | None = None, trust_remote_code: bool = False
) -> tuple["Checkpoint", "ModelSource"]:
    """Fetch and open MODEL.

    Raises:
        CheckpointError: if it cannot be had, is damaged, inconsistent or unsupported.
    """
    from mka.pipeline.job import fetch_base

    source = name_source(model, dtype, trust_remote_code)
    return fetch_base(source, find_work())[0], source
