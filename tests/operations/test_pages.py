"""Every page of a recompression, opened in a real browser: what a person looks for is on it."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.servers import ask

from mka.errors import GuardError
from mka.evaluation.scores import EvalReport, Score
from mka.evidence.states import LayerScores
from mka.plan.plan import MergePlan, keep_layers
from mka.report.data import ReportData
from mka.report.index import AliasMove, Recompression, Recovery, write_index
from mka.report.page import write_report
from tasks.guards import guard
from tasks.guards.columns import expect_complete, expect_finite
from tasks.registry.tracking import find_version_page

pytestmark = [pytest.mark.browser, pytest.mark.operations]


def require_quiet(seen):
    """One of our own pages asks nobody for anything and has nothing to complain of."""
    assert seen.requests and seen.outside == []
    assert seen.errors == []


def require_fit(page):
    """Nothing of the page itself sticks out at the side; wide tables scroll inside their frames."""
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


# Every element with words of its own, against the nearest background behind it: the least contrast, and whose it is.
CONTRAST = """() => {
  const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const part = value => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  let worst = [99, ""];
  for (const item of document.querySelectorAll("main *")) {
    const words = [...item.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!words || item.closest("svg") || !item.checkVisibility()) continue;
    let behind = item;
    while (behind && (parse(getComputedStyle(behind).backgroundColor)[3] === 0)) behind = behind.parentElement;
    const page = behind ? getComputedStyle(behind).backgroundColor : "rgb(255, 255, 255)";
    const [one, other] = [getComputedStyle(item).color, page].map(colour => light(parse(colour)));
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (ratio < worst[0]) worst = [ratio, `${item.tagName} ${item.className}: ${item.textContent.trim().slice(0, 60)}`];
  }
  return worst;
}"""
LOOKS = [(scheme, width) for scheme in ("light", "dark") for width in (1280, 390)]


def require_readable(page, scheme):
    """The page follows the scheme that was asked for, and its words stand out from what is behind them."""
    assert (background(page) < 60) == (scheme == "dark")
    ratio, where = page.evaluate(CONTRAST)
    assert ratio >= 4.5, (scheme, ratio, where)


def background(page):
    """Lightness of the page's background, 0 to 255."""
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


def test_the_report_shows_the_verdict_and_all_pictures(stack, open_page, shots):
    page, seen = open_page(Path(stack.facts["report"]).as_uri())
    assert page.locator(".banner strong").inner_text().lower() == stack.facts["verdict"] == "pass"
    assert "perplexity words" in page.locator(".banner").inner_text()
    widths = page.evaluate("[...document.images].map(image => image.complete ? image.naturalWidth : 0)")
    # The plan, what the method saw, the recoveries.
    assert len(widths) >= 3 and min(widths) > 0
    assert "6 → 5 layers" in page.locator("header").inner_text()
    require_quiet(seen)
    require_fit(page)
    page.screenshot(path=shots / "report.png", full_page=True)
    page.set_viewport_size({"width": 420, "height": 900})
    require_fit(page)
    page.screenshot(path=shots / "report-420.png", full_page=True)
    dark, seen = open_page(Path(stack.facts["report"]).as_uri(), "dark")
    assert background(page) > 200 and background(dark) < 60
    require_quiet(seen)
    dark.screenshot(path=shots / "report-dark.png", full_page=True)


def test_the_index_shows_row_alias_and_verdict_and_leads_to_report_and_run(stack, open_page, shots):
    for scheme in ("light", "dark"):
        page, seen = open_page(stack.index.as_uri(), scheme)
        row = page.locator("#r0")
        text = " ".join(row.inner_text().split())
        assert stack.facts["run"] in text and "6 → 5" in text and "pass" in text and "words" in text
        version = stack.facts["registered_version"]
        for alias in (alias for alias, at in stack.aliases.items() if at == version):
            assert row.get_by_text(alias, exact=True).is_visible()
        assert stack.aliases["candidate"] == version
        require_quiet(seen)
        require_fit(page)
        assert (background(page) < 60) == (scheme == "dark")
        page.screenshot(path=shots / f"index-{scheme}.png", full_page=True)
        require_readable(page, scheme)
    page.locator("#plot a").first.click()
    assert page.url.endswith("#r0")
    with page.expect_navigation():
        page.get_by_role("link", name="report", exact=True).click()
    assert page.locator(".banner").is_visible()
    page.go_back()
    page.get_by_role("link", name="MLflow run").click()
    page.get_by_text(stack.facts["run"]).first.wait_for()


