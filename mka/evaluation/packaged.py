"""lm-eval's own task definitions, read from the installed package; what is not run here is refused, with the reason.

They are read under the same closed list of keys as definitions of one's own. Beside templates they may name functions
of lm-eval's tasks (`!function utils.process_docs`): code that is installed and locked, of which only modules are run
that reach no further, by their imports and calls.
"""

import ast
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mka.errors import RecipeError, require_extra
from mka.evaluation.definitions import Definition, strip_body
from mka.evaluation.task_data import read_hub_data
from mka.evaluation.task_keys import SCORED, SCORED_BY, TaskKeys
from mka.outside.printable import one_line
from mka.outside.reading import quote
from mka.sections import explain_validation

# What modules of lm-eval's functions may import; `datasets` for the methods of what they are handed.
_MODULES = frozenset(
    (
        *("__future__", "abc", "ast", "collections", "copy", "dataclasses", "datasets", "enum", "functools", "hashlib"),
        *("html", "itertools", "json", "logging", "math", "numpy", "operator", "random", "re", "statistics", "string"),
        *("textwrap", "typing", "typing_extensions", "unicodedata"),
    )
)
# Names that fetch, open or run: of Python, and of the modules above.
_BUILTINS = frozenset(("__builtins__", "__import__", "compile", "eval", "exec", "input", "open"))
_FAR = frozenset(
    (
        *("from_file", "from_generator", "fromfile", "load", "load_dataset", "load_dataset_builder", "load_from_disk"),
        *("load_metric", "memmap", "save"),
    )
)
# Keys that lm-eval takes functions for, and what stands there while the rest is held against the closed list.
_CALLED: Mapping[str, Any] = {"doc_to_text": "", "doc_to_choice": ["a", "b"], "doc_to_target": ""}
_WHOLE = ("process_docs", "process_results")
# Where functions may stand that are not called here.
_UNCALLED = ("metric_list", "doc_to_decontamination_query")
# Of lm-eval's own metrics where a definition names none.
_DEFAULT_METRICS: Mapping[str, tuple[str, ...]] = {
    "multiple_choice": ("acc", "acc_norm"),
    "loglikelihood": ("acc",),
    "generate_until": ("exact_match",),
}


class Function(str):
    """What `!function` names: a module's file beside the definition and a name in it, as "FILE.NAME"."""


class NotRunError(Exception):
    """A definition that is not run here; its message is the reason."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads lm-eval's YAML without importing what it names."""


_Loader.add_constructor("!function", lambda loader, node: Function(loader.construct_scalar(node)))


@cache
def find_packaged() -> Path:
    """Return the folder of lm-eval's task definitions.

    Raises:
        ExtraError: if lm-eval is not installed.
    """
    require_extra("eval", "evaluation on tasks")
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "tasks"


