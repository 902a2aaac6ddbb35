import html
import io
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from mka.errors import OutputError, PlanError
from mka.evaluation.scores import EvalReport, Score
from mka.evidence.states import LayerScores, Stability
from mka.plan.plan import MergedLayer, MergePlan, Step, identity_layers, keep_layers, take_layers
from mka.plan.wording import describe_layer, describe_steps, label_sources
from mka.report.caveats import list_caveats
from mka.report.data import ReportData
from mka.report.page import write_card, write_report
from mka.report.pictures import draw_plan, draw_recovery, draw_similarity
from mka.report.table import format_value, result_table
from mka.similarity.stability import describe_stability

ATTACK = '<script>alert(1)</script><img src="http://evil.example/x.png">'
CHECKS = [
    {"name": "perplexity boolq", "recovery": 0.8, "lower": 0.75, "upper": 0.85, "threshold": 0.5, "verdict": "pass"},
    {
        "name": "tasks",
        "recovery": 0.91,
        "lower": 0.86,
        "upper": None,
        "threshold": 0.9,
        "verdict": "undecided",
        "n": 50,
    },
]


def merge_plan() -> MergePlan:
    """30 -> 24: one pair, two triples, and one pair of which only the left is kept."""
    groups = {12: (0.62, 0.38), 17: (0.5, 0.3, 0.2), 22: (1.0, 0.0), 25: (0.5, 0.25, 0.25)}
    layers, source = [], 0
    while source < 30:
        weights = groups.get(source, (1.0,))
        layers.append(MergedLayer(tuple(range(source, source + len(weights))), weights))
        source += len(weights)
    return MergePlan("mka", "merged", 30, tuple(layers), (Step((25, 26), (27,), 0.912, 0.75),))


def deletion_plan(layers: int = 30) -> MergePlan:
    gone = (layers - 4, layers - 6)
    kept = keep_layers([i for i in range(layers) if i not in gone])
    return MergePlan("shortgpt", "deleted", layers, kept, tuple(Step((i,), (), 0.031, 0.0) for i in gone))


def evaluation(layers: int, parameters: int, size: int, perplexity: float, tasks: dict[str, float]) -> EvalReport:
    return EvalReport(
        checkpoint={
            "path": "/models/x",
            "digest": "d1gest",
            "layers": layers,
            "parameters": parameters,
            "bytes": size,
            "dtype": "float32",
        },
        scores=(
            Score("boolq", "perplexity", perplexity, 0.514, 8, False, extra={"bits_per_byte": 0.9312}),
            *(Score(name, "acc", value, 0.03, 50, True) for name, value in tasks.items()),
        ),
        speed={"prefill_tokens_per_second": 240.0, "decode_tokens_per_second": 21.44},
        generations={"Say | it": f"so {ATTACK}", "```": "a ```` b"},
        conditions={"dtype": "float32", "threads": 2, "versions": {"torch": "2.13.0"}},
    )


BASE = evaluation(30, 100_000_000, 400_000_000, 16.4183, {"piqa": 0.6, "arc_easy": 0.5})
CANDIDATE = evaluation(24, 80_000_000, 80_000_000, 20.523, {"piqa": 0.54, "arc_easy": 0.46})


def report_data(**changes: object) -> ReportData:
    values = np.random.default_rng(0).uniform(0.1, 0.9, (30, 30))
    values = np.maximum((values + values.T) / 2, np.eye(30))
    fields: dict = {
        "recipe": {"name": "tiny", "model": {"package": "a==1"}, "target": {"layers": 24}},
        "plan": merge_plan(),
        "scores": LayerScores("pairwise-similarity", values, "NPIB similarity (1: same, 0: independent)", "mka", {}),
        "base": BASE,
        "candidate": CANDIDATE,
        "gate": {"verdict": "undecided", "checks": [{"n": 8, **check} for check in CHECKS]},
        "provenance": {"base_model": "a==1", "license": "apache-2.0", "code_commit": "abc123"},
        "stages": {"observe": 12.34},
        "registered": "tiny",
    }
    return ReportData(**{**fields, **changes})


