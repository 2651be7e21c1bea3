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
from pocketllm.studies.measure.entries import EXPLODED, exploded, grouped, highest, over_entries, select
from pocketllm.studies.measure.significance import mean
from pocketllm.studies.measure.task_scores import able, accuracy, points_lost, probability_lost
from pocketllm.studies.measure.trials import NORMS, TRAININGS
from pocketllm.studies.show.numbers import compared, mean_spread, noise, number, with_error
from pocketllm.studies.verdicts import above_zero

_FOLDER = Path(__file__).parent / "templates"
_FILTERS: dict[str, Callable[..., Any]] = {
    "number": number,
    "with_error": with_error,
    "mean": mean,
    "mean_spread": mean_spread,
    "noise": noise,
    "compared": compared,
    "above_zero": above_zero,
    "fixed": lambda value, places=2: f"{value:.{places}f}",
    "percent": lambda share, places=0: "not finite" if share is None else f"{share:.{places}%}",
    "compact": lambda value, digits=6: f"{value:.{digits}g}",
    "sentence": lambda words: words[0].upper() + words[1:],
}
"""Filters of the templates: the functions of `show.numbers`, a rule, and formats."""
_GLOBALS = {
    "able": able,
    "accuracy": accuracy,
    "exploded": exploded,
    "explosion": EXPLODED,
    "grouped": grouped,
    "highest": highest,
    "norms": NORMS,
    "over": over_entries,
    "points_lost": points_lost,
    "probability_lost": probability_lost,
    "select": select,
    "trainings": TRAININGS,
}
"""What every template can call or name."""


@dataclass(frozen=True)
class Prose:
    """A template cut at its headings `# Section`.

    macros: of all studies and of this one (before the first heading), for every section. sections: heading -> text.
    """

    macros: str
    sections: dict[str, str]

    def text(self, section: str, **values: Any) -> str:
        """A section as one paragraph; "" where the template has none of that name."""
        return _one_line(self._filled(self.sections.get(section, ""), values))

    def sentence(self, claim: str, **values: Any) -> str:
        """The words of a finding: those under the heading `## claim` of the section `Findings`."""
        return _one_line(self._filled(self.claims[claim], values))

    @property
    def claims(self) -> dict[str, str]:
        """Claim -> the words of its finding, not filled in."""
        return dict(_parts("##", self.sections.get("Findings", ""))[1])

    def tables(self, **values: Any) -> list[Table]:
        """The tables of the section `Tables`: under a heading `## Title` rows between bars, and a note."""
        filled = self._filled(self.sections.get("Tables", ""), values)
        return [_table(title, text) for title, text in _parts("##", filled)[1]]

    def _filled(self, text: str, values: dict[str, Any]) -> str:
        if "{" not in text:  # plain words need no Jinja
            return text
        return str(_environment().from_string(self.macros + text).render(values))


@cache
def prose(name: str) -> Prose:
    """The template of the study of that name."""
    text = (_FOLDER / f"{name}.md.j2").read_text(encoding="utf-8")
    macros, sections = _parts("#", text)
    shared = (_FOLDER / "shared.md.j2").read_text(encoding="utf-8")
    return Prose(shared + macros, dict(sections))


def _parts(level: str, text: str) -> tuple[str, list[tuple[str, str]]]:
    """(the text before the first heading of a level, the headings and the text below each)."""
    before, *parts = re.split(rf"^{level} (.+)\n", text, flags=re.MULTILINE)
    return before, list(zip(parts[::2], parts[1::2], strict=True))


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
    made.globals |= _GLOBALS
    return made


def _table(title: str, text: str) -> Table:
    """The first row is the header; a row begins and ends at a bar, on one line or several."""
    row = re.compile(r"^\s*\|(.*?)\|\s*$", flags=re.MULTILINE | re.DOTALL)
    header, *rows = ([_one_line(cell) for cell in found.split("|")] for found in row.findall(text))
    return Table(title, header, rows, _one_line(row.sub("", text)))


def _one_line(text: str) -> str:
    """The words with single spaces between them."""
    return re.sub(r"[ \n]+", " ", text).strip()
