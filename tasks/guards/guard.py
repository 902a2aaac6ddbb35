"""The guard at a stage's door: hold a table against its expectations, keep the record, stop the flow on a failure.

Everything lies in one checks folder: Great Expectations' own files under ``gx/`` (suites, validation results, Data
Docs) and ``index.html``, one page that needs no network and links to Data Docs.
"""

import fcntl
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka.errors import GuardError, OutputError
from mka.outside.printable import escape_controls
from mka.store.publishing import write_text

if TYPE_CHECKING:
    import pandas as pd


EXAMPLES = 5  # offending values named per expectation
EXAMPLE_CHARACTERS = 100
PAGE = "index.html"
KEPT_RUNS = 5  # validation results kept per suite; Data Docs render all of them at every build
DATA_DOCS = "gx/uncommitted/data_docs/local_site"
# An interval with these ends holds every finite number, and pages call it so.
LARGEST = sys.float_info.max
COLUMN_KEYS = ("column", "column_A", "column_B", "column_list")
# What Great Expectations adds to every expectation, or what decides nothing for a reader.
SILENT_KEYS = (*COLUMN_KEYS, "batch_id", "ignore_row_if", "row_condition", "mostly")

# Great Expectations keeps its current project in a global of the process, and its files are not written atomically.
_ONE_THREAD = threading.Lock()


@dataclass(frozen=True)
class GuardResult:
    """A table that met its expectations.

    Attributes:
        name: name of the suite.
        expectations: number of expectations checked.
        passed: number of them met; the difference is warnings.
        summary: the same with every expectation's outcome, for JSON.
    """

    name: str
    expectations: int
    passed: int
    summary: Mapping[str, Any]

    @property
    def warnings(self) -> tuple[str, ...]:
        """The expectations of severity "warning" that were not met, one line each."""
        return tuple(_explain(check) for check in self.summary["checks"] if check["result"] == "warning")