def made_up() -> tuple[list[Recompression], list[AliasMove]]:
    """Recompressions of two models, of every verdict, as a year of use might leave them."""
    rows = []
    for i in range(24):
        ratio = (2, 4, 7, 10)[i % 4] / 30
        verdict = ("pass", "undecided", "fail", "fail")[i % 4]
        value = 1 - 2.2 * ratio + 0.02 * (i % 5)
        bounds = (value - 0.03, value + 0.03)
        rows.append(
            Recompression(
                base_model="HuggingFaceTB/SmolLM2-135M-Instruct" if i % 3 else "google/gemma-3-270m",
                base_revision=f"{i:02x}" * 20,
                name="smollm2-135m-mka" if i % 3 else "gemma3-270m-mka",
                version=None if verdict == "fail" else str(i + 1),
                aliases={0: ("champion",), 20: ("champion",), 21: ("candidate",), 16: ("previous",)}.get(i, ()),
                when=datetime(2026, 1, 1, 9, tzinfo=UTC) + timedelta(days=9 * i),
                method=("aligned", "mka", "shortgpt", "replaceme")[i % 4],
                recipe=("smollm2_135m_aligned", "smollm2-135m-mka")[i % 2],
                verdict=verdict,
                layers_in=30,
                layers_out=round(30 * (1 - ratio)),
                layer_ratio=ratio,
                size_ratio=0.55 + ratio / 4,
                size=269e6 * (0.45 - ratio / 4),
                base_size=269e6,
                decode=(23 + 20 * ratio, 24 + 20 * ratio, 25 + 20 * ratio),
                base_decode=(20.0, 21.0, 22.0),
                recoveries=(
                    Recovery("perplexity boolq", value, *bounds, 0.85 if i % 3 else 0.9),
                    Recovery("perplexity sciq", value + 0.04, bounds[0] + 0.04),
                    *([Recovery("tasks", value + 0.1, value, value + 0.2)] if i % 2 else []),
                ),
                run=f"smollm2-135m-2026{i:02d}",
                run_id=f"{i:032x}",
            )
        )
    why = "recovers more on boolq and is no slower; asked for by the people who serve it"
    when = datetime(2026, 7, 1, tzinfo=UTC)
    moves = [
        AliasMove("smollm2-135m-mka", "champion", "promote", "17", "21", when, "ann@build", why),
        AliasMove(
            "smollm2-135m-mka", "champion", "rollback", "13", "17", when - timedelta(days=3), "bob@desk", "too slow"
        ),
        AliasMove(
            "gemma3-270m-mka", "champion", "promote", None, "1", when - timedelta(days=90), "ann@build", "gate passed"
        ),
    ]
    return rows, moves


@pytest.mark.parametrize(("scheme", "width"), LOOKS)
def test_an_index_of_many_is_readable_at_every_width(open_page, shots, tmp_path, scheme, width):
    rows, moves = made_up()
    page, seen = open_page(write_index(rows, tmp_path / "index.html", moves).as_uri(), scheme, width)
    assert page.locator("#all tbody > tr[id]").count() == len(rows)
    champions = page.locator("tr.champion")
    assert champions.count() == 2 and "smollm2-135m-202620" in champions.first.inner_text()
    # Of each model a plot against layers, bytes and time.
    assert page.locator("#plot figure").count() == 6 and page.locator("#plot figure a").count() == 3 * len(rows)
    # No dot lies outside its frame, and no two labels of an axis cover each other.
    assert page.evaluate(
        """[...document.querySelectorAll("figure svg")].every(svg => {
          const frame = svg.getBoundingClientRect();
          return [...svg.querySelectorAll(".dot, .cross, .ring, text")].every(item => {
            const box = item.getBoundingClientRect();
            return box.left >= frame.left - 1 && box.right <= frame.right + 1
              && box.top >= frame.top - 1 && box.bottom <= frame.bottom + 1;
          });
        })"""
    )
    page.screenshot(path=shots / f"index-many-{scheme}-{width}.png", full_page=True)
    require_fit(page)
    require_readable(page, scheme)
    page.get_by_label("Show rows with").fill("gemma3 CHAMPION")
    shown = page.locator("#all tbody > tr[id]:visible")
    assert shown.count() == 1 and "gemma3-270m-mka" in shown.first.inner_text()
    assert page.get_by_text("1 shown").is_visible() and page.locator("#plot a.out").count() == 3 * (len(rows) - 1)
    shown.first.locator("summary").click()
    assert shown.first.get_by_text("mka rollback gemma3-270m-mka --because TEXT").is_visible()
    page.get_by_label("Show rows with").fill("")
    assert shown.count() == len(rows)
    require_fit(page)
    require_quiet(seen)


