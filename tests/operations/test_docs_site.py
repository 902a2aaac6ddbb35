"""The documentation site, built and opened in a real browser: from disk, with no network, wide and narrow, light and dark."""

import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.operations]

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("index", "own-model", "report", "recipe", "library", "operations", "formats", "benchmarks", "project/decisions")


@pytest.fixture(scope="module")
def site():
    """Build it as a person does; whatever is wrong with a link or a page ends the build."""
    built = subprocess.run(["make", "docs"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stdout + built.stderr
    return ROOT / "build" / "site"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_and_ask_no_network(site, open_page, shots, scheme):
    for name in PAGES:
        page, seen = open_page((site / f"{name}.html").as_uri(), scheme)
        assert page.locator("article h1").inner_text().strip(" ¶")
        assert (seen.outside, seen.errors) == ([], []), name
        page.screenshot(path=shots / f"docs-{name.replace('/', '-')}-{scheme}.png")
        page.set_viewport_size({"width": 390, "height": 800})
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, f"{name}: {width} pixels wide on a phone"
        page.screenshot(path=shots / f"docs-{name.replace('/', '-')}-{scheme}-390.png")


def test_the_recipes_reference_has_every_section_and_the_search_finds_it(site, open_page):
    page, _ = open_page((site / "recipe.html").as_uri())
    headings = {heading.strip(" ¶") for heading in page.locator("article h2").all_inner_texts()}
    assert {"model", "target", "heal", "quantize", "evaluation", "gate", "gate.rules", "registry"} <= headings
    assert page.locator("article td code", has_text="bits_per_weight").count() == 1
    page.get_by_placeholder("Search").first.press_sequentially("bits_per_weight")
    page.locator(".md-search-result__link", has_text="recipe").first.wait_for(timeout=20_000)
