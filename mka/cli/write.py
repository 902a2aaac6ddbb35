"""`mka write`: a table of text that a model writes itself."""

import shutil
from pathlib import Path
from typing import Any

import click

from mka.cli.console import examples, reports
from mka.cli.models import find_work, open_model
from mka.cli.options import FILE, Command, device_option, model_argument, recipe_options
from mka.store.publishing import check_free, make_work, write_file
from mka.terminal import Outcome, align, quiet_libraries


@click.command(cls=Command, epilog=examples("mka write ./smollm2 --tokens 65536 --output own.jsonl"))
@model_argument
@click.option("--tokens", type=int, required=True, metavar="N", help="Tokens to write, at least.")
@recipe_options("seed", "model", help={"seed": "Draws the beginnings and every token.  [default: 0]"})
@click.option("--output", type=FILE, required=True, metavar="FILE", help="Table, JSON lines; must not exist.")
@click.option("--dry-run", is_flag=True, help="Check everything and say what would happen; a remote MODEL is fetched.")
@device_option
@reports
def write(model: str, tokens: int, output: Path, dry_run: bool, asked: dict[str, Any]) -> Outcome:
    """Let MODEL write a calibration table itself.

    For models that may see no other data. Texts of up to 256 tokens are sampled at temperature 1, from a token of the
    vocabulary, from a few common words of several registers, and from BOS where the tokenizer has it; each of these is
    a `source` of the table. Short, unreadable, repetitive and repeated texts are left out. The same MODEL, N and seed
    give the same table on the same machine. In a recipe, or for --calibration and --alignment-table, `base` stands for
    such a table.
    """
    from mka.pipeline.written import as_own_text, read_sources, write_table
    from mka.texts.writing import Wanted

    check_free(output)
    wanted = Wanted(tokens, seed=asked.get("seed", 0))
    if not dry_run:
        make_work(find_work())
    with quiet_libraries():
        base, source = open_model(model, asked)
        if dry_run:
            facts = {"tokens": wanted.tokens, "length": wanted.length, "seed": wanted.seed, "output": str(output)}
            said = f"would write {wanted.tokens:,} tokens in texts of up to {wanted.length} to {output}"
            return Outcome(facts, f"{said}\ndry run: nothing was written")
        made = write_table(base, source, wanted, find_work() / "stages")
    text = as_own_text(made)
    write_file(output, lambda path: shutil.copyfile(text.file, path))
    sources = read_sources(text.file)
    rows = [[name, count] for name, count in sources.items()]
    facts = {"output": str(output), **text.facts, "sources": sources, "seconds": made.seconds}
    rate = text.facts["tokens"] / max(made.seconds, 0.001)
    said = f"{text.describe()}; {'stored before' if made.reused else f'{rate:,.0f} tokens/s'}"
    return Outcome(facts, "\n".join([align(rows, ["source", "texts"], "lr"), "", said, str(output)]))
