"""The evidence of one run for people: a self-contained HTML page and a model card."""

import base64
import json
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mka.evaluation.metrics import HEADLINE, group_scores
from mka.evaluation.scores import EvalReport
from mka.outside.printable import make_page
from mka.plan.wording import describe_layer, describe_steps
from mka.report.alignment import describe_alignment, draw_errors, layer_rows
from mka.report.caveats import list_caveats
from mka.report.control import describe_control, has_own_control, tell_against_control
from mka.report.data import ReportData
from mka.report.decision import tell_decision, tell_demonstration
from mka.report.healing import describe_healing, draw_curve
from mka.report.hub import describe_for_hub
from mka.report.kernels import list_engines
from mka.report.markup import escape_markdown, fence_markdown, flatten_facts
from mka.report.served import describe_served
from mka.report.sizes import SERVED, find_kind, read_bytes
from mka.report.speeds import describe_rounds, warn_of_others
from mka.report.table import result_table
from mka.report.tradeoff import draw_tradeoff, place_sides
from mka.report.verdict import VERDICTS, describe_check
from mka.similarity.stability import describe_stability
from mka.store.publishing import write_text

INLINE_SVG_BYTES = 300_000
# To see first: layers, size, the headline, and the mean of the tasks or the only one.
TILES = ((r"layers$", 0), (r"size", -1), (HEADLINE.name, 0), (r".*items\)$", -1))


def write_report(data: ReportData, folder: str | Path) -> Path:
    """Write ``report.html``: one page with its style and pictures inside, which loads nothing from anywhere.

    Raises:
        OutputError: if the folder cannot be written.
    """
    from mka.report import pictures

    images = {"plan": _embed(lambda form: pictures.draw_plan(data.plan, form))}
    if (scores := data.scores) is not None:
        title = "What the layers share" if scores.kind == "pairwise-similarity" else "What the layers change"
        seen = (scores.values, data.plan, title, scores.meaning)
        images["scores"] = _embed(lambda form: pictures.draw_similarity(*seen, form))
    if data.alignment and layer_rows(data.alignment):
        images["alignment"] = _embed(lambda form: draw_errors(data.alignment or {}, form))
    if data.healing and data.healing.get("curve"):
        images["healing"] = _embed(lambda form: draw_curve(data.healing or {}, form))
    checks = [check for check in (data.gate or {}).get("checks", ()) if check["recovery"] is not None]
    if checks or data.recoveries:
        images["recovery"] = _embed(lambda form: pictures.draw_recovery(checks, data.recoveries, form))
    if placed := place_sides(data.base, data.candidate, data.control):
        served = find_kind(data.base, data.candidate, data.control) == SERVED
        images["tradeoff"] = _embed(lambda form: draw_tradeoff(placed, served, form))
    path = Path(folder) / "report.html"
    write_text(path, make_page(_render("report.html.j2", data, images=images)))
    return path


def write_card(data: ReportData, folder: str | Path) -> Path:
    """Write ``README.md``, a model card with YAML front matter, beside the weights.

    Raises:
        OutputError: if the folder cannot be written.
    """
    path = Path(folder) / "README.md"
    write_text(path, make_page(_render("card.md.j2", data, header=describe_for_hub(data, name_model(data)) + "\n")))
    return path


def name_model(data: ReportData) -> str:
    """Name the candidate: as its recipe does, or as its base is called."""
    return str(data.recipe.get("name") or data.plan.base.get("model") or "model")


