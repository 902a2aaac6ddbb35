"""Great Expectations' own pages, in which text from tables stands as text."""

import html
from typing import Any

from great_expectations.render.view.view import DefaultJinjaPageView
from jinja2 import pass_context

from mka.outside.printable import escape_controls

SITE = "local_site"
SECTIONS = ("expectations", "validations", "profiling")


class EscapingPageView(DefaultJinjaPageView):  # type: ignore[misc]
    """A page whose cells are escaped: stock pages escape values inside sentences, but not samples of a table."""

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
    """Have a project's pages rendered by `EscapingPageView` from now on."""
    site = dict(context.variables.data_docs_sites[SITE])
    view = {"module_name": __name__, "class_name": EscapingPageView.__name__}
    builders = {name: {"view": view} for name in SECTIONS}
    if site.get("site_section_builders") != builders:
        context.update_data_docs_site(SITE, site | {"site_section_builders": builders})
