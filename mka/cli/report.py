"""`mka report`: the gate, the page and the card of two measurements."""

from pathlib import Path
from typing import Any

import click

from mka.cli.console import examples, reports, show_results, typed
from mka.cli.options import FILE, recipe_option
from mka.evaluation.reports import read_report
from mka.store.publishing import check_free
from mka.terminal import Outcome


@click.command(epilog=examples("mka report --plan plan.json --base base.json --candidate new.json --output report"))
@click.option("--plan", "plan_file", type=FILE, required=True, metavar="FILE", help="What `mka plan` wrote.")
@click.option("--base", type=FILE, required=True, metavar="FILE", help="Report of `mka evaluate` on the base.")
@click.option("--candidate", type=FILE, required=True, metavar="FILE", help="The same on the candidate.")
@click.option("--control", type=FILE, metavar="FILE", help="The same on the base rounded alike with all layers kept.")
@click.option("--scores", type=FILE, metavar="FILE", help="What `mka score` wrote, for the picture.")
@recipe_option
@click.option("--output", type=FILE, required=True, metavar="DIR", help="Folder to write; must not exist.")
@reports
def report(
    plan_file: Path,
    base: Path,
    candidate: Path,
    control: Path | None,
    scores: Path | None,
    recipe_file: Path | None,
    output: Path,
) -> Outcome:
    """Decide the gate, write report.html and a model card.

    The gate compares the lower 95 % bound of recovery with its threshold: pass, fail (exit code 1) or undecided (3).
    Thresholds are those of the recipe, or the defaults.
    """
    from mka.evaluation.gate import decide, recover_tasks
    from mka.evidence.states import LayerScores
    from mka.pipeline.recipes import load_recipe
    from mka.plan.plan import MergePlan
    from mka.recipe import GateSettings
    from mka.report.control import tell_against_control
    from mka.report.data import ReportData
    from mka.report.decision import tell_decision, tell_demonstration
    from mka.report.page import write_card, write_report
    from mka.report.table import result_table
    from mka.report.verdict import describe_decision, refuse_verdict
    from mka.store.publishing import publish

    check_free(output)
    recipe = load_recipe(recipe_file) if recipe_file else None
    before, after = read_report(base), read_report(candidate)
    thresholds, seed = (recipe.gate, recipe.seed) if recipe else (GateSettings(), 0)
    # Where nothing is done to the weights, the control is the base.
    beside = read_report(control) if control else before if recipe and not recipe.treats_weights else None
    decision = decide(before, after, thresholds, seed=seed, control=beside)
    data = ReportData(
        recipe=recipe.model_dump(mode="json") if recipe else {},
        plan=MergePlan.load(plan_file),
        scores=LayerScores.load(scores) if scores else None,
        base=before,
        candidate=after,
        control=beside,
        gate=decision.to_dict(),
        recoveries=recover_tasks(before, after, seed=decision.seed),
        provenance={"base_model": before.checkpoint.get("path"), "command": typed()},
    )
    with publish(output) as partial:
        write_report(data, partial)
        write_card(data, partial)
    rows, against = result_table(before, after, beside), tell_against_control(before, after, beside)
    document: dict[str, Any] = {"verdict": decision.verdict, "gate": decision.to_dict(), "results": rows}
    first = tell_decision(before, after, beside, decision.to_dict()), tell_demonstration(decision.to_dict())
    document |= {"decision": first[0], "demonstration": first[1] or None}
    document |= {"against_control": against or None, "output": str(output)}
    told = [*([against, ""] if against else []), *describe_decision(decision.to_dict())]
    text = "\n".join([*filter(None, first), "", show_results(rows), "", *told, "", str(output / "report.html")])
    return Outcome(document, text, refuse_verdict(decision.to_dict(), output / "report.html"))