def import_great_expectations() -> Any:
    """Import Great Expectations, which takes seconds, with its usage statistics off."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "False")
    import great_expectations.expectations

    return great_expectations


def check(
    name: str, table: "pd.DataFrame", expectations: Sequence[Any], checks_folder: Path, run: str | None = None
) -> GuardResult:
    """Hold a table against a suite of expectations and keep the result in the checks folder.

    Args:
        name: name of the suite, "calibration".
        table: the rows.
        expectations: Great Expectations' expectations; those of severity "warning" are reported but stop nothing.
        checks_folder: where results and Data Docs lie; made if it does not exist. Threads and processes take turns.
        run: what the results are filed under, e.g. the flow run's name.

    Raises:
        GuardError: naming each failed expectation, its column and up to five offending values. The page that
            `build_docs` makes is up to date then.
        OutputError: if the folder cannot be written.
    """
    gx = import_great_expectations()
    from great_expectations.core.run_identifier import RunIdentifier

    suite = gx.ExpectationSuite(name=name, expectations=[_fresh(expectation) for expectation in expectations])
    label = re.sub(r"[^\w.-]+", "-", run) if run else None
    with _open_context(checks_folder) as context:
        outcome = context.validation_definitions.add_or_update(
            gx.ValidationDefinition(
                name=name, data=_table_asset(context, name), suite=context.suites.add_or_update(suite)
            )
        ).run(
            batch_parameters={"dataframe": table},
            result_format={"result_format": "SUMMARY", "partial_unexpected_count": EXAMPLES},
            run_id=RunIdentifier(run_name=label),
        )
        checks = _describe(outcome)
        failed = [item for item in checks if item["result"] == "failed"]
        if failed:
            page = _build_docs(context, checks_folder)
    if failed:
        reasons = "; ".join(_explain(item) for item in failed)
        raise GuardError(f"guard '{name}' failed {len(failed)} of {len(checks)}: {reasons} (details: {page})")
    passed = sum(item["result"] == "passed" for item in checks)
    summary = {"name": name, "run": run, "rows": len(table), "expectations": len(checks), "passed": passed}
    return GuardResult(name, len(checks), passed, {**summary, "checks": checks})


def build_docs(checks_folder: Path) -> Path:
    """Build Data Docs of the newest results of every suite, and the page that sums them up.

    Returns:
        The page, ``index.html``; it loads nothing from elsewhere.

    Raises:
        OutputError: if the folder cannot be written.
    """
    with _open_context(checks_folder) as context:
        return _build_docs(context, checks_folder)


@contextmanager
def _open_context(checks_folder: Path) -> Iterator[Any]:
    # The context is read anew each time: another process may have added its suite since.
    gx = import_great_expectations()
    from great_expectations.data_context.types.base import ProgressBarsConfig

    with _ONE_THREAD:
        try:
            checks_folder.mkdir(parents=True, exist_ok=True)
            lock = (checks_folder / ".lock").open("w")
        except OSError as error:
            raise OutputError(f"checks folder {checks_folder} cannot be written: {error.strerror}") from None
        with lock:  # closing the file gives the lock back
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                context = gx.get_context(mode="file", project_root_dir=str(checks_folder))
                context.variables.progress_bars = ProgressBarsConfig(globally=False)
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
                raise OutputError(
                    f"checks folder {checks_folder} cannot be opened ({type(error).__name__}: {reason}); remove it "
                    "and run again"
                ) from None
            yield context


def _table_asset(context: Any, name: str) -> Any:
    try:
        source = context.data_sources.get("tables")
    except KeyError:
        source = context.data_sources.add_pandas("tables")
    asset = source.get_asset(name) if name in source.get_asset_names() else source.add_dataframe_asset(name)
    try:
        return asset.get_batch_definition("whole")
    except KeyError:
        return asset.add_batch_definition_whole_dataframe("whole")


def _fresh(expectation: Any) -> Any:
    # An expectation that was saved carries an id, and saving it in a second suite is refused.
    return expectation.copy(update={"id": None})


def _build_docs(context: Any, checks_folder: Path) -> Path:
    store = context.validation_results_store
    keys = sorted(store.list_keys(), key=lambda key: key.run_id.run_time, reverse=True)
    seen: dict[str, int] = {}
    kept = []
    for key in keys:
        name = key.expectation_suite_identifier.name
        seen[name] = seen.get(name, 0) + 1
        if seen[name] <= KEPT_RUNS:
            kept.append(key)
        else:
            store.remove_key(key)
    if len(kept) < len(keys):
        context.clean_data_docs()
    from tasks.guards.docs import use_escaping_pages

    use_escaping_pages(context)
    context.build_data_docs()
    return _write_page(checks_folder, [_lay_out(key, store.get(key)) for key in kept])


def _lay_out(key: Any, outcome: Any) -> dict[str, Any]:
    checks = sorted(_describe(outcome), key=lambda item: ("failed", "warning", "passed").index(item["result"]))
    path = "/".join(key.to_tuple())
    return {
        "name": key.expectation_suite_identifier.name,
        "run": key.run_id.run_name or "",
        "time": f"{key.run_id.run_time:%Y-%m-%d %H:%M:%S}",
        "page": f"{DATA_DOCS}/validations/{path}.html",
        "anchor": path,
        "checks": checks,
        "failed": sum(item["result"] == "failed" for item in checks),
        "warned": sum(item["result"] == "warning" for item in checks),
    }


def _write_page(checks_folder: Path, validations: list[dict[str, Any]]) -> Path:
    import jinja2

    newest: set[str] = set()
    for validation in validations:
        validation["newest"] = validation["name"] not in newest
        newest.add(validation["name"])
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    template = jinja2.Environment(autoescape=True, loader=loader).get_template("checks.html.j2")
    page = checks_folder / PAGE
    write_text(page, escape_controls(template.render(validations=validations, data_docs=DATA_DOCS), keep="\n\t"))
    return page


def _describe(outcome: Any) -> list[dict[str, Any]]:
    return [_describe_one(item.to_json_dict()) for item in outcome.results]


def _describe_one(item: Mapping[str, Any]) -> dict[str, Any]:
    config, result = item["expectation_config"], item["result"]
    kwargs = config["kwargs"]
    columns = [kwargs[key] for key in COLUMN_KEYS if kwargs.get(key)]
    columns = columns[0] if columns and isinstance(columns[0], list) else columns
    keys = sorted(kwargs.keys() - set(SILENT_KEYS), key=lambda key: ("min" not in key, key))
    ends = {key: kwargs[key] for key in keys if kwargs[key] is not None}
    rule = [f"{key}={value!r}" for key, value in ends.items() if value not in (LARGEST, -LARGEST)]
    rule += ["finite"] if LARGEST in ends.values() else []
    condition = kwargs.get("row_condition")
    if isinstance(condition, Mapping) and "operator" in condition:
        rule.append(f"where {condition['column']['name']} {condition['operator']} {condition.get('parameter')!r}")
    # Severity decides, not the suite's own verdict, which counts failed warnings too.
    refused = "warning" if config.get("severity") == "warning" else "failed"
    return {
        "expectation": config["type"],
        "column": ", ".join(columns),
        "rule": ", ".join(rule),
        "description": config.get("description") or "",
        "result": "passed" if item["success"] else refused,
        "observed": _shorten(result["observed_value"]) if result.get("observed_value") is not None else "",
        "unexpected": "" if item["success"] else _unexpected(result, _exception(item.get("exception_info") or {})),
    }


def _unexpected(result: Mapping[str, Any], exception: str) -> str:
    if exception:
        return exception
    if result.get("unexpected_count") is not None:
        examples = ", ".join(_shorten(value) for value in result.get("partial_unexpected_list", [])[:EXAMPLES])
        rows = result.get("partial_unexpected_index_list", [])[:EXAMPLES]
        where = f" in rows {rows}" if rows else ""
        return f"{result['unexpected_count']} unexpected, e.g. [{examples}]{where}"
    if result.get("partial_missing_list"):
        return f"missing {', '.join(_shorten(value) for value in result['partial_missing_list'][:EXAMPLES])}"
    return f"observed {_shorten(result.get('observed_value'))}"


def _exception(info: Mapping[str, Any]) -> str:
    # Flat for one expectation; keyed by the metric's id where a metric could not be computed (a column is missing).
    infos = [info] if "raised_exception" in info else [value for value in info.values() if isinstance(value, Mapping)]
    messages = [str(entry.get("exception_message")) for entry in infos if entry.get("raised_exception")]
    return " ".join(messages[0].split())[: 2 * EXAMPLE_CHARACTERS] if messages else ""


def _explain(check: Mapping[str, Any]) -> str:
    arguments = ", ".join(part for part in (check["column"], check["rule"]) if part)
    return f"{check['expectation']}({arguments}): {check['unexpected']}"


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= EXAMPLE_CHARACTERS else text[: EXAMPLE_CHARACTERS - 1] + "…"
