"""Tables of a page, built from declared columns, and the format of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
Columns = Mapping[str, Callable[[T], str]]

_CHARACTER, _PADDING = 8, 12  # pixels of a table on the page
_PHONE, _HALF_A_PAGE = 320, 400


@dataclass(frozen=True)
class Table:
    """Headers and rows of text. words: how many columns at the left are words, not numbers."""

    caption: str
    headers: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: int = 1

    @classmethod
    def of(cls, caption: str, columns: Columns[T], items: Iterable[T], words: int = 1) -> Table:
        """One row for each item. columns: header -> text of the cell."""
        rows = [tuple(cell(item) for cell in columns.values()) for item in items]
        return cls(caption, tuple(columns), rows, words)

    @classmethod
    def pairs(
        cls, caption: str, values: Mapping[str, Any], headers: tuple[str, str] = ("setting", "value")
    ) -> Table:
        """One row for each key and its value."""
        return cls(caption, headers, [(str(key), str(value)) for key, value in values.items()], words=2)

    @property
    def may_scroll(self) -> bool:
        """Whether it may be wider than a phone; it must then be reachable by keyboard."""
        return self._min_pixels > _PHONE

    @property
    def wide(self) -> bool:
        """Whether it may be wider than half a page; it must then stand alone in its row."""
        return self._min_pixels > _HALF_A_PAGE

    @property
    def _min_pixels(self) -> float:
        """Estimated width, rounded up: columns of words may be broken at spaces, numbers may not."""
        total = 0.0
        for column, cells in enumerate(zip(self.headers, *self.rows, strict=True)):
            pieces = [piece for cell in cells for piece in (cell.split() if column < self.words else [cell])]
            total += _PADDING + _CHARACTER * max(map(len, pieces), default=0)
        return total


def short(value: float | None, digits: int = 3) -> str:
    """A number with this many significant digits, without an exponent if possible; a dash for None. Provisional."""
    if value is None:
        return "–"
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def percent(share: float | None) -> str:
    """A share in per cent, or a dash."""
    return "–" if share is None else f"{100 * share:.1f}%"


def thousands(count: int) -> str:
    """An integer with a comma between groups of three digits."""
    return f"{count:,}"


def megabytes(nbytes: float) -> str:
    """Bytes as MB (10^6), or as kB below one MB."""
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:,.1f} kB"
