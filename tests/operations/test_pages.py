"""Every page of a recompression, opened in a real browser: what a person looks for is on it."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from support.servers import ask

from mka.report.index import AliasMove, Recompression, Recovery, write_index
from tasks.registry.tracking import find_version_page

pytestmark = [pytest.mark.browser, pytest.mark.operations]


def require_quiet(seen):
    """One of our own pages asks nobody for anything and has nothing to complain of."""
    assert seen.requests and seen.outside == []
    assert seen.errors == []


def require_fit(page):
    """Nothing of the page itself sticks out at the side; wide tables scroll inside their frames."""
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


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
                recoveries=(
                    Recovery("perplexity boolq", value, *bounds),
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


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 420)])
def test_an_index_of_many_is_readable_at_every_width(open_page, shots, tmp_path, scheme, width):
    rows, moves = made_up()
    page, seen = open_page(write_index(rows, tmp_path / "index.html", moves).as_uri(), scheme, width)
    assert page.locator("#all tbody > tr[id]").count() == len(rows)
    champions = page.locator("tr.champion")
    assert champions.count() == 2 and "smollm2-135m-202620" in champions.first.inner_text()
    assert page.locator("#plot figure").count() == 2 and page.locator("#plot figure a").count() == len(rows)
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
    require_quiet(seen)
    require_fit(page)
    page.screenshot(path=shots / f"index-many-{scheme}-{width}.png", full_page=True)


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
    page.get_by_text("Status: Succeeded").wait_for()
    assert "No text occurs twice." in page.locator("body").inner_text()
    page.screenshot(path=shots / "data-docs-validation.png", full_page=True)


def test_data_docs_list_the_validations(stack, open_page, shots):
    docs = stack.work / "checks" / "gx" / "uncommitted" / "data_docs" / "local_site" / "index.html"
    page, _ = open_page(docs.as_uri())
    assert page.get_by_text("Validation Results").is_visible() and page.get_by_text("Expectation Suites").is_visible()
    # A script from elsewhere, which does not load here, would make the table of them; the rows themselves are there.
    rows = re.findall(r"'_table_row_link_path': '(validations/[^']+)'", page.content())
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