def made_up_report(folder):
    """A report with everything on it: three sides, ranges of speeds, long names, a fit, a healing, pictures."""

    def side(layers, size, perplexity, decode, **facts):
        speeds = {"prefill_tokens_per_second": 20 * decode, "decode_tokens_per_second": decode}
        ranges = {
            f"{name}{end}": x * rate for name, rate in speeds.items() for end, x in (("_least", 0.96), ("_most", 1.03))
        }
        return EvalReport(
            {"path": f"/a/long/path/that/nobody/breaks/{'x' * 60}/model", "digest": "d" * 64, "layers": layers, **facts}
            | {"parameters": 4.5e6 * layers, "bytes": 2 * size, "served_bytes": size, "dtype": "F32"},
            tuple(
                Score(name, "perplexity", x * perplexity, 0.5, 8, False) for name, x in (("boolq", 1.0), ("sciq", 0.9))
            ),
            speeds | ranges,
            {"The capital of France is": " Paris. " * 30},
            {"dtype": "float32", "timing": {"rounds": 5, "cores": 2, "others_busy_cores": 1.2}, "command": "mka " * 40},
        )

    base, control = side(30, 269e6, 16.0, 21.0), side(30, 169e6, 16.1, 20.8, treatment="int8 in groups of 64")
    candidate = side(28, 162e6, 18.0, 24.0)
    check = {"name": "perplexity boolq", "recovery": 0.889, "lower": 0.86, "upper": 0.91, "threshold": 0.8, "n": 8}
    check |= {"verdict": "pass", "metric": "perplexity", "bound": "recovery"}
    gate = {"verdict": "pass", "checks": [check], "confidence": 0.95, "resamples": 2000, "seed": 0}
    kept = [i for i in range(30) if i not in (16, 17)]
    values = np.random.default_rng(0).uniform(0.1, 0.9, (30, 30))
    data = ReportData(
        {"name": "smollm2-135m", "model": {"hub": "x/" + "y" * 80}, "quantize": {"scheme": "int8", "group_size": 64}},
        MergePlan("uidl", "deleted, refitted and healed", 30, keep_layers(kept), ()),
        scores=LayerScores("pairwise-similarity", np.maximum(values, values.T), "similarity (1: same)", "mka", {}),
        base=base,
        candidate=candidate,
        control=control,
        gate=gate,
        provenance={"base_model": "SmolLM2", "digest": "e" * 64, "command": "mka run " + "recipe " * 30},
        stages={"observe": 12.3},
        registered="smollm2-135m-mka",
        cached=True,
    )
    return write_report(data, folder)