class Page(HTMLParser):
    """Collects what a browser would load, the tags it would build, and the text it would show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads, self.links, self.ids = [], [], set()
        self.shown = ""
        self.feed(text)
        self.text = " ".join(self.shown.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        self.ids.add(given.get("id"))
        if tag == "a":
            self.links.append(given.pop("href"))
        loading = {"src", "srcset", "data", "action", "poster", "background", "href"}
        self.loads += [given[name] for name in loading & given.keys()]

    def handle_data(self, data: str) -> None:
        self.shown += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_report(report_data(), tmp_path_factory.mktemp("report")).read_text(encoding="utf-8"))


def test_page_loads_nothing_and_its_links_lead_somewhere(page: Page) -> None:
    assert len(page.loads) == 4 and all(str(load).startswith("data:image/") for load in page.loads)
    assert page.links and {str(link).removeprefix("#") for link in page.links} <= page.ids
    assert "@import" not in page.text and "url(" not in page.text


def test_page_escapes_generated_markup(page: Page) -> None:
    assert "script" not in page.tags
    assert page.text.count(ATTACK) == 2  # base and candidate, as text


def test_page_shows_the_numbers(page: Page) -> None:
    for number in ("16.42 ± 0.51", "20.52 ± 0.51", "1.250", "0.931", "0.750 to 0.850", "≥ 0.900", "undecided"):
        assert number in page.text
    assert "output layer 12 = 0.62 × source layer 12 + 0.38 × source layer 13" in page.text
    assert "nothing is left: 23" in page.text and "0.860 to open" in page.text
    assert "layers 25+26 and layer 27 became one (similarity 0.912; weights 0.75 and 0.25)" in page.text
    # What an alias names moves; what has this digest does not.
    assert "name = 'tiny' and tags.candidate_digest = 'd1gest'" in page.text and "@candidate" not in page.text
    for command in ("mka status tiny", "mka promote tiny --version V --because", "mka rollback tiny --because"):
        assert command in page.text
    assert "Size ratio (1 − bytes out / bytes in): 80.0 %" in page.text
    assert "name: tiny" in page.text and "12.3 s" in page.text and "torch 2.13.0" in page.text


def test_page_without_evaluation(tmp_path: Path) -> None:
    data = ReportData(recipe={"name": "tiny"}, plan=deletion_plan())
    page = Page(write_report(data, tmp_path).read_text(encoding="utf-8"))
    assert len(page.loads) == 1
    assert "Not gated" in page.text and "Nothing was measured" in page.text
    assert "layer 26 deleted (score 0.031)" in page.text and "nothing is left: 24, 26" in page.text


def test_table_by_hand() -> None:
    rows = {row["quantity"]: (row["base"], row["candidate"], row["ratio"]) for row in result_table(BASE, CANDIDATE)}
    assert rows["layers"] == ("30", "24", "0.800")
    assert rows["parameters"] == ("100.0 M", "80.0 M", "0.800")
    assert rows["size"] == ("400.0 MB", "80.0 MB", "0.200")
    assert rows["bits per parameter"] == ("32.0", "8.0", "0.250")
    assert rows["perplexity, boolq (n = 8 windows)"] == ("16.42 ± 0.51", "20.52 ± 0.51", "1.250")
    assert rows["bits per byte, boolq"] == ("0.931", "0.931", "1.000")
    assert rows["piqa, acc (n = 50 items)"] == ("0.600 ± 0.030", "0.540 ± 0.030", "0.900")
    # Mean 0.55 and 0.50; standard error sqrt(2 * 0.03^2) / 2 = 0.0212.
    assert rows["mean of 2 tasks (n = 100 items)"] == ("0.550 ± 0.021", "0.500 ± 0.021", "0.909")
    assert rows["decode speed"] == ("21.4 tokens/s", "21.4 tokens/s", "1.000")


def test_table_of_unequal_or_missing_sides() -> None:
    assert result_table(None, None) == []
    alone = {row["quantity"]: row for row in result_table(BASE, None)}
    assert alone["layers"] == {"quantity": "layers", "base": "30", "candidate": "–", "ratio": "–"}
    other = evaluation(24, 1, 1, 2.0, {"piqa": 0.5, "boolq": 0.7})
    quantities = [row["quantity"] for row in result_table(BASE, other)]
    assert "boolq, acc (n = 50 items)" in quantities and "arc_easy, acc (n = 50 items)" in quantities
    assert not any("mean of" in quantity for quantity in quantities)  # one shared task: no mean of unlike sets
    facts = EvalReport({"layers": 3}, (), {}, {}, {})
    assert [row["quantity"] for row in result_table(facts, facts)] == ["layers"]


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (16.4183, 0.514, "16.42 ± 0.51"),
        (8571.4, 310.0, "8,571 ± 310"),
        (0.43, 0.0497, "0.430 ± 0.050"),
        (12.3456, None, "12.35"),
        (0.0, 0.0, "0"),
        (float("inf"), float("nan"), "inf"),
    ],
)
def test_format_value(value: float, stderr: float | None, text: str) -> None:
    assert format_value(value, stderr) == text


@pytest.mark.parametrize(
    ("quantize", "loads", "not_in", "speed"),
    [
        (None, ["transformers", "vLLM on CPU", "vLLM on CUDA", "llama.cpp"], [], None),
        (
            {"scheme": "int8"},
            ["transformers", "vLLM on CUDA", "llama.cpp"],
            ["vLLM on CPU"],
            "no faster than unrounded",
        ),
        ({"scheme": "w8a8"}, ["transformers", "vLLM on CPU"], ["llama.cpp"], "slower than unrounded"),
        ({"scheme": "w8a8", "embeddings": "int8"}, ["transformers"], ["vLLM on CPU", "vLLM on CUDA"], "slower"),
    ],
)
def test_a_card_says_which_engines_load_it_and_what_the_speeds_are_worth(quantize, loads, not_in, speed, tmp_path):
    data = report_data(recipe={"name": "tiny"} | ({"quantize": quantize} if quantize else {}))
    write_card(data, tmp_path)
    lines = (tmp_path / "README.md").read_text(encoding="utf-8").splitlines()
    for engine in loads:
        assert any(line.startswith(f"- {engine}") and "): yes" in line for line in lines), engine
    for engine in not_in:
        assert any(line.startswith(f"- {engine}") and "): no, it " in line for line in lines), engine
    told = [note for note in list_caveats(data) if note.startswith("Speeds are of stock loading")]
    assert len(told) == (speed is not None) and all(speed in note for note in told)


def test_caveats_name_small_samples_and_mixed_sizes() -> None:
    notes = " ".join(list_caveats(report_data()))
    assert "boolq (8)" in notes and "piqa (50)" in notes
    assert "80.0%" in notes and "20.0% fewer parameters" in notes and "8.0 instead of 32.0" in notes
    assert "mixes" not in " ".join(list_caveats(report_data(candidate=BASE)))


def split_card(path: Path) -> tuple[dict, str]:
    _, front, body = path.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), body


def test_card_front_matter_and_table(tmp_path: Path) -> None:
    front, body = split_card(write_card(report_data(), tmp_path))
    assert front["library_name"] == "transformers" and front["license"] == "apache-2.0" and "mka" in front["tags"]
    assert "base_model" not in front and "a==1" in body  # not a hub id
    assert "| perplexity, boolq (n = 8 windows) | 16.42 ± 0.51 | 20.52 ± 0.51 | 1.250 |" in body
    assert "Gate: **undecided**" in body


def test_page_and_card_say_how_far_the_ranking_hangs_on_the_texts(tmp_path: Path) -> None:
    seen = report_data().scores
    resampled = replace(seen, stability=Stability(256, 8, 0.9, 0.8, 1.0, 3, 1))
    importance = LayerScores("layer-importance", np.linspace(0, 1, 30), "Block Influence", "shortgpt", {})
    for scores, told in (
        (seen, "was not measured"),
        (resampled, "the best pair stays the best in 3"),
        (importance, ""),
    ):
        data = report_data(scores=scores)
        assert told in (sentence := describe_stability(scores) or "")
        page = Page(write_report(data, tmp_path).read_text(encoding="utf-8"))
        body = write_card(data, tmp_path).read_text(encoding="utf-8")
        assert sentence in page.text and sentence in html.unescape(body)
        assert all(("neighbour" in text) == bool(told) for text in (page.text, body))


def test_card_keeps_generated_text_inside_its_fence(tmp_path: Path) -> None:
    _, body = split_card(write_card(report_data(), tmp_path))
    outside = re.sub(r"^(`{3,})\w*\n.*?\n\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    assert ATTACK in body and "<script" not in outside and "evil" not in outside
    assert "`````text\na ```` b\n`````" in body


def test_card_escapes_table_cells(tmp_path: Path) -> None:
    _, body = split_card(write_card(report_data(provenance={"command": "mka a|b <i> \n next"}), tmp_path))
    assert "| command | mka a\\|b &lt;i&gt; next |" in body


def test_card_without_evaluation(tmp_path: Path) -> None:
    data = ReportData(recipe={"name": "tiny", "model": {"hub": "org/model"}}, plan=merge_plan())
    front, body = split_card(write_card(data, tmp_path))
    assert front["base_model"] == "org/model" and "license" not in front
    assert "Nothing was measured." in body and "Gate:" not in body
    assert "output layer 12 = 0.62 × source layer 12" in body


def test_pages_of_one_input_are_identical(tmp_path: Path) -> None:
    pages = [write_report(report_data(), tmp_path / name).read_bytes() for name in ("a", "b")]
    assert pages[0] == pages[1]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["report.html"]


def test_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OutputError, match=r"README\.md cannot be written"):
        write_card(report_data(), tmp_path / "file")


def png_size(image: bytes) -> tuple[int, int]:
    picture = Image.open(io.BytesIO(image))
    picture.verify()
    assert picture.format == "PNG"
    return picture.size


def svg_text(image: bytes) -> str:
    assert ElementTree.fromstring(image).tag == "{http://www.w3.org/2000/svg}svg"
    # matplotlib draws glyphs as paths and leaves the words in comments.
    return "\n".join(html.unescape(found) for found in re.findall(r"<!-- (.*?) -->", image.decode()))


def test_similarity_pictures() -> None:
    values, plan = report_data().scores.values, merge_plan()
    assert png_size(draw_similarity(values, plan, "t", "NPIB (0 to 1)")) == (1216, 1432)
    words = svg_text(draw_similarity(values, plan, r"a $\frac$ b", "NPIB (0 to 1)", form="svg")).splitlines()
    assert r"a $\frac$ b" in words and "merged into one layer" in words and "removed" in words
    assert {str(i) for i in range(30)} <= set(words) and "30" not in words  # 0-based
    banded = np.where(np.abs(np.subtract.outer(range(30), range(30))) <= 1, values, np.nan)
    png_size(draw_similarity(banded, plan, "t"))


def test_importance_picture_marks_what_was_removed() -> None:
    words = svg_text(draw_similarity(np.linspace(1, 0, 80), deletion_plan(80), "t", "Block Influence (0 to 2)", "svg"))
    assert "removed" in words.splitlines() and "Block Influence" in words.splitlines()


def test_picture_of_scores_that_do_not_fit_is_refused() -> None:
    with pytest.raises(PlanError, match=r"shape \(29, 29\); allowed for this plan: \(30, 30\)"):
        draw_similarity(np.eye(29), merge_plan(), "t")


def test_plan_picture_names_every_layer_and_weight() -> None:
    words = svg_text(draw_plan(merge_plan(), "svg")).splitlines()
    assert "30 source layers → 24 output layers" in words
    for index in range(30):  # once as a source, and once more as an output below 24
        assert words.count(str(index)) == (2 if index < 24 else 1)
    weights = sorted(word for word in words if re.fullmatch(r"\d?\.\d\d", word))
    assert weights == [".20", ".25", ".25", ".30", ".38", ".50", ".50", ".62", "1.00"]


def halves_plan() -> MergePlan:
    """6 -> 3: a group of three with one attention and all neurons, and a mean of two."""
    layers = (MergedLayer((0,), (1.0,)), take_layers((1, 2, 3), (2,), (1, 2, 3)), MergedLayer((4, 5), (0.5, 0.5)))
    steps = (Step((1,), (2, 3), 0.0123, 0.0), Step((4,), (5,), 0.2, 0.5))
    return MergePlan("aligned", "aligned", 6, layers, steps, {"selection": "both"})


def test_a_group_of_halves_is_told_as_what_it_takes() -> None:
    plan = halves_plan()
    assert describe_layer(1, plan.layers[1]) == (
        "output layer 1 = attention of source layer 2 + the neurons that matter most of source layers 1, 2, 3"
    )
    assert describe_layer(0, take_layers((3, 4), (4,), (3,))) == (
        "output layer 0 = attention of source layer 4 + MLP of source layer 3"
    )
    assert describe_steps(plan) == [
        "layer 1 and layers 2+3 became one (divergence 0.0123 nats per token; attention of source layer 2, the neurons "
        "that matter most of source layers 1, 2, 3)",
        "layer 4 and layer 5 became one (divergence 0.2 nats per token; weights 0.5 and 0.5)",
    ]
    words = svg_text(draw_plan(plan, "svg")).splitlines()
    assert words.count("M") == 2 and words.count("AM") == 1 and words.count(".50") == 2
    # Each half of the layer is one half, shared by those it comes from.
    assert label_sources(plan.layers[1]) == [(1, 0.5 / 3, "M"), (2, 0.5 + 0.5 / 3, "AM"), (3, 0.5 / 3, "M")]


def test_an_alignment_is_told_with_its_choice_its_cost_and_its_errors(tmp_path: Path) -> None:
    facts = {
        "tokens": 2048,
        "windows": {"news": 3, "code": 1},
        "copies": 2,
        "context": 512,
        "penalty": 0.3,
        "probes": {"source": "code", "tokens": 512, "heldout": 256, "divergence": {"0.3": 0.25, "1.0": 0.5}},
        "probe_seconds": 4.0,
        "seconds": 30.0,
        "teacher_seconds": 12.0,
        "layers": [{}, {"error": 0.0123, "mlp units": {"1": 20, "2": 44}}, {"error": 0.02}],
    }
    page = Page(write_report(report_data(plan=halves_plan(), scores=None, alignment=facts), tmp_path).read_text())
    for words in (
        "2,048 in windows of 512",
        "news 3, code 1",
        "0.3, of {0.3: 0.25, 1.0: 0.5} nats per token on 256 tokens of code",
        "30.0 s, 2.50 times the base's own pass over these tokens (12.0 s); choosing the penalty 4.0 s",
        "1 1.23e-02 neurons 20 of layer 1, 44 of layer 2",
    ):
        assert words.replace(" ", "") in page.text.replace(" ", "")  # cells stand without a space between them
    assert len(page.loads) == 4  # plan, errors, recovery, quality against bytes and time
    assert "alignment" in page.ids
    _, body = split_card(write_card(report_data(plan=halves_plan(), scores=None, alignment=facts), tmp_path))
    assert "| sources (windows) | news 3, code 1 |" in body
    given = write_card(report_data(alignment=facts | {"probes": {}, "layers": [{}] * 24}), tmp_path).read_text()
    assert "| penalty | 0.3, as given |" in given and "choosing" not in given


@pytest.mark.parametrize(
    ("plan", "width", "rows"),
    [
        (deletion_plan(80), 0.32 * 27 + 1.5, 3),
        (merge_plan(), 0.32 * 30 + 1.5, 1),
        (MergePlan("mka", "t", 2, (MergedLayer((0, 1), (0.5, 0.5)),)), 7.6, 1),
        (MergePlan("mka", "t", 1, identity_layers(1)), 7.6, 1),
        # One group spans both wanted cuts: it is never torn apart.
        (MergePlan("mka", "t", 70, (MergedLayer(tuple(range(70)), (1 / 70,) * 70),)), 0.32 * 70 + 1.5, 1),
    ],
)
def test_plan_picture_wraps_long_models(plan: MergePlan, width: float, rows: int) -> None:
    across, tall = png_size(draw_plan(plan))
    assert across == pytest.approx(160 * width, abs=1) and tall == pytest.approx(160 * (1.45 * rows + 0.95), abs=1)


def test_recovery_picture_states_bounds_and_thresholds() -> None:
    png_size(draw_recovery([]))
    rows = [{"name": "piqa", "recovery": None, "n": 50}]
    words = svg_text(draw_recovery(CHECKS, rows, "svg")).splitlines()
    assert "0.800 [0.750, 0.850]" in words and "need ≥ 0.5: pass" in words
    assert "0.910 [0.860, open]" in words and "need ≥ 0.9: undecided" in words
    assert "not measured" in words and "n = 50" in words


HEALING = {
    "mode": "distil",
    "train": "changed",
    "first_layer": 12,
    "tokens": 5120,
    "windows": {"one": 12, "two": 8},
    "context": 256,
    "heldout_source": "<b>three</b>",
    "heldout_tokens": 512,
    "rate": 3e-4,
    "steps": 5,
    "ended": "all text read",
    "kept": "best",
    "start": 0.5,
    "best": 0.25,
    "seconds": 20.0,
    "curve": [
        {"step": i, "tokens": 1024 * i, "heldout": value, "loss": value, "rate": 1e-4}
        for i, value in enumerate((0.5, 0.4, 0.33, 0.29, 0.27, 0.25))
    ],
}


def test_a_healing_is_told_with_its_curve_and_its_guess_is_called_one(tmp_path: Path) -> None:
    page = Page(write_report(report_data(healing=HEALING), tmp_path).read_text())
    told = " ".join(page.text.split())
    for said in (
        "0.500 → 0.250 nats per token",
        "layers from 12 on",
        "5,120 in windows of 256",
        "256 tokens/s",
    ):
        assert said in told, said
    assert "a guess by a power law" in told and "healing" in page.ids
    # Names come from tables.
    assert "512 tokens of <b>three</b>" in told
    card = write_card(report_data(healing=HEALING), tmp_path).read_text()
    assert "all text read; the best weights kept" in card and "<b>" not in card


def test_a_local_healing_has_no_curve(tmp_path: Path) -> None:
    facts = {key: value for key, value in HEALING.items() if key not in ("curve", "train", "first_layer")}
    page = Page(write_report(report_data(healing=facts | {"mode": "local", "kept": "start"}), tmp_path).read_text())
    told = " ".join(page.text.split())
    assert "each layer follows the base's hidden states" in told and "the start kept" in told and "a guess" not in told
    assert "nothing after it was nearer to the base" in told
