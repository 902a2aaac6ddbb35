"""Great Expectations' own pages, in which text from tables stands as text, and which load nothing from elsewhere."""

import html
from pathlib import Path
from typing import Any

from great_expectations.render.view.view import DefaultJinjaPageView
from jinja2 import ChoiceLoader, FileSystemLoader, pass_context

from mka.outside.printable import escape_controls

SITE = "local_site"
SECTIONS = ("expectations", "validations", "profiling")
# In the place of stock templates of the same names, whose styles, icons and lists come from other hosts.
TEMPLATES = Path(__file__).parent / "templates"


class EscapingPageView(DefaultJinjaPageView):  # type: ignore[misc]
    """A page whose cells are escaped: stock pages escape values inside sentences, but not samples of a table.

    What passed is folded, and neither styles nor scripts are fetched.
    """

    _template = "page.j2"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Look for templates here first."""
        super().__init__(*arguments, **options)
        self.env.loader = ChoiceLoader([FileSystemLoader(TEMPLATES), self.env.loader])

    @pass_context
    def render_content_block(self, jinja_context: Any, content_block: Any, *arguments: Any, **options: Any) -> Any:
        """Render a part of the page; a bare string is text from outside."""
        if isinstance(content_block, str):
            return html.escape(content_block, quote=False)
        if isinstance(content_block, list):
            content_block = [
                html.escape(part, quote=False) if isinstance(part, str) else part for part in content_block
            ]
        return super().render_content_block(jinja_context, content_block, *arguments, **options)

    def render(self, document: Any, template: Any = None, **options: Any) -> str:
        """Render a page."""
        return escape_controls(super().render(document, template, **options), keep="\n\r\t")


def use_escaping_pages(context: Any) -> None:
    """Have a project's pages and the list of them rendered by `EscapingPageView` from now on."""
    site = dict(context.variables.data_docs_sites[SITE])
    view = {"module_name": __name__, "class_name": EscapingPageView.__name__}
    builders = {
        "site_section_builders": {name: {"view": view} for name in SECTIONS},
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder", "view": view},
    }
    if any(site.get(key) != value for key, value in builders.items()):
        context.update_data_docs_site(SITE, site | builders)