@pytest.mark.parametrize(("scheme", "width"), LOOKS)
def test_a_report_is_readable_at_every_width_and_its_pictures_follow_the_page(
    open_page, shots, tmp_path, scheme, width
):
    page, seen = open_page(made_up_report(tmp_path).as_uri(), scheme, width)
    page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    page.screenshot(path=shots / f"report-full-{scheme}-{width}.png", full_page=True)
    first = page.locator("main p").first.inner_text()
    assert first.startswith("Saves 40 % of the bytes (37 % by bits, 3 % by depth)") and first.endswith(".")
    assert "12 % of the decoding time (by depth alone)" in first
    assert page.get_by_text("A demonstration: its gate asks for 0.8").is_visible()
    assert page.get_by_text("other programs kept 1.2 of 2 cores").first.is_visible()
    require_readable(page, scheme)
    require_fit(page)
    # The corner of every picture is the colour of the card it lies on.
    for picture in page.locator("figure img").all():
        corner = picture.evaluate(
            """image => {
              const canvas = document.createElement("canvas"), drawn = canvas.getContext("2d");
              drawn.drawImage(image, 0, 0);
              return [...drawn.getImageData(2, 2, 1, 1).data].slice(0, 3);
            }"""
        )
        card = picture.evaluate("image => getComputedStyle(image.parentElement).backgroundColor")
        assert f"rgb({', '.join(map(str, corner))})" == card
    require_quiet(seen)


@pytest.mark.parametrize(("scheme", "width"), LOOKS)
def test_data_checks_are_readable_offline_at_every_width(open_page, shots, tmp_path, scheme, width):
    table = pd.DataFrame({"value": [1.0, 2.0], "spread": [0.0, float("inf")], "text": ["a" * 200, "b"]})
    suite = [expect_finite("value"), expect_finite("spread", 0), expect_complete("text")]
    with pytest.raises(GuardError):
        guard.check("numbers", table, suite, tmp_path, run="smollm2-20260101")
    docs = tmp_path / guard.DATA_DOCS
    (result,) = docs.rglob("tables-*.html")
    pages = {"summary": tmp_path / "index.html", "list": docs / "index.html", "result": result}
    for name, path in (pages | {"suite": docs / "expectations" / "numbers.html"}).items():
        page, seen = open_page(path.as_uri(), scheme, width)
        page.screenshot(path=shots / f"checks-{name}-{scheme}-{width}.png", full_page=True)
        assert "308" not in page.content()
        require_readable(page, scheme)
        require_fit(page)
        require_quiet(seen)


def test_an_empty_index_says_so(open_page, shots, tmp_path):
    page, seen = open_page(write_index([], tmp_path / "index.html").as_uri())
    assert page.get_by_text("Nothing has been recompressed yet").is_visible()
    require_quiet(seen)
    page.screenshot(path=shots / "index-empty.png", full_page=True)


def test_the_checks_page_tells_every_suite_and_leads_to_its_validation(stack, open_page, shots):
    page, seen = open_page((stack.work / "checks" / "index.html").as_uri())
    suites = page.locator("summary strong").all_inner_texts()
    assert {"calibration", "heldout", "hidden_states", "scores", "plan", "checkpoint", "evaluation_report"} <= set(
        suites
    )
    told = page.locator("summary").all_inner_texts()
    assert all("passed" in line and "expectations met" in line and "failed" not in line for line in told)
    require_quiet(seen)
    require_fit(page)
    page.screenshot(path=shots / "checks.png", full_page=True)
    page.locator("summary", has_text="calibration").get_by_role("link", name="Data Docs").click()
    page.get_by_text("Status:").wait_for()
    assert "No text occurs twice." in page.locator("body").text_content()
    require_fit(page)
    page.screenshot(path=shots / "data-docs-validation.png", full_page=True)


def test_data_docs_list_the_validations(stack, open_page, shots):
    docs = stack.work / "checks" / "gx" / "uncommitted" / "data_docs" / "local_site" / "index.html"
    page, seen = open_page(docs.as_uri())
    require_quiet(seen)
    require_fit(page)
    for name in ("Validation Results", "Expectation Suites"):
        assert page.get_by_role("heading", name=name).is_visible()
    rows = re.findall(r'href="(validations/[^"]+)"', page.content())
    assert rows and {row.split("/")[1] for row in rows} >= {"calibration", "plan", "checkpoint"}
    assert all((docs.parent / row).is_file() for row in rows)
    page.screenshot(path=shots / "data-docs.png", full_page=True)


