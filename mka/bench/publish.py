"""What is left of a comparison when it is done: page, picture, rows for another page, and what the command says."""

import os
from pathlib import Path

from mka.bench.page import render_page, update_rows
from mka.bench.results import Results
from mka.bench.statistics import Comparison
from mka.bench.tables import show_comparison, to_document
from mka.outside.printable import make_page
from mka.store.publishing import write_bytes, write_text
from mka.terminal import Outcome


def publish_results(results: Results, shown: Path | None = None) -> Outcome:
    """Write what the recipe asks for and say what was found.

    A page is written only of a comparison of which every cell was run: half of one would mislead.

    Raises:
        OutputError: if a file cannot be written, or the other page has no markers.
    """
    recipe = results.bench.recipe
    comparison = Comparison(results)
    text, document = show_comparison(comparison), to_document(comparison)
    written: list[Path] = []
    if not results.missing:
        if recipe.picture is not None:
            from mka.bench.picture import draw_comparison, draw_frontiers

            write_bytes(recipe.picture, draw_comparison(comparison))
            written.append(recipe.picture)
            if recipe.rounds:
                written.append(recipe.picture.with_stem(f"{recipe.picture.stem}-bytes"))
                write_bytes(written[-1], draw_frontiers(comparison))
        if recipe.output is not None:
            links: list[str | None] = [os.path.relpath(picture, recipe.output.parent) for picture in written]
            write_text(recipe.output, make_page(render_page(comparison, *(links or [None]))))
            written.append(recipe.output)
        if shown is not None:
            update_rows(shown, comparison)
            written.append(shown)
    document["written"] = [str(path) for path in written]
    return Outcome(document, "\n\n".join([text, *map(str, written)]), results.refusal)
