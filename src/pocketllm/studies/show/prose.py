"""The prose of a study: sections of a Markdown template (Jinja), filled in with numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pocketllm.errors import ExtraError
from pocketllm.studies.definition import Table
from pocketllm.studies.measure.significance import mean
from pocketllm.studies.show.numbers import compared, mean_spread, number, verdict, with_error

_FOLDER = Path(__file__).parent / "templates"
_FILTERS: dict[str, Callable[..., Any]] = {
    "number": number,
    "with_error": with_error,
    "mean": mean,
    "mean_spread": mean_spread,
    "verdict": verdict,
    "compared": compared,
    "fixed": lambda value, places=2: f"{value:.{places}f}",
    "percent": lambda share, places=0: "not finite" if share is None else f"{share:.{places}%}",
    "compact": lambda value, digits=6: f"{value:.{digits}g}",
    "sentence": lambda words: words[0].upper() + words[1:],
}
"""Filters of the templates: the functions of `show.numbers`, and formats."""


@dataclass(frozen=True)
class Prose:
    """A template cut at its headings `# Section`.

    macros: of all studies and of this one (before the first heading), for every section. sections: heading -> text.
    """

    macros: str
    sections: dict[str, str]

    def text(self, section: str, **values: Any) -> str:
        """A section as one paragraph; "" where the template has none of that name."""
        return _one_line(self._filled(section, values))

    def sentences(self, section: str, **values: Any) -> list[str]:
        """The items (`- …`) of a section."""
        items = re.split(r"^\s*- ", self._filled(section, values), flags=re.MULTILINE)[1:]
        return [_one_line(item) for item in items]

    def tables(self, **values: Any) -> list[Table]:
        """The tables of the section `Tables`: under a heading `## Title` rows between bars, and a note."""
        _, *parts = re.split(r"^## (.+)\n", self._filled("Tables", values), flags=re.MULTILINE)
        return [_table(title, text) for title, text in zip(parts[::2], parts[1::2], strict=True)]

    def _filled(self, section: str, values: dict[str, Any]) -> str:
        text = self.sections.get(section, "")
        if "{" not in text:  # plain words need no Jinja
            return text
        return str(_environment().from_string(self.macros + text).render(values))


@cache
def prose(name: str) -> Prose:
    """The template of the study of that name."""
    text = (_FOLDER / f"{name}.md.j2").read_text(encoding="utf-8")
    macros, *parts = re.split(r"^# (.+)\n", text, flags=re.MULTILINE)
    shared = (_FOLDER / "shared.md.j2").read_text(encoding="utf-8")
    return Prose(shared + macros, dict(zip(parts[::2], parts[1::2], strict=True)))


def need_jinja() -> None:
    """Check early that templates can be rendered.

    Raises:
        ExtraError: jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise ExtraError(
            "pages of studies need jinja2; install it with: pip install 'pocketllm-codec[studies]'"
        ) from error


@cache
def _environment() -> Any:
    need_jinja()
    import jinja2

    # Markdown, not HTML: nothing is escaped.
    made = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    made.filters |= _FILTERS
    return made


def _table(title: str, text: str) -> Table:
    """The first row is the header; a row begins and ends at a bar, on one line or several."""
    row = re.compile(r"^\s*\|(.*?)\|\s*$", flags=re.MULTILINE | re.DOTALL)
    header, *rows = ([_one_line(cell) for cell in found.split("|")] for found in row.findall(text))
    return Table(title, header, rows, _one_line(row.sub("", text)))


def _one_line(text: str) -> str:
    """The words with single spaces between them."""
    return re.sub(r"[ \n]+", " ", text).strip()
