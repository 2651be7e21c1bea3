"""Sections and pages from the templates in `templates/`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pocketllm.errors import ExtraError
from pocketllm.report import svg
from pocketllm.report.sections import Section
from pocketllm.report.tables import megabytes, percent, short, thousands


def need_templates() -> None:
    """Check before any work that what renders a page is installed.

    Raises:
        ExtraError: Jinja2 or matplotlib is not installed.
    """
    svg.need_matplotlib()
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise ExtraError(
            "a report needs Jinja2; install it with: pip install 'pocketllm-codec[report]'"
        ) from error


def render_page(sections: Sequence[Section], **values: Any) -> str:
    """The page, one HTML file that needs nothing else. values: what `page.html.j2` shows besides the sections."""
    return str(_environment().get_template("page.html.j2").render(sections=sections, **values))


def render_section(section: Section) -> str:
    """HTML of one section, without its heading; safe to put into a page."""
    import markupsafe

    template = _environment().get_template(f"{section.name}.html.j2")
    return markupsafe.Markup(template.render(section=section, **section.values))


@cache
def _environment() -> Any:
    """The template engine; every value is escaped, an undefined one is an error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "megabytes": megabytes,
        "one_line": lambda text: type(text)(" ").join(text.split()),
        "percent": percent,
        "rendered": render_section,
        "short": short,
        "thousands": thousands,
    }
    return environment
