"""What a comparison leaves for people: the page, the picture, the rows in another page."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from support.bench import TINY, make_bench_folder, write_bench_recipe

from mka.bench.frontier import find_frontier
from mka.bench.page import BEGIN, END, render_page, update_rows
from mka.bench.parts import Bench, Measured
from mka.bench.picture import draw_comparison, draw_frontiers
from mka.bench.recipe import validate_bench
from mka.bench.results import Failed, Results
from mka.bench.statistics import Comparison
from mka.bench.tables import format_ratio, show_comparison, tabulate_best
from mka.cli.main import main
from mka.errors import OutputError
from mka.evaluation.scores import Score
from mka.model.checkpoint import open_checkpoint
from mka.pipeline.inputs import Inputs

WINDOWS, TOKENS = 8, 100
CONDITIONS = {
    "device": "cpu",
    "threads": 1,
    "cpus": 2,
    "platform": "Linux",
    "versions": {"torch": "2", "numpy": "2"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_bench_folder(tmp_path_factory.mktemp("bench"))


def score(name, nats):
    """Perplexity of a text on which every token costs as many nats."""
    items = tuple((nats * TOKENS, TOKENS) for _ in range(WINDOWS))
    return Score(name, "perplexity", math.exp(nats), 0.1, WINDOWS, False, items, {"tokens": WINDOWS * TOKENS})


def solved(name, items):
    extra = {"items_digest": name}
    return Score(name, "acc", sum(items) / len(items), 0.1, len(items), True, tuple(items), extra)


def copied(items):
    extra = {"items_digest": "copied"}
    return Score("sequences", "copying", sum(items) / len(items), 0.1, len(items), True, tuple(items), extra)


def compare(folder, nats, tasks=None, failed=(), copies=None):
    """A comparison in which the base costs 3 nats per token, and each cell what is given, on words and on prose."""
    raw = yaml.safe_load(TINY.read_text()) | {"methods": [{"name": "sleb"}, {"name": "shortgpt"}]}
    raw["methods"].append({"name": "mka", "label": "mka_new", "ours": True})
    if tasks:
        raw["evaluation"] |= {"tasks": {"piqa": 4}, "task_targets": [5]}
    if copies:
        raw["evaluation"] |= {"generation": 4, "task_targets": [5]}
    recipe = validate_bench(raw)
    base = open_checkpoint(folder / "base")
    digests = {"text words": "a" * 64, "text prose": "b" * 64}
    notes = dict.fromkeys(("words", "prose"), "0 of 60 calibration texts")
    bench = Bench(
        recipe, base, "r", Inputs(), {"words": [], "prose": []}, digests, notes, folder, "mka bench tiny.yaml"
    )

    def measure(cell, words, prose, solved_items=None, copied_items=None):
        found = [score("words", 3 + words), score("prose", 3 + prose)]
        found += [copied(copied_items)] if copied_items else []
        found += [solved("piqa", solved_items)] if solved_items else []
        scores = {(s.name, s.metric): s for s in found}
        seconds = {"plan": 2.0, "merge": 1.5, "measure": 4.0}
        return Measured(cell, scores, seconds, {"digest": "d"}, (CONDITIONS,), reused=False)

    cells = {(cell.entry.name, cell.layers): cell for cell in recipe.cells}
    own = copies or {}
    measured = [measure(cells[at], *values, (tasks or {}).get(at), own.get(at)) for at, values in nats.items()]
    failures = tuple(Failed(cells[at], "it cannot", expected=True) for at in failed)
    base_items = (tasks or {}).get("base")
    missing = tuple(cell for at, cell in cells.items() if at not in nats and at not in failed)
    return Comparison(
        Results(bench, measure(None, 0, 0, base_items, own.get("base")), tuple(measured), failures, missing)
    )


NATS = {
    ("sleb", 5): (0.1, 0.4),
    ("sleb", 4): (0.5, 0.7),
    ("shortgpt", 5): (0.2, 0.3),
    ("mka", 5): (0.05, 0.35),
    ("mka", 4): (0.4, 0.6),
}


@pytest.fixture
def comparison(folder):
    return compare(folder, NATS, failed=[("shortgpt", 4)])


@pytest.fixture
def sized(folder):
    """Four models and the base: 100 bytes; s 90, t 50, u 50 and v 20, dearer in this order but for t and u."""
    raw = yaml.safe_load(TINY.read_text()) | {"targets": [5]}
    raw["methods"] = [
        {"name": "sleb", "label": name, "quantize": [{"scheme": "int8", "group_size": 16}]} for name in "stuv"
    ]
    recipe, found = validate_bench(raw), compare(folder, NATS, failed=[("shortgpt", 4)])
    cells = {cell.entry.label: cell for cell in recipe.cells}
    values = {"s": (0.1, 0.1, 90), "t": (0.3, 0.05, 50), "u": (0.2, 0.4, 50), "v": (0.5, 0.5, 20)}

    def measure(cell, words, prose, size):
        scores = {(s.name, s.metric): s for s in (score("words", 3 + words), score("prose", 3 + prose))}
        return Measured(cell, scores, {"plan": 1.0, "quantize": 2.0}, {"bytes": size * 10**6}, (CONDITIONS,), False)

    bench = replace(found.results.bench, recipe=recipe)
    measured = tuple(measure(cells[name], *value) for name, value in values.items())
    return Comparison(Results(bench, measure(None, 0, 0, 100), measured, (), ()))


def test_what_something_smaller_equals_is_off_the_frontier(sized):
    points = {p.row[0]: p for p in find_frontier(sized, "perplexity words")}
    assert [p.nbytes // 10**6 for p in find_frontier(sized, "perplexity words")] == [20, 50, 50, 90, 100]
    # On words t is as small as u and worse; on prose t beats u and the larger s, too.
    assert {row: p.beaten_by and p.beaten_by[0] for row, p in points.items()} == {
        "v": None,
        "u": None,
        "t": "u",
        "s": None,
        "b": None,
    }
    prose = {p.row[0]: p for p in find_frontier(sized, "perplexity prose")}
    assert {row: p.beaten_by and p.beaten_by[0] for row, p in prose.items()} == {
        "v": None,
        "u": "t",
        "t": None,
        "s": "t",
        "b": None,
    }


def test_the_page_shows_sizes_and_frontiers_where_something_is_rounded(sized, comparison):
    page = render_page(sized, None, "bytes.png")
    row = "v, int8 in groups of 16"
    assert (
        f"| {row} | 20.0 (0.200) |" in page
        and "![Perplexity over the base's against megabytes and time](bytes.png)" in page
    )
    prose = page.partition("## Quality against bytes and time")[2].partition("### prose")[2].partition("\n## ")[0]
    lines = [line for line in prose.splitlines() if line.startswith("| ")][2:]
    # Five layers of six; no engine is named that would read eight bits.
    assert lines[0].startswith("| **20.0** | **1.") and f"** | **{row}** | **5** | **1.649 [" in lines[0]
    assert lines[0].endswith("| – |")
    assert (
        lines[2].startswith("| 50.0 | 1.")
        and " | u, " in lines[2]
        and lines[2].endswith("| t, int8 in groups of 16, 5 layers |")
    )
    assert lines[-1] == "| **100.0** | **1.00** | **base** | **6** | **1** | – |"
    assert "2.0" in page.partition("## Costs")[2] and "| round |" in page
    plain = render_page(comparison, None)
    assert "Quality against bytes" not in plain and "## Sizes" not in plain and "| round |" not in plain


def test_the_picture_of_frontiers_names_every_row_and_marks_layers(sized):
    from PIL import Image

    drawn = draw_frontiers(sized, "svg").decode()
    assert drawn == draw_frontiers(sized, "svg").decode()
    for said in (
        "Depth and bits of",
        "megabytes of tensors",
        "by arithmetic",
        "v, int8 in groups of 16",
        "Grey: something",
    ):
        assert said in drawn
    wide, tall = Image.open(io.BytesIO(draw_frontiers(sized))).size
    assert wide > 1000 and tall > 1200


def test_against_time_models_are_placed_by_what_is_read_for_a_token(sized):
    """All four have as many layers, so the best of them alone is left beside the base."""
    points = find_frontier(sized, "perplexity words", "time")
    assert [p.row[0] for p in points] == ["s", "u", "t", "v", "b"]
    assert {p.row[0]: p.beaten_by and p.beaten_by[0] for p in points} == {
        **dict.fromkeys("utv", "s"),
        "s": None,
        "b": None,
    }
    assert len({p.decode_speed for p in points[:-1]}) == 1 and points[0].decode_speed > points[-1].decode_speed == 1.0


def test_ours_meets_the_best_of_the_others_at_every_target_and_text(comparison):
    duels = {(d.on, d.layers): d for d in comparison.duels}
    assert {at: d.rival for at, d in duels.items()} == {
        ("words", 5): "sleb",
        ("words", 4): "sleb",
        ("prose", 5): "shortgpt",
        ("prose", 4): "sleb",
    }
    expected = {("words", 5): -0.05, ("words", 4): -0.1, ("prose", 5): 0.05, ("prose", 4): -0.1}
    for at, nats in expected.items():
        assert duels[at].ratio.value == pytest.approx(math.exp(nats))
        assert duels[at].verdict == ("better" if nats < 0 else "worse")


def test_tasks_are_compared_where_they_were_measured_and_more_is_better(folder):
    tasks = {"base": [1, 1, 1, 0], ("sleb", 5): [1, 1, 0, 0], ("shortgpt", 5): [1, 0, 0, 0], ("mka", 5): [1, 1, 1, 0]}
    comparison = compare(folder, NATS, tasks, failed=[("shortgpt", 4)])
    assert {at: e.value for at, e in comparison.ratios["tasks"].items()} == pytest.approx(
        {("sleb", 5): 2 / 3, ("shortgpt", 5): 1 / 3, ("mka_new", 5): 1}
    )
    (duel,) = (d for d in comparison.duels if d.on == "tasks")
    assert (duel.rival, duel.ratio.value, duel.verdict) == ("sleb", pytest.approx(1.5), "undecided")
    page = render_page(comparison, None)
    assert "| mka\\_new | **1.000 [1.000, 1.000]** |" in page and "piqa (4)" in page


def test_generation_has_a_section_of_its_own_at_its_targets_and_no_panel(folder):
    copies = {"base": [1, 1, 0.8, 0.4], ("sleb", 5): [0.4] * 4, ("shortgpt", 5): [0.2] * 4, ("mka", 5): [0.8] * 4}
    comparison = compare(folder, NATS, failed=[("shortgpt", 4)], copies=copies)
    check = "copying sequences"
    assert {at: e.value for at, e in comparison.ratios[check].items()} == pytest.approx(
        {("sleb", 5): 0.5, ("shortgpt", 5): 0.25, ("mka_new", 5): 1}
    )
    (duel,) = (d for d in comparison.duels if d.on == check)
    assert (duel.rival, duel.ratio.value, duel.verdict) == ("sleb", pytest.approx(2), "better")
    page = render_page(comparison, None)
    section = page.split("## Copying")[1].split("\n## ")[0]
    assert "The base: 0.80 ± 0.10 (share of tokens, n = 4 items)" in section and "Bold: highest" in section
    assert "| method | 5 of 6 layers |" in section and "| mka\\_new | **1.000 [" in section
    assert "copying: above 1 ours is better" in page
    assert "sequences: copying / base's 0.80" in show_comparison(comparison)
    assert draw_comparison(comparison) == draw_comparison(compare(folder, NATS, failed=[("shortgpt", 4)]))


def test_a_rival_that_solves_nothing_is_no_divisor(folder):
    copies = {"base": [1, 1, 1, 1], ("sleb", 5): [0] * 4, ("shortgpt", 5): [0] * 4, ("mka", 5): [0.8] * 4}
    comparison = compare(folder, NATS, failed=[("shortgpt", 4)], copies=copies)
    assert comparison.ratios["copying sequences"]["sleb", 5].value == 0
    assert {d.on for d in comparison.duels} == {"words", "prose"}


def test_the_page_holds_command_conditions_n_figures_and_failures(comparison):
    page = render_page(comparison, "benchmarks.png")
    assert "`mka bench tiny.yaml`" in page and "](benchmarks.png)" in page
    assert "n = 8 windows" in page and "| words | heldout.jsonl, words | seen | 8 | 800 |" in page
    assert "the first 1 and last 1 layers" in page and "1 of 2 CPU cores" in page and "torch 2" in page
    assert comparison.results.bench.base.digest[:16] in page
    best, other = (format_ratio(math.exp(nats)) for nats in (0.05, 0.1))
    assert f"| mka\\_new | **{best} [{best}, {best}]** |" in page and f"| sleb | {other} [{other}, {other}] |" in page
    assert "| shortgpt | **" in page.split("### prose")[1] and "- shortgpt at 4: it cannot" in page
    assert "| mka\\_new | – | 2.0 / 2.0 | 1.5 / 1.5 |" in page
    for line in page.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_the_terminal_says_what_failed_and_what_was_not_run(folder):
    shown = show_comparison(compare(folder, {("sleb", 5): (0.1, 0.2)}, failed=[("shortgpt", 4)]))
    assert "shortgpt at 4 failed: it cannot" in shown and "4 cells not run yet" in shown
    assert "1.105 [1.105, 1.105] *" in shown and "not run" in shown


def test_the_picture_is_a_png_with_a_row_of_pixels_for_every_panel(comparison):
    from PIL import Image

    image = Image.open(io.BytesIO(draw_comparison(comparison)))
    assert image.format == "PNG" and image.width > 1.3 * image.height
    # The tint of ours is in both panels, left and right.
    pixels = np.asarray(image.convert("RGB")).astype(int)
    ours = (np.abs(pixels - (0xD5, 0x5E, 0x00)).sum(axis=2) < 12).any(axis=0)
    half = image.width // 2
    assert ours[:half].any() and ours[half:].any()


def test_a_hopeless_model_does_not_squash_the_others(folder):
    nats = {**NATS, ("shortgpt", 4): (9.0, 9.0)}
    tall = draw_comparison(compare(folder, nats), "svg").decode()
    assert "Lines that leave the frame go on to at most 8,103." in tall
    assert "Lines that leave" not in draw_comparison(compare(folder, NATS, failed=[("shortgpt", 4)]), "svg").decode()


def test_another_page_gets_the_best_row_of_each_target_between_its_markers(comparison, tmp_path):
    headers, rows = tabulate_best(comparison)
    assert headers == ["layers", "best method", "words (seen kind)", "prose (unseen kind)"]
    # Least mean of nats over the texts: 0.2 of mka against 0.25 and 0.25; 0.5 against 0.6.
    assert [row[:2] for row in rows] == [["5 of 6", "mka_new"], ["4 of 6", "mka_new"]]
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    update_rows(readme, comparison)
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\n| layers |") and text.endswith(f"|\n{END}\nafter\n") and "old" not in text
    update_rows(readme, comparison)
    assert readme.read_text() == text
    for broken in ("", f"{END}\n{BEGIN}\n", BEGIN):
        readme.write_text(broken)
        with pytest.raises(OutputError, match="has no lines"):
            update_rows(readme, comparison)


def test_unequal_windows_keep_the_readers_informed(comparison):
    other = replace(comparison.results.base, conditions=({**CONDITIONS, "threads": 2},))
    page = render_page(Comparison(replace(comparison.results, base=other)), None)
    assert "| threads | 2 of 2 CPU cores; 1 of 2 CPU cores |" in page


def test_the_command_writes_page_and_picture_only_of_a_whole_comparison(folder, tmp_path, monkeypatch, capsys):
    for item in folder.iterdir():
        (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MKA_WORK", str(tmp_path / "work"))
    recipe = write_bench_recipe(tmp_path, targets=[5]).name
    assert main(["bench", recipe, "--only", "sleb"]) == 0
    assert "1 cells not run yet" in capsys.readouterr().out and not Path("docs").exists()
    Path("README.md").write_text(f"{BEGIN}\n{END}\n")
    assert main(["bench", recipe, "--rows-in", "README.md", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["written"] == ["docs/benchmarks.png", "docs/benchmarks.md", "README.md"]
    assert f"`mka bench {recipe}`" in Path("docs/benchmarks.md").read_text()
    assert (
        Path("docs/benchmarks.png").read_bytes().startswith(b"\x89PNG")
        and "| 5 of 6 |" in Path("README.md").read_text()
    )
