"""`mka budget`: how many layers in how many bits, for the bytes there are."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mka.cli.console import examples, reports, typed
from mka.cli.models import find_work
from mka.cli.options import RECIPE, budgets_option, depths_option, device_option
from mka.errors import RecipeError
from mka.store.publishing import make_work
from mka.terminal import Outcome, align, quiet_libraries

if TYPE_CHECKING:
    from mka.pipeline.budget import Offer, Share


@click.command(
    epilog=examples(
        "mka budget recipes/smollm2_135m.yaml --bytes 160MB",
        "mka budget recipes/smollm2_135m.yaml --bytes 160MB --bytes 150MB --layers 30 --layers 26 --layers 23",
    )
)
@click.argument("recipe", type=RECIPE)
@budgets_option("Bytes of all tensors; may be repeated.  [default: what all layers take in 4, 3, 2.5 and 2 bits]")
@depths_option("all, and four fewer ones down to two thirds")
@device_option
@reports
def budget(recipe: Path, budgets: tuple[float, ...], depths: tuple[int, ...]) -> Outcome:
    """Say what bytes buy: fewer layers, fewer bits, or some of both.

    For every number of layers the method of RECIPE plans; what the plan loses is measured on calibration text,
    refitted if the recipe refits, not healed. What bits lose is expected of noise that is measured once on every linear
    layer, less what calibrated rounding makes up for, which is measured once with all layers; bits are shared out
    exactly over the layers that remain. The two are added, in nats per token. Weights are rounded as RECIPE says, by
    gptq or gptaq; where it says neither, by gptaq, since mixed bits need one of them. A number of layers that the
    method cannot reach is marked. Nothing is written but plans into the work folder; `mka frontier` measures models on
    held-out text.
    """
    from mka.bench.moves import choose_rounding
    from mka.kernels import MIXED
    from mka.pipeline.budget import list_budgets, list_depths, propose
    from mka.pipeline.job import prepare
    from mka.pipeline.recipes import load_recipe
    from mka.recipe import QuantizeSettings

    loaded = load_recipe(recipe)
    # No bound here: what each budget buys is worked out below.
    mixed = QuantizeSettings(**choose_rounding(loaded.quantize), scheme=MIXED, bytes=1e15)
    if loaded.transforms:
        raise RecipeError("transforms are not counted by mka budget; take them out of the recipe")
    refit = loaded.alignment.enabled
    # Their texts are not read: a plan is refitted on calibration text.
    unread = {
        "alignment": loaded.alignment.model_copy(update={"enabled": False}),
        "heal": loaded.heal.model_copy(update={"mode": "off"}),
    }
    loaded = loaded.model_copy(update={"quantize": mixed, **unread})
    make_work(find_work())
    with quiet_libraries():
        job = prepare(loaded, find_work(), evaluate=False, command=typed())
        wanted = sorted(set(depths), reverse=True) or list_depths(job)
        if strange := [layers for layers in wanted if not 1 <= layers <= job.base.layers]:
            raise RecipeError(f"{strange[0]} layers: the model has {job.base.layers}; allowed: 1 to {job.base.layers}")
        offers, share = propose(job, find_work() / "stages", wanted, list(budgets) or list_budgets(job), refit)
    document = {"offers": [describe_offer(offer) for offer in offers], "share": vars(share) | {"value": share.value}}
    return Outcome(document, f"{tabulate_offers(offers)}\n{describe_share(share, mixed.rounding)}")


def describe_offer(offer: "Offer") -> dict[str, Any]:
    """Return an offer as JSON types."""
    return vars(offer) | {"total": offer.total}


def describe_share(share: "Share", rounding: str) -> str:
    """Say what calibrated rounding leaves of what is expected, and where that was seen."""
    from mka.outside.sizes import format_size

    return (
        f"bits: {share.value:.2f} of what rounding to the nearest is expected to lose; seen with all layers at "
        f"{format_size(share.nbytes)}: {share.measured:.3f} by {rounding} where {share.expected:.3f} is expected"
    )


def tabulate_offers(offers: "list[Offer]") -> str:
    """Lay out what every budget buys, the best number of layers starred."""
    from mka.outside.sizes import format_size

    rows = []
    for nbytes in dict.fromkeys(offer.nbytes for offer in offers):
        there = [offer for offer in offers if offer.nbytes == nbytes]
        best = min((offer.total for offer in there if offer.total is not None), default=None)
        for place, offer in enumerate(there):
            size = "" if place else format_size(nbytes)
            if offer.total is None or offer.bits is None or offer.depth is None or offer.rounding is None:
                lost, why = ("–", "not reached") if offer.depth is None else (f"{offer.depth:.3f}", offer.refusal)
                rows.append([size, offer.layers, "–", lost, "–", why])
                continue
            total = f"{offer.total:.3f}{' *' if offer.total == best else '  '}"
            rows.append([size, offer.layers, f"{offer.bits:.2f}", f"{offer.depth:.3f}", f"{offer.rounding:.3f}", total])
    head = ["bytes", "layers", "bits", "lost by depth", "by bits", "both"]
    notes = ["nats per token, before healing; bits of the linear layers with their scales; * least of its bytes"]
    unreached = {offer.layers: offer.refusal for offer in offers if offer.depth is None}
    notes += [f"{layers} layers: {why}" for layers, why in unreached.items()]
    return "\n\n".join([align(rows, head, "rrrrrr"), "\n".join(notes)])
