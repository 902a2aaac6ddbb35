"""The page of all recompressions: what it shows, in what order, and that nothing in it can act or be fetched."""

import base64
import hashlib
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mka.errors import OutputError
from mka.report.index import (
    AliasMove,
    Recompression,
    Recovery,
    format_bounds,
    link_from,
    render_index,
    write_index,
)
from mka.report.index_plots import AXES, BOTTOM, HEIGHT, LEFT, RIGHT, WIDTH, plot_models, plot_recoveries

ATTACK = '"><script>alert(1)</script><img src="http://evil.example/x.png" onerror=alert(2)>{{ 7 * 7 }}'
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
ROW = Recompression(
    base_model="acme/tiny",
    base_revision="0123456789abcdef0123456789abcdef01234567",
    name="tiny",
    version="1",
    aliases=(),
    when=NOON,
    method="aligned",
    recipe="tiny-fast",
    verdict="pass",
    layers_in=30,
    layers_out=24,
    layer_ratio=0.2,
    size_ratio=0.555,
    recoveries=(
        Recovery("perplexity boolq", 0.81, 0.79, 0.83),
        Recovery("perplexity sciq", 0.74, 0.71),
        Recovery("tasks", 0.938, 0.791, 1.107),
    ),
    run="tiny-20260301",
    run_id="a" * 32,
)