@cache
def read_packaged(file: Path) -> Mapping[str, Any]:
    """Read one of lm-eval's YAML files with what it includes; functions are named by their files, and not imported.

    Raises:
        ValueError: if it is none.
        OSError: if it cannot be read.
    """
    try:
        body = yaml.load(file.read_bytes(), _Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    if not isinstance(body, dict):
        raise ValueError("it is no mapping")
    merged: dict[str, Any] = {}
    included = body.pop("include", None) or []
    for name in [included] if isinstance(included, str) else included:
        merged |= read_packaged(Path(os.path.normpath(file.parent / name)))
    return merged | _place_functions(body, file.parent)


def _place_functions(value: Any, folder: Path) -> Any:
    if isinstance(value, Function):
        return Function(os.path.normpath(folder / value))
    if isinstance(value, dict):
        return {key: _place_functions(inner, folder) for key, inner in value.items()}
    return [_place_functions(inner, folder) for inner in value] if isinstance(value, list) else value


def define_packaged(name: str, file: Path, body: Mapping[str, Any], wanted: str | None = None) -> Definition:
    """Hold one of lm-eval's definitions against what is run here.

    Args:
        name: of the task.
        file: its YAML.
        body: what it says, with what a group says of it.
        wanted: name of the filter whose answers are scored; None: the first.

    Raises:
        NotRunError: with the reason, if it is not run here.
    """
    if far := [key for key in ("class", "custom_dataset", "use_prompt") if key in body]:
        raise NotRunError(f"{far[0]} runs code that is no template")
    if body.get("unsafe_code"):
        raise NotRunError("it runs code that the model writes")
    for key, function in _find_functions(body):
        if key.partition(".")[0] not in (*_CALLED, *_WHOLE, *_UNCALLED, "fewshot_config"):
            raise NotRunError(f"{key} is a function, which is not run there")
        if not key.startswith(_UNCALLED):
            check_function(function)
    kind = body.get("output_type") or "generate_until"
    said = dict(body)
    metrics = said.get("metric_list") or [{"metric": metric} for metric in _DEFAULT_METRICS.get(kind, ())]
    said["metric_list"] = [entry for entry in metrics if _is_scored(entry)]
    filters = said.get("filter_list") or []
    chosen = next((entry for entry in filters if entry.get("name") == wanted), filters[0] if filters else None)
    said |= {"filter_list": [chosen]} if chosen else {}
    keys = _validate({key: value for key, value in said.items() if key != "task"} | {"task": name})
    scored = keys.scored
    if not scored and callable_results(body):
        mean = {"aggregation": "mean", "higher_is_better": True}
        scored = [{"metric": m} | mean for m in SCORED if m in [entry["metric"] for entry in said["metric_list"]]]
    if not scored:
        raise NotRunError(f"it is scored by none of {', '.join(SCORED_BY[keys.output_type])}")
    try:
        data = read_hub_data(keys)
    except ValueError as error:
        raise NotRunError(str(error)) from None
    # Beside a score that is a share of items: what the words were worth to the model.
    beside = [entry for entry in metrics if keys.output_type == "loglikelihood" and entry.get("metric") == "perplexity"]
    return Definition(name, file, strip_body(said, keys, [*scored, *beside]), scored[0]["metric"], data=data, own=False)


def callable_results(body: Mapping[str, Any]) -> bool:
    """Whether a function of lm-eval's scores the answers."""
    return isinstance(body.get("process_results"), Function)


def _is_scored(entry: Any) -> bool:
    """Whether an entry of metric_list asks for a mean of one of the metrics that are read here."""
    known = isinstance(entry, dict) and entry.get("metric") in SCORED and not isinstance(entry["metric"], Function)
    return known and not entry.get("hf_evaluate") and entry.get("aggregation", "mean") in ("mean", "nanmean")


def _find_functions(value: Any, place: str = "") -> Iterator[tuple[str, Function]]:
    if isinstance(value, Function):
        yield place, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _find_functions(inner, f"{place}.{key}" if place else str(key))


def _validate(said: Mapping[str, Any]) -> TaskKeys:
    shown = {key: value for key, value in said.items() if key not in _WHOLE}
    shown |= {key: stand_in for key, stand_in in _CALLED.items() if isinstance(shown.get(key), Function)}
    if isinstance(few := shown.get("fewshot_config"), dict):
        shown["fewshot_config"] = {key: value for key, value in few.items() if not isinstance(value, Function)}
    shown.pop("doc_to_decontamination_query", None)
    try:
        return TaskKeys.model_validate(shown)
    except ValidationError as error:
        first = explain_validation(error, TaskKeys, "").removeprefix(": ").partition("; ")[0]
        raise NotRunError(one_line(first, 160)) from None


def check_function(function: Function) -> None:
    """Refuse a function whose module reaches further than what it is handed.

    Raises:
        NotRunError: naming what it reaches for.
    """
    file = _module_of(function)
    if reason := _find_reach(file):
        raise NotRunError(f"its function {function.rpartition('.')[2]} is of a module that {reason}")


def _module_of(function: Function) -> Path:
    return Path(f"{function.rpartition('.')[0]}.py")


@cache
def _find_reach(file: Path) -> str | None:
    """Say what a module of lm-eval's tasks reaches for that it may not; None if nothing."""
    root = find_packaged()
    if not file.is_relative_to(root) or not file.is_file():
        return "is not among lm-eval's tasks"
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return "cannot be read"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [_name_module(node, file)]
        else:
            modules = []
        for module in modules:
            if module.partition(".")[0] == "lm_eval":
                if reason := _find_reach_of_lm_eval(module, file):
                    return reason
            elif module.partition(".")[0] not in _MODULES:
                return f"imports {module}"
        names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        names += [node.attr] if isinstance(node, ast.Attribute) else [node.id] if isinstance(node, ast.Name) else []
        far = _FAR | _BUILTINS if isinstance(node, ast.Name) else _FAR
        if reached := [name for name in names if name in far]:
            return f"uses {reached[0]}"
    return None


def _name_module(node: ast.ImportFrom, file: Path) -> str:
    if not node.level:
        return str(node.module)
    place = file.parents[node.level - 1].relative_to(find_packaged().parents[1])
    return ".".join([*place.parts, *([node.module] if node.module else [])])


def _find_reach_of_lm_eval(module: str, user: Path) -> str | None:
    if module in ("lm_eval.utils", "lm_eval.api.metrics", "lm_eval.api.registry", "lm_eval.api.filter"):
        return None
    file = find_packaged().parents[1] / f"{module.replace('.', '/')}.py"
    if not module.startswith("lm_eval.tasks.") or file == user:
        return f"imports {module}"
    return _find_reach(file)


def import_functions(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return a definition's body with its functions imported."""

    def place(value: Any) -> Any:
        if isinstance(value, Function):
            return _import(value)
        if isinstance(value, dict):
            return {key: place(inner) for key, inner in value.items()}
        return [place(inner) for inner in value] if isinstance(value, list) else value

    return dict(place(dict(body)))


def _import(function: Function) -> Callable[..., Any]:
    module = _module_of(function).relative_to(find_packaged()).with_suffix("")
    found = importlib.import_module(f"lm_eval.tasks.{'.'.join(module.parts)}")
    try:
        return getattr(found, function.rpartition(".")[2])  # type: ignore[no-any-return]
    except AttributeError:
        raise RecipeError(f"lm-eval's {module}.py has no function {quote(function.rpartition('.')[2])}") from None