def test_the_prefect_page_of_the_run_shows_state_log_and_artifacts(stack, open_page, shots):
    page, _ = open_page(f"{stack.prefect}/runs/flow-run/{stack.flow_run}")
    page.get_by_text(stack.facts["run"]).first.wait_for()
    page.get_by_text("Completed", exact=True).first.wait_for()
    page.get_by_text(re.compile(r"^plan: ")).first.wait_for()
    page.screenshot(path=shots / "prefect-run.png")
    for key, name in (("tiny-results", "results"), ("tiny-similarity", "similarity")):
        page.get_by_text("Artifacts", exact=True).last.click()
        page.get_by_text(key, exact=True).first.wait_for()
        if name == "results":
            page.screenshot(path=shots / "prefect-artifacts.png")
        page.get_by_text(key, exact=True).first.click()
        page.wait_for_url("**/artifacts/artifact/*")
        if name == "results":
            row = page.locator("tbody tr", has=page.get_by_text("layers", exact=True))
            cells = row.locator("td")
            cells.first.wait_for()
            # Base, control, candidate and their ratio.
            assert [text.strip() for text in cells.all_inner_texts()] == ["layers", "6", "6", "5", f"{5 / 6:.3f}"]
        else:
            picture = page.locator("img[src^='data:image/png']")
            picture.wait_for()
            assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 500
        page.screenshot(path=shots / f"prefect-{name}.png")
        page.go_back()


def test_mlflow_opens_what_we_print_in_its_view_of_models_with_results_in_words(stack, open_page, shots):
    version = find_version_page(stack.mlflow, stack.facts["registered_name"], stack.facts["registered_version"])
    page, _ = open_page(version, width=1600)
    page.get_by_role("link", name="tiny-5-of-6-layers-int8").wait_for()
    # The description's table: base, control, candidate and their ratio.
    row = page.locator("tbody tr", has=page.get_by_text("layers", exact=True)).first
    cells = [text.strip() for text in row.locator("td").all_inner_texts()]
    assert cells == ["layers", "6", "6", "5", f"{5 / 6:.3f}"]
    assert page.get_by_text("Agent versions").count() == 0 and page.get_by_text("Model training").is_visible()
    page.screenshot(path=shots / "mlflow-version.png")
    page.get_by_role("link", name="tiny-5-of-6-layers-int8").click()
    page.get_by_text("candidate/words/perplexity", exact=True).wait_for()
    page.get_by_text(re.compile(r"^heldout \(#")).first.wait_for()
    page.screenshot(path=shots / "mlflow-logged-model.png")


def test_prefect_has_the_automations_and_the_one_that_sends_is_off(stack, open_page, shots):
    page, _ = open_page(f"{stack.prefect}/automations")
    page.get_by_text("mka-runs-without-heartbeat", exact=True).wait_for()
    page.get_by_text("mka-tell", exact=True).wait_for()
    page.screenshot(path=shots / "prefect-automations.png")
    found = ask(f"{stack.prefect}/api/automations/filter", {})
    enabled = {automation["name"]: automation["enabled"] for automation in found}
    assert (enabled["mka-runs-without-heartbeat"], enabled["mka-tell"]) == (True, False)


def test_the_mlflow_page_of_the_run_shows_figures_and_settings(stack, open_page, shots):
    page, _ = open_page(f"{stack.mlflow}/#/experiments/1/runs/{stack.facts['mlflow_run_id']}", height=2200)
    page.get_by_text(stack.facts["run"]).first.wait_for()
    # 5 of 6 layers are left.
    for name, value in (("layer_ratio", 1 / 6), ("candidate/layers", 5), ("target.layers", 5)):
        row = page.get_by_role("row").filter(has=page.get_by_text(name, exact=True)).first
        row.wait_for()
        assert float(row.inner_text().split()[1]) == pytest.approx(value)
    page.screenshot(path=shots / "mlflow-run.png")


def test_the_mlflow_page_of_the_model_shows_versions_and_aliases(stack, open_page, shots):
    page, _ = open_page(f"{stack.mlflow}/#/models/{stack.facts['registered_name']}", width=1600)
    page.get_by_role("link", name=f"Version {stack.facts['registered_version']}").first.wait_for()
    assert "candidate" in stack.aliases
    for alias in stack.aliases:
        page.get_by_text(re.compile(rf"^@\s*{re.escape(alias)}$")).first.wait_for()
    page.screenshot(path=shots / "mlflow-model.png")