class Page(HTMLParser):
    """Everything a test asks of a page: its tags with their attributes, its text, the rows of its tables."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.rows = [], [], []
        self._style = False
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._style = tag in ("style", "script")
        if tag == "tr":
            self.rows.append((dict(attributes), []))

    def handle_endtag(self, tag):
        self._style = False

    def handle_data(self, data):
        if not self._style:
            self.words.append(data)
            if self.rows:
                self.rows[-1][1].append(data)

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]

    def row(self, identifier):
        """Text from the row with this id up to the next row that has one."""
        at = next(i for i, (attributes, _) in enumerate(self.rows) if attributes.get("id") == identifier)
        words = list(self.rows[at][1])
        for attributes, more in self.rows[at + 1 :]:
            if "id" in attributes:
                break
            words += more
        return " ".join(" ".join(words).split())


def show(rows, moves=(), folder=Path("/work")):
    return Page(render_index(rows, moves, folder))


def test_a_row_says_what_came_out():
    row = show([ROW]).row("r0")
    for told in ("2026-03-01 12:00", "tiny-20260301", "acme/tiny", "0123456789ab…", "aligned", "tiny-fast", "30 → 24"):
        assert told in row
    assert "−20.0 %" in row and "55.5 %" in row and "pass" in row
    assert "boolq 0.810 [0.790, 0.830]" in row and "sciq 0.740 ≥ 0.710" in row and "tasks 0.938 [0.791, 1.107]" in row


def test_the_newest_is_first_whatever_the_order_and_the_time_zone():
    east = ROW.when.astimezone(tz=datetime.strptime("+0900", "%z").tzinfo)
    rows = [
        replace(ROW, run="oldest", when=NOON - timedelta(days=2)),
        replace(ROW, run="newest", when=east + timedelta(hours=1)),
        replace(ROW, run="middle"),
    ]
    page = show(rows)
    assert [next(run for run in ("oldest", "middle", "newest") if run in page.row(f"r{i}")) for i in range(3)] == [
        "newest",
        "middle",
        "oldest",
    ]
    assert "2026-03-01 13:00" in page.row("r0")


def test_the_champion_is_marked_in_row_plot_and_summary_and_no_other_is():
    rows = [
        replace(ROW, version="7", aliases=("champion",)),
        replace(ROW, version="8", aliases=("candidate",), when=NOON + timedelta(days=1), verdict="undecided"),
        replace(ROW, version="5", when=NOON - timedelta(days=1)),
    ]
    page = show(rows)
    marked = [attributes["id"] for attributes, _ in page.rows if "champion" in attributes.get("class", "")]
    assert marked == ["r1"] and page.row("r1").count("champion") == 1
    figures = re.findall(r"<figure>.*?</figure>", render_index(rows, [], Path("/work")), re.S)
    assert [re.search("Against ([a-z]+)", figure)[1] for figure in figures] == ["layers", "bytes"]
    for figure in figures:
        assert figure.count('class="ring"') == 1 and ">version 7</text>" in figure
    in_use = page.text.split("In use")[1].split("Recovery against")[0]
    assert "version 7 champion" in in_use and "version 8 candidate" in in_use and "version 5" not in in_use
    assert "No champion" not in in_use
    assert "No champion" in show([rows[1]]).text


def test_a_refused_run_has_no_version_and_stays_on_the_page():
    page = show([replace(ROW, version=None, verdict="fail"), replace(ROW, version=None, when=NOON - timedelta(1))])
    assert "refused" in page.row("r0") and "fail" in page.row("r0")
    assert "not registered" in page.row("r1") and "refused" not in page.row("r1")
    assert "2 recompressions of 1 model: 1 pass , 1 fail ." in page.text
    assert "no alias points at any version" in page.text


def test_an_interrupted_registration_and_a_lost_run_are_told():
    row = show([replace(ROW, complete=False, run="", run_id="")]).row("r0")
    assert "incomplete" in row and "run is gone" in row


def test_an_unknown_verdict_is_shown_as_it_is():
    page = show([replace(ROW, verdict=""), replace(ROW, verdict="odd")])
    assert "unknown" in page.text and "1 odd" in page.text


def test_what_was_not_recorded_is_a_dash_and_not_in_the_plot():
    bare = replace(
        ROW, layers_in=None, layers_out=None, layer_ratio=None, size_ratio=None, recoveries=(), recipe="tiny"
    )
    row = show([bare]).row("r0")
    # Layers, bytes, what is saved of them, speed, recoveries.
    assert "? → ?" in row and row.count("–") == 5
    assert "Nothing to draw" in show([bare]).text
    assert "1 without these figures" in show([ROW, bare]).text


def test_markup_in_any_text_is_text():
    fields = ("base_model", "name", "version", "method", "recipe", "verdict", "run", "run_id", "page")
    row = replace(
        ROW,
        **dict.fromkeys(fields, ATTACK),
        base_revision="&<b>",
        aliases=(ATTACK, "champion"),
        recoveries=(Recovery(ATTACK, 0.5, 0.4),),
        report=Path("/work") / ATTACK.replace("/", "_"),
    )
    page = show([row], [AliasMove(ATTACK, ATTACK, ATTACK, ATTACK, ATTACK, NOON, ATTACK, ATTACK)])
    assert len(page.all("script")) == 1 and not page.all("img") and "{{ 7 * 7 }}" in page.text
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    # Once as name, base, version, method, recipe, verdict, run in the row; everywhere else besides.
    assert page.row("r0").count("<script>alert(1)</script>") >= 8
    assert page.text.count('<img src="http://evil.example/x.png"') > 15


def test_the_page_needs_nothing_from_outside():
    text = render_index([ROW, replace(ROW, aliases=("champion",))], [], Path("/work"))
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"iframe", "object", "embed", "img", "image", "use", "base"}
    assert [attributes["href"] for attributes in page.all("link")] == ["data:,"]
    assert not [a for _, attributes in page.tags for a in attributes if a in ("src", "srcset", "poster", "xlink:href")]
    assert "url(" not in text and "@import" not in text
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "script-src 'unsafe" not in policy
    # The one script is the page's own, let in by its digest.
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "{{" not in script


def test_links_start_at_the_page(tmp_path):
    report = tmp_path / "javascript:alert(1)" / "a #b?.html"
    hrefs = [a["href"] for a in show([replace(ROW, report=report)], folder=tmp_path).all("a")]
    assert "javascript%3Aalert%281%29/a%20%23b%3F.html" in hrefs
    assert link_from(tmp_path / "work", tmp_path / "report.html") == "../report.html"
    page = "http://127.0.0.1:5000/#/experiments/1/runs/2"
    assert page in [a.get("href") for a in show([replace(ROW, page=page)]).all("a")]


def test_dots_lie_where_their_figures_say():
    rows = [
        replace(ROW, layer_ratio=0.0, recoveries=(Recovery("perplexity a", 1.0), Recovery("perplexity b", 1.2))),
        replace(ROW, layer_ratio=0.5, recoveries=(Recovery("perplexity a", 0.0, 0.0, 1.0),), verdict="fail"),
        replace(ROW, layer_ratio=0.25, recoveries=(Recovery("tasks", 0.5),)),
    ]
    (plot,) = plot_recoveries(rows)
    first, second, third = plot["dots"]
    # The worse of two texts counts, and 1 is on the line that says so.
    assert first["worst"].label == "a" and (first["x"], first["y"]) == (LEFT, plot["even"])
    assert (second["x"], second["y"]) == (WIDTH - RIGHT, HEIGHT - BOTTOM)
    assert (second["low"], second["high"]) == (HEIGHT - BOTTOM, plot["even"])
    assert third["x"] == pytest.approx((LEFT + WIDTH - RIGHT) / 2, abs=0.1)
    assert third["y"] == pytest.approx((plot["even"] + HEIGHT - BOTTOM) / 2, abs=0.1)
    assert third["low"] == third["high"] == third["y"]
    assert [label for _, label in plot["x"]] == ["0 %", "10 %", "20 %", "30 %", "40 %", "50 %"]
    assert (plot["even"], "1.0") in plot["y"]


def test_bytes_and_time_are_drawn_as_shares_of_the_bases():
    timed = {"decode": (24.0, 25.0, 26.0), "base_decode": (19.0, 20.0, 21.0)}
    rows = [replace(ROW, size_ratio=0.5, **timed), replace(ROW, size_ratio=0.0)]
    layers, by_bytes, time = (plot_recoveries(rows, axis)[0] for axis in AXES)
    places = [dot["x"] for dot in by_bytes["dots"]]
    assert places == [pytest.approx((LEFT + WIDTH - RIGHT) / 2, abs=0.1), WIDTH - RIGHT]
    # 20 tokens per second became 25: four fifths of the time. The other was not timed.
    (dot,) = time["dots"]
    assert dot["x"] == pytest.approx(LEFT + 0.8 * (WIDTH - LEFT - RIGHT), abs=0.1) and time["missing"] == 1
    assert len(layers["dots"]) == 2
    ((name, plots),) = plot_models(rows)
    assert name == "tiny" and [plot["axis"].name for plot in plots] == ["layers", "bytes", "time"]


def test_a_row_has_thresholds_bytes_speed_and_commands():
    asked = (Recovery("perplexity boolq", 0.93, 0.91, 0.95, 0.9), Recovery("tasks", 0.9, 0.85, None, 0.8))
    row = replace(ROW, size=94e6, base_size=200e6, size_ratio=0.53, decode=(20.9, 21.5, 22.0), recoveries=asked)
    told = show([row]).row("r0")
    for words in ("94.0 MB 53.0 % saved", "21.5 tok/s 20.9 to 22.0", "[0.910, 0.950] ≥ 0.9", "≥ 0.850 ≥ 0.8"):
        assert words in told
    assert "demonstration: asks for less than 0.9" in told and "rollback" not in told
    assert "mka promote tiny --version 1 --because TEXT" in told
    assert "mlflow.pyfunc.load_model('models:/tiny/1')" in told
    assert "demonstration" not in show([replace(row, recoveries=asked[:1])]).row("r0")
    champion = show([replace(row, aliases=("champion",), command="mka run recipes/tiny.yaml")]).row("r0")
    assert "mka rollback tiny --because TEXT" in champion and "mka promote" not in champion
    assert "run it again mka run recipes/tiny.yaml" in champion
    refused = replace(row, version=None, verdict="fail", command="mka run recipes/tiny.yaml")
    assert [line for _, line in refused.commands] == ["mka run recipes/tiny.yaml"]


def test_a_name_with_spaces_is_one_word_of_a_command():
    assert replace(ROW, name="a b").commands[0] == ("promote", "mka promote 'a b' --version 1 --because TEXT")


def test_each_model_has_its_plot_on_the_same_axes_and_marks_lead_to_rows():
    rows = [replace(ROW, layer_ratio=0.6), replace(ROW, name="other", layer_ratio=0.1, when=NOON - timedelta(days=1))]
    plots = plot_recoveries(rows)
    assert [plot["name"] for plot in plots] == ["other", "tiny"]
    assert plots[0]["x"] == plots[1]["x"] and plots[0]["y"] == plots[1]["y"]
    page = show(rows)
    targets = [a["href"] for a in page.all("a") if a.get("href", "").startswith("#")]
    assert sorted(targets) == ["#r0", "#r0", "#r1", "#r1"] and {a.get("id") for a in page.all("tr")} >= {"r0", "r1"}


def test_a_bound_far_above_the_base_does_not_press_the_rest_to_the_floor():
    rows = [ROW, replace(ROW, recoveries=(Recovery("tasks", 0.9, 0.1, 1e300),))]
    (plot,) = plot_recoveries(rows)
    assert plot["y"][-1][1] == "2.0" and all(0 <= dot["high"] <= dot["y"] <= HEIGHT for dot in plot["dots"])


def test_bounds_say_which_side_they_are_on():
    assert format_bounds(Recovery("a", 0.5, 0.4, 0.6)) == "[0.400, 0.600]"
    assert format_bounds(Recovery("a", 0.5, 0.4)) == "≥ 0.400"
    assert format_bounds(Recovery("a", 0.5, None, 0.6)) == "≤ 0.600"
    assert format_bounds(Recovery("a", 0.5)) == ""


def test_moves_are_told_per_model_newest_first():
    moves = [
        AliasMove("tiny", "champion", "promote", None, "1", NOON, "ann", "first"),
        AliasMove("tiny", "champion", "rollback", "2", "1", NOON + timedelta(hours=2), "bob", "slower"),
        AliasMove("other", "champion", "register", "1", "2", None, "–", "no time"),
    ]
    page = show([ROW], moves)
    told = page.text.split("How aliases moved")[1]
    assert told.index("other") < told.index("tiny")
    assert "2026-03-01 14:00 champion 2 → 1 rollback bob slower" in told
    assert "2026-03-01 12:00 champion none → 1 promote ann first" in told
    assert told.index("bob") < told.index("ann") and "– champion 1 → 2 register – no time" in told
    assert "No move is on record" in show([ROW]).text


def test_an_empty_registry_has_an_honest_page():
    page = show([])
    assert "Nothing has been recompressed yet" in page.text and "mka run" in page.text
    assert not page.all("table") and not page.all("svg") and "champion" not in page.text


def test_the_file_is_replaced_whole_and_a_refusal_is_one_line(tmp_path):
    path = tmp_path / "new" / "index.html"
    assert write_index([], path) == path
    assert "Nothing has been recompressed" in path.read_text()
    write_index([ROW], path)
    assert "tiny-20260301" in path.read_text() and list(path.parent.iterdir()) == [path]
    with pytest.raises(OutputError, match="cannot be written"):
        write_index([ROW], path / "below")
