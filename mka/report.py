"""The evidence of one run for people: a self-contained HTML page, a model card, and the table both share."""

import base64
import contextlib
import html
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mka.alignment_report import describe_alignment, draw_errors, layer_rows
from mka.errors import OutputError
from mka.measurements import EvalReport, Score
from mka.plan import MergePlan
from mka.plan_wording import describe_layer, describe_steps

if TYPE_CHECKING:
    from mka.states import LayerScores

INLINE_SVG_BYTES = 300_000
FEW_WINDOWS, FEW_ITEMS = 30, 200
TILES = ((r"layers$", 0), (r"size$", 0), (r"perplexity", 0), (r".*items\)$", -1))
VERDICTS = {
    "pass": "every lower 95 % bound reaches its threshold",
    "fail": "an upper 95 % bound stays below its threshold",
    "undecided": "a threshold lies between the bounds: more items would decide",
}


@dataclass(frozen=True)
class ReportData:
    """What the page and the card are made of; all but recipe and plan may be absent.

    Attributes:
        recipe: the resolved recipe, JSON-able.
        plan: what was merged.
        scores: what the method saw of the layers.
        base, candidate: their measurements; checkpoint facts alone, with no scores, are enough for a card.
        gate: ``verdict`` and ``checks``, each with name, recovery, lower, upper, threshold, verdict, n.
        recoveries: further recoveries to draw, keys as in a check, without threshold.
        provenance: base_model, revision, digest, license, calibration_digest, calibration_rev, code_commit, versions,
            created, command and whatever else; shown in the order given.
        stages: stage -> seconds.
        registered: address of the registered version, ``models:/NAME@ALIAS``.
        alignment: facts of the refit, as `mka.aligning.Aligner` leaves them.
    """

    recipe: Mapping[str, Any]
    plan: MergePlan
    scores: "LayerScores | None" = None
    base: EvalReport | None = None
    candidate: EvalReport | None = None
    gate: Mapping[str, Any] | None = None
    recoveries: tuple[Mapping[str, Any], ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    stages: Mapping[str, float] = field(default_factory=dict)
    registered: str | None = None
    alignment: Mapping[str, Any] | None = None


def format_value(value: float, stderr: float | None = None) -> str:
    """Format a figure with as many decimals as two digits of its standard error, or four significant digits."""
    if not math.isfinite(value):
        return str(value)
    if stderr is not None and math.isfinite(stderr) and stderr > 0:
        decimals = min(6, max(0, 1 - math.floor(math.log10(stderr))))
        return f"{value:,.{decimals}f} ± {stderr:,.{decimals}f}"
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def result_table(base: EvalReport | None, candidate: EvalReport | None) -> list[dict[str, str]]:
    """Format base and candidate side by side, the one table that terminal, artifact, page and card show.

    Returns:
        rows with keys ``quantity``, ``base``, ``candidate`` and ``ratio`` (candidate / base). ``±`` is one standard
        error; n is in ``quantity``, as ``n = base / candidate`` where they differ. A missing figure is an en dash.
    """
    pair = (base, candidate)
    rows: list[dict[str, str]] = []

    def add(quantity: str, values: list[Any], show: Callable[[Any], str], texts: list[str] | None = None) -> None:
        """Add a row unless neither side has the figure."""
        before, after = values
        if before is None and after is None:
            return
        shown = texts or ["–" if value is None else show(value) for value in values]
        ratio = "–" if not before or after is None else f"{after / before:.3f}"
        rows.append({"quantity": quantity, "base": shown[0], "candidate": shown[1], "ratio": ratio})

    def add_scores(quantity: str, scores: list[Score | None], noun: str) -> None:
        """Add a row of measured scores with error and n."""
        counts = " / ".join(dict.fromkeys(f"{score.n:,}" for score in scores if score))
        texts = ["–" if score is None else format_value(score.value, score.stderr) for score in scores]
        add(f"{quantity} (n = {counts} {noun})", [score and score.value for score in scores], str, texts)

    facts = [report.checkpoint if report else {} for report in pair]
    layers, parameters, size = ([fact.get(key) for fact in facts] for key in ("layers", "parameters", "bytes"))
    add("layers", layers, "{:,}".format)
    add("parameters", parameters, lambda count: f"{count / 1e6:,.1f} M")
    add("size", size, lambda count: f"{count / 1e6:,.1f} MB")
    add("bits per parameter", [b and p and 8 * b / p for b, p in zip(size, parameters)], "{:.1f}".format)
    for name, scores in _matched(pair, "text"):
        add_scores(f"{name[1]}, {name[0]}", scores, "windows")
        bits = [score and score.extra.get("bits_per_byte") for score in scores]
        add(f"bits per byte, {name[0]}", bits, "{:.3f}".format)
    tasks = _matched(pair, "tasks")
    for name, scores in tasks:
        add_scores(f"{name[0]}, {name[1]}", scores, "items")
    # A mean over different sets of tasks would compare nothing.
    shared = [scores for _, scores in tasks if None not in scores]
    if len(shared) > 1:
        add_scores(f"mean of {len(shared)} tasks", [mean_score(side) for side in zip(*shared)], "items")
    for part in ("prefill", "decode"):
        speeds = [report.speed.get(f"{part}_tokens_per_second") if report else None for report in pair]
        add(f"{part} speed", speeds, "{:,.1f} tokens/s".format)
    return rows


def mean_score(scores: Sequence[Score]) -> Score:
    """Unweighted mean of task scores; tasks are independent, so the variances of their errors add."""
    stderr = math.sqrt(sum(score.stderr**2 for score in scores)) / len(scores)
    value = sum(score.value for score in scores) / len(scores)
    return Score("mean", "mean", value, stderr, sum(score.n for score in scores), True)


def _matched(pair: tuple[EvalReport | None, EvalReport | None], part: str) -> list[tuple[tuple[str, str], list[Any]]]:
    """Scores of the same name and metric, base beside candidate."""
    tables = [{(s.name, s.metric): s for s in (getattr(report, part) if report else ())} for report in pair]
    return [(name, [table.get(name) for table in tables]) for name in {**tables[0], **tables[1]}]


def list_caveats(data: ReportData) -> list[str]:
    """State the limits that these figures have, each with its number."""
    notes = []
    measured = data.candidate
    if not measured or not (measured.text or measured.tasks):
        notes.append("Nothing was measured: no statement about quality is made.")
    else:
        for scores, few, noun in ((measured.text, FEW_WINDOWS, "windows"), (measured.tasks, FEW_ITEMS, "items")):
            small = [f"{score.name} ({score.n})" for score in scores if score.n < few]
            if small:
                notes.append(f"Few {noun}, so read the ± before the figure: {', '.join(small)}.")
        if any("mmlu" in score.name for score in measured.tasks):
            notes.append("A model that has lost its language can still pick letters: read MMLU with perplexity.")
        notes.append("Speed was timed on the machine named under conditions; other hardware ranks differently.")
    label = f" ({data.provenance['base_model']})" if data.provenance.get("base_model") else ""
    notes.append(f"The base{label} is measured as it was loaded here; its figures are its own, not published ones.")
    facts = [report.checkpoint for report in (data.base, data.candidate) if report]
    if len(facts) == 2 and all(fact.get("bytes") and fact.get("parameters") for fact in facts):
        before, after = (8 * fact["bytes"] / fact["parameters"] for fact in facts)
        whole, fewer = (1 - facts[1][key] / facts[0][key] for key in ("bytes", "parameters"))
        if abs(before - after) > 0.05 * before:
            told = f"{fewer:.1%} fewer parameters, and {after:.1f} instead of {before:.1f} bits per parameter"
            notes.append(f"The size ratio of {whole:.1%} mixes two things: {told}.")
    return notes


def write_report(data: ReportData, folder: str | Path) -> Path:
    """Write ``report.html``: one page with its style and pictures inside, which loads nothing from anywhere.

    Raises:
        OutputError: if the folder cannot be written.
    """
    from mka import pictures

    images = {"plan": _embed(lambda form: pictures.draw_plan(data.plan, form))}
    if (scores := data.scores) is not None:
        title = "What the layers share" if scores.kind == "pairwise-similarity" else "What the layers change"
        seen = (scores.values, data.plan, title, scores.meaning)
        images["scores"] = _embed(lambda form: pictures.draw_similarity(*seen, form))
    if data.alignment and layer_rows(data.alignment):
        images["alignment"] = _embed(lambda form: draw_errors(data.alignment or {}, form))
    checks = [*(data.gate or {}).get("checks", ())]
    if checks or data.recoveries:
        images["recovery"] = _embed(lambda form: pictures.draw_recovery(checks, data.recoveries, form))
    return _publish(Path(folder) / "report.html", _render("report.html.j2", data, images=images))


def write_card(data: ReportData, folder: str | Path) -> Path:
    """Write ``README.md``, a model card with YAML front matter, beside the weights.

    Raises:
        OutputError: if the folder cannot be written.
    """
    import yaml

    hub = (data.recipe.get("model") or {}).get("hub")
    tags = list(dict.fromkeys(["mka", data.plan.method, "layer-merging", "compression"]))
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "base_model": hub}
    front |= {"license": data.provenance.get("license"), "tags": tags}
    # Hubs refuse a card whose base_model is not a model id; other sources are named in the text.
    header = yaml.safe_dump({key: value for key, value in front.items() if value}, sort_keys=False, allow_unicode=True)
    return _publish(Path(folder) / "README.md", _render("card.md.j2", data, header=header))