def _render(template: str, data: ReportData, **more: Any) -> str:
    """Fill a template. Every value is escaped for the language of the template unless marked safe in it."""
    import jinja2
    import yaml

    markdown = template.endswith(".md.j2")
    blocks: Any = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    engine = jinja2.Environment(autoescape=not markdown, undefined=jinja2.StrictUndefined, **blocks)
    engine.loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    engine.finalize = escape_markdown if markdown else None
    engine.filters |= {"fenced": fence_markdown, "quoted": json.dumps, "shell": shlex.quote}
    plan, base, candidate = data.plan, data.base, data.candidate
    before, after = (dict(report.generations) if report else {} for report in (base, candidate))
    rows, control = result_table(base, candidate, data.control), data.control
    ratios = {"layer_ratio": plan.layer_ratio}
    kind = find_kind(base, candidate)
    if (size := read_bytes(base, kind)) and (smaller := read_bytes(candidate, kind)):
        ratios["size_ratio"] = 1 - smaller / size
    checks = (data.gate or {}).get("checks", ())
    return engine.get_template(template).render(
        data=data,
        name=name_model(data),
        rows=rows,
        control=describe_control(control) if control and has_own_control(base, control) else None,
        decision=tell_decision(base, candidate, control, data.gate),
        demonstration=tell_demonstration(data.gate),
        against_control=tell_against_control(base, candidate, control),
        speeds=" ".join(filter(None, (describe_rounds(candidate), warn_of_others(candidate)))),
        tiles=[found[at] for name, at in TILES if (found := [row for row in rows if re.match(name, row["quantity"])])],
        ratios=ratios,
        verdict=(data.gate or {}).get("verdict"),
        verdicts=VERDICTS,
        checks=[describe_check(check) for check in checks],
        judged="recovery" if all(check["recovery"] is not None for check in checks) else "recovery or value",
        directions=describe_directions(base, candidate),
        merges=[describe_layer(i, layer) for i, layer in enumerate(plan.layers) if len(layer.sources) > 1],
        steps=describe_steps(plan),
        stability=describe_stability(data.scores) if data.scores else None,
        alignment=describe_alignment(data.alignment) if data.alignment else {},
        aligned_layers=layer_rows(data.alignment) if data.alignment else [],
        healing=describe_healing(data.healing) if data.healing else {},
        rounding=describe_rounded(data.rounding) if data.rounding else {},
        served=[describe_served(*found) for found in data.served.items()],
        texts=[(prompt, before.get(prompt), after.get(prompt)) for prompt in dict.fromkeys([*before, *after])],
        recipe=yaml.safe_dump(json.loads(json.dumps(data.recipe, default=str)), sort_keys=False, allow_unicode=True),
        provenance=flatten_facts(data.provenance),
        conditions=flatten_facts((candidate or base).conditions) if candidate or base else {},  # type: ignore[union-attr]
        caveats=list_caveats(data),
        engines=list_engines(data.recipe),
        folder=(candidate.checkpoint.get("path") if candidate else None) or "path/to/this/folder",
        registered=find_registered(data),
        **more,
    )


def find_registered(data: ReportData) -> dict[str, str] | None:
    """Name the registered model and what finds the very version in it: the candidate's digest, which no run moves."""
    digest = data.candidate.checkpoint.get("digest") if data.candidate else None
    if data.registered is None or digest is None:
        return None
    return {"name": data.registered, "filter": f"name = '{data.registered}' and tags.candidate_digest = '{digest}'"}


def describe_rounded(facts: Mapping[str, Any]) -> dict[str, str]:
    """Say how the candidate's linear layers were rounded, and on what, label -> value."""
    rows = {"linear layers": str(facts["how"])}
    if "tokens" in facts:
        rows["looked at"] = f"{facts['tokens']:,} tokens of calibration text in windows of {facts['context']}"
    if len(facts.get("bits", ())) > 1:
        rows["of their weights"] = ", ".join(f"{scheme} {share:.1%}" for scheme, share in facts["bits"].items())
    if lost := facts.get("lost"):
        expected = f"; {lost['expected']:.3g} expected of rounding to the nearest" if "expected" in lost else ""
        rows["lost by it"] = f"{lost['measured']:.3g} nats per token on {lost['tokens']:,} of those{expected}"
    return rows


def describe_directions(*reports: EvalReport | None) -> dict[str, list[str]]:
    """Say of everything measured which way is good: "less" and "more" -> what."""
    found: dict[str, list[str]] = {"less": [], "more": []}
    for group in group_scores({(s.name, s.metric): s for r in reports if r for s in r.scores}.values()):
        metric = group.metric
        names = [f"{metric.subject} ({metric.unit})", *(e.label.split(",")[0] for e in metric.extras)]
        found["more" if metric.higher_is_better else "less"] += names
    return {way: list(dict.fromkeys(names)) for way, names in found.items()}


def _embed(draw: Callable[[Any], bytes]) -> str:
    """A picture as a data address: SVG, or PNG where the SVG is large."""
    image = draw("svg")
    kind, image = ("svg+xml", image) if len(image) <= INLINE_SVG_BYTES else ("png", draw("png"))
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
