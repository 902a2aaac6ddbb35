"""`mka frontier`: what fewer bits, fewer layers and both leave of a model, at the bytes they take."""

from pathlib import Path

import click

from mka.cli.bench import show_foresight
from mka.cli.console import examples, reports, typed
from mka.cli.models import find_work
from mka.cli.options import FILE, RECIPE, budgets_option, depths_option, device_option
from mka.store.publishing import make_work, write_text
from mka.terminal import Outcome, quiet_libraries, say


@click.command(
    epilog=examples(
        "mka frontier recipes/smollm2_135m.yaml --output frontier --dry-run",
        "mka frontier recipes/smollm2_135m.yaml --layers 26 --bytes 75MB --bytes 85MB --output frontier",
    )
)
@click.argument("recipe", type=RECIPE)
@budgets_option(
    "Bytes of all tensors that bits are mixed for, e.g. 80MB; may be repeated.  [default: two, between 4 and 2 "
    "bits for all layers]"
)
@depths_option("those of the recipe's target")
@click.option("--output", type=FILE, required=True, metavar="DIR", help="Folder of the page; may exist.")
@click.option("--dry-run", is_flag=True, help="Check everything and list the models: stored, or about how long.")
@device_option
@reports
def frontier(recipe: Path, budgets: tuple[float, ...], depths: tuple[int, ...], output: Path, dry_run: bool) -> Outcome:
    """Draw quality against bytes and against time for the moves that RECIPE allows.

    Its base is compared with itself in 8, 4 and 3 bits and in the best mixture of bits for each budget, with fewer
    layers, merged, refitted and healed as the recipe says, and with both in the same bytes. Weights are rounded by its
    gptq or gptaq; where it says neither, by gptaq, since mixed bits need one of them. Every model is measured from disk
    on the recipe's held-out texts, with paired intervals; what something no larger equals is grey. Models are deleted
    once they are measured, and the same command goes on where it was killed. DIR gets frontier.md, its pictures and
    frontier.yaml, the comparison as `mka bench` runs it.
    """
    import yaml

    from mka.bench.moves import lay_out_moves
    from mka.bench.prepare import prepare
    from mka.bench.publish import publish_results
    from mka.bench.run import foresee_bench, run_bench
    from mka.pipeline.job import fetch_base
    from mka.pipeline.recipes import load_recipe

    loaded = load_recipe(recipe)
    if not dry_run:
        make_work(find_work())
    with quiet_libraries():
        base, _ = fetch_base(loaded.model, find_work())
        laid_out = lay_out_moves(loaded, base, budgets, depths, output)
        file = output / "frontier.yaml"
        prepared = prepare(laid_out, find_work(), write=not dry_run, command=typed())
        if dry_run:
            return show_foresight(foresee_bench(prepared, None))
        output.mkdir(parents=True, exist_ok=True)
        write_text(file, yaml.safe_dump(laid_out.model_dump(mode="json", exclude_unset=True), sort_keys=False))
        return publish_results(run_bench(prepared, say=say))