def _render(template: str, data: ReportData, **more: Any) -> str:
    """Fill a template. Every value is escaped for the language of the template unless marked safe in it."""
    import jinja2
    import yaml

    markdown = template.endswith(".md.j2")
    blocks: Any = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    engine = jinja2.Environment(autoescape=not markdown, undefined=jinja2.StrictUndefined, **blocks)
    engine.loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    engine.finalize = escape_markdown if markdown else None
    engine.filters |= {"fenced": fence_markdown, "quoted": json.dumps}
    engine.filters["figure"] = lambda value: "–" if value is None else f"{value:.3f}"
    plan, base, candidate = data.plan, data.base, data.candidate
    before, after = (dict(report.generations) if report else {} for report in (base, candidate))
    rows = result_table(base, candidate)
    ratios = {"layer_ratio": plan.layer_ratio}
    if base and candidate and base.checkpoint.get("bytes"):
        ratios["size_ratio"] = 1 - candidate.checkpoint["bytes"] / base.checkpoint["bytes"]
    return engine.get_template(template).render(
        data=data,
        name=data.recipe.get("name") or plan.base.get("model") or "model",
        rows=rows,
        # To see first: layers, size, a perplexity, and the mean of the tasks or the only one.
        tiles=[found[at] for name, at in TILES if (found := [row for row in rows if re.match(name, row["quantity"])])],
        ratios=ratios,
        verdict=(data.gate or {}).get("verdict"),
        verdicts=VERDICTS,
        merges=[describe_layer(i, layer) for i, layer in enumerate(plan.layers) if len(layer.sources) > 1],
        steps=describe_steps(plan),
        alignment=describe_alignment(data.alignment) if data.alignment else {},
        aligned_layers=layer_rows(data.alignment) if data.alignment else [],
        texts=[(prompt, before.get(prompt), after.get(prompt)) for prompt in dict.fromkeys([*before, *after])],
        recipe=yaml.safe_dump(json.loads(json.dumps(data.recipe, default=str)), sort_keys=False, allow_unicode=True),
        provenance=_plain(data.provenance),
        conditions=_plain((candidate or base).conditions) if candidate or base else {},  # type: ignore[union-attr]
        caveats=list_caveats(data),
        folder=(candidate.checkpoint.get("path") if candidate else None) or "path/to/this/folder",
        **more,
    )


def _plain(mapping: Mapping[str, Any]) -> dict[str, str]:
    """Labels and one-line values for a table of facts."""

    def show(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{key} {show(inner)}" for key, inner in value.items())
        return ", ".join(map(show, value)) if isinstance(value, list | tuple) else "–" if value is None else str(value)

    return {str(key).replace("_", " "): show(value) or "–" for key, value in mapping.items()}


def escape_markdown(value: Any) -> Any:
    """Escape a value so that Markdown shows it as text on one line; what is marked safe passes."""
    if hasattr(value, "__html__"):
        return value
    return re.sub(r"([\\`*_|\[\]#])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


def fence_markdown(text: str, language: str = "text") -> Any:
    """Put text into a code block whose fence is longer than any run of backticks inside."""
    from markupsafe import Markup

    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markup(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def _embed(draw: Callable[[Any], bytes]) -> str:
    """A picture as a data address: SVG, or PNG where the SVG is large."""
    image = draw("svg")
    kind, image = ("svg+xml", image) if len(image) <= INLINE_SVG_BYTES else ("png", draw("png"))
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _publish(path: Path, text: str) -> Path:
    """Write aside and rename, so that a reader never sees half a page."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise OutputError(f"cannot write {path}: {error.strerror or error}; choose a writable folder") from None
    return path
